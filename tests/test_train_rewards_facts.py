"""Rewards for facts: options, yes and no, numbers with units, findings; and the ways to cheat."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.evaluation.findings import VOCABULARY, find_findings
from medmo_edge.train.rewards_facts import (
    chosen_option,
    findings_reward,
    is_quantity,
    number_reward,
    option_reward,
    read_quantities,
    said_yes_no,
    variety,
    yes_no_reward,
)

CHOICES = ("Left lung", "Lung", "Vitamin C deficiency", "A cyst")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (b).", "B"),
        ("B.", "B"),
        ("B. Lung", "B"),
        ("Lung", "B"),
        ("lung.", "B"),
        ("A", "A"),
        ("A. Left lung", "A"),  # holds another option's text inside its own
        ("C. Vitamin C deficiency", "C"),
        ("Vitamin C deficiency", "C"),
        ("D: a cyst", "D"),
        ("A cyst", "D"),
        ("The answer is B", "B"),
        ("Considering A and C, the final answer: B", "B"),
        ("<answer>B</answer>", "B"),
        ("It must be \\boxed{B}.", "B"),
        ("I would choose B", "B"),
        ("A lesion is seen. Answer: C", "C"),
        ("", None),
        ("A B C D", None),
        ("A, B", None),
        ("A or B", None),
        ("A. Left lung B. Lung", None),
        ("Left lung, Lung", None),
        ("B. Vitamin C deficiency", None),  # letter and text disagree
        ("The answer is A. The answer is B", None),
        ("<answer>A</answer><answer>B</answer>", None),
        ("ABCD", None),
        ("E", None),
        ("none of these", None),
    ],
)
def test_the_option_an_answer_chooses(text: str, letter: str | None) -> None:
    assert chosen_option(text, CHOICES) == letter
    for wanted in "ABCD":
        assert option_reward(text, wanted, CHOICES) == float(letter == wanted)


@given(st.permutations("ABCD"), st.integers(2, 4), st.sampled_from([" ", ", ", ". ", " or ", "\n"]))
def test_several_letters_never_earn_anything(letters: list[str], count: int, joint: str) -> None:
    text = joint.join(letters[:count])
    assert all(option_reward(text, letter, ("w", "x", "y", "z")) == 0 for letter in "ABCD")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("NO", "no"),
        ("No, the lungs are clear", "no"),
        ("Yes, but there is no effusion.", "yes"),
        ("There is no fracture.", "no"),
        ("Answer: yes", "yes"),
        ("yes yes yes", "yes"),
        ("", None),
        ("yes/no", None),
        ("yes or no", None),
        ("yes and no", None),
        ("Yes. No.", None),
        ("No, yes", None),
        ("no\nyes", None),
        ("Yes, there is one. No", None),
        ("There are both: no and yes", None),
        ("Perhaps", None),
        ("Yesterday nothing", None),
    ],
)
def test_yes_and_no(text: str, said: str | None) -> None:
    assert said_yes_no(text) == said
    assert yes_no_reward(text, "Yes") == float(said == "yes")
    assert yes_no_reward(text, "no") == float(said == "no")


@pytest.mark.parametrize(
    ("text", "quantities"),
    [
        ("3", [(3, "")]),
        ("three nodules", [(3, "")]),
        ("3.2 cm", [(32, "length")]),
        ("32mm", [(32, "length")]),
        ("a 3-cm mass", [(30, "length")]),
        ("2 x 3 cm", [(20, "length"), (30, "length")]),
        ("2-3 cm", [(20, "length"), (30, "length")]),
        ("-175 HU", [(-175, "density")]),
        ("1,250 ml", [(1250, "volume")]),
        ("1.5 L", [(1500, "volume")]),
        ("5 cm^2", [(500, "area")]),
        ("40 %", [(40, "part")]),
        ("T2 and L4-L5, C5/6", [(6, "")]),
        (".5 cm", [(5, "length")]),
        ("two weeks", [(14, "time")]),
        ("nothing", []),
    ],
)
def test_quantities_are_read_in_base_units(text: str, quantities: list[tuple[float, str]]) -> None:
    found = read_quantities(text)
    assert [one.kind for one in found] == [kind for _, kind in quantities]
    assert [one.value for one in found] == pytest.approx([value for value, _ in quantities])


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("32 mm", "3.2 cm", 1),
        ("It measures 3.3 cm (segment 7).", "3.2 cm", 1),  # within 5 %
        ("3.4 cm", "3.2 cm", 0),
        ("3.2", "3.2 cm", 0),
        ("3.2 mm", "3.2 cm", 0),
        ("3.2 ml", "3.2 cm", 0),
        ("3 cm or 3.2 cm", "3.2 cm", 0),
        ("3-4 cm", "4 cm", 0),
        ("1 cm, 2 cm, 3.2 cm", "3.2 cm", 0),
        ("3 x 2 cm", "2 x 3 cm", 1),
        ("2 x 2 cm", "2 x 3 cm", 0),
        ("There are two nodules, of 5 mm each", "2", 1),
        ("2 on the left and 1 on the right", "3", 0),
        ("2, I say 2", "2", 1),
        ("1 2 3 4 5", "3", 0),
        ("3.0", "3", 1),
        ("3.1", "3", 0),  # counts are exact
        ("", "3", 0),
        ("3", "many", None),
    ],
)
def test_numbers(text: str, answer: str, reward: float | None) -> None:
    assert number_reward(text, answer) == reward


@given(st.floats(0.1, 50), st.floats(0, 2))
def test_a_measurement_counts_within_its_tolerance_only(size: float, factor: float) -> None:
    said, wanted = f"{size * factor:.6f} cm", f"{size * 10:.6f} mm"
    reward = number_reward(said, wanted, tolerance=0.1)
    if abs(factor - 1) < 0.0999:
        assert reward == 1
    if abs(factor - 1) > 0.1001:
        assert reward == 0


@pytest.mark.parametrize(
    ("answer", "is_one"),
    [
        ("3", True),
        ("3.2 cm", True),
        ("2 x 3 cm", True),
        ("two nodules", True),
        ("about 3", False),
        ("left 4th rib", False),
        ("T2 weighted", False),
        ("", False),
    ],
)
def test_which_answers_are_numbers(answer: str, is_one: bool) -> None:
    assert is_quantity(answer) == is_one


# Reports ---------------------------------------------------------------------------------------

REPORT = "Small left pleural effusion. Consolidation in the right lower lobe. No pneumothorax."
# Weights: two findings present (1 each) and one denied (1/4): 9/4 in all.


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (REPORT, 1.0),
        ("", 0.0),
        ("The lungs were examined.", 0.0),
        # shared 1, said 1: 2 * 1 / (9/4 + 1)
        ("Left pleural effusion.", 2 / 3.25),
        # the side is not named: half
        ("Pleural effusion.", 1 / 3.25),
        # the other side: nothing
        ("Right pleural effusion.", 0.0),
        ("No pleural effusion. No consolidation. Pneumothorax.", 0.0),
        # everything denied shares the pneumothorax only: 2/4 over 9/4 + 3/4
        ("No pleural effusion. No consolidation. No pneumothorax.", 0.5 / 3),
        # an invented fracture: 2 * 9/4 over 9/4 + 13/4
        (f"{REPORT} There is a fracture.", 4.5 / 5.5),
        (f"{REPORT} {REPORT}", 0.5),
        (" ".join([REPORT] * 4), 0.25),
    ],
)
def test_findings_by_hand(text: str, wanted: float) -> None:
    assert findings_reward(text, REPORT) == pytest.approx(wanted)


def test_a_truth_without_findings_judges_nothing() -> None:
    assert findings_reward("Effusion.", "The examination was of good quality.") is None


def test_listing_every_finding_earns_little() -> None:
    for form in ("There is {}.", "No {}.", "Possible {}.", "There is {0}. No {0}."):
        names = ["cardiomegaly", "edema", "pneumonia", "atelectasis", "pneumothorax", "fracture"]
        names += ["pleural effusion", "consolidation", "emphysema", "hernia", "fibrosis", "mass"]
        text = " ".join(form.format(name) for name in names)
        assert len(find_findings(text)) == len(names)
        reward = findings_reward(text, REPORT)
        assert reward is not None and reward < 0.25


@given(st.lists(st.sampled_from(sorted(VOCABULARY)), max_size=6), st.booleans())
def test_findings_stay_in_range_and_the_truth_earns_one(labels: list[str], deny: bool) -> None:
    said = " ".join(f"{'No' if deny else 'There is'} {label}." for label in labels)
    reward = findings_reward(said, REPORT)
    assert reward is not None and 0 <= reward <= 1
    own = findings_reward(said, said)
    assert own is None or own == pytest.approx(1)
    backwards = ". ".join(reversed(said.removesuffix(".").split(". ")))
    assert findings_reward(backwards, REPORT) == pytest.approx(reward)


def test_variety_is_of_sentences() -> None:
    assert variety("") == variety("One. Two") == 1
    assert variety("One. one! Two; TWO\nthree") == pytest.approx(3 / 5)
