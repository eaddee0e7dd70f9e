"""Verdicts recorded from MedEvalKit 9b12e3b (utils.py, MMMU/eval_utils.py) on the same answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.evaluation.answer_rules import (
    judge_choice,
    judge_count,
    judge_mmmu_choice,
    judge_mmmu_open,
    judge_open,
    judge_phrase,
    judge_yes_no,
    tagged,
)

OPTIONS = ("A. left lung", "B. right lung", "C. both lungs", "D. none of the above")
BARE = ("heart failure", "pneumonia", "normal lung", "asthma")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("b.", True),
        ("The answer is B.", True),
        ("Answer: (B)", True),
        ("right lung", True),
        ("It is the right lung", True),
        ("\\boxed{B}", True),
        ("<answer>B</answer>", True),
        ("B\n\nbecause of that", True),
        ("Because.\n\nB. right", True),
        ("**Answer:** C", False),
        ("I cannot tell", False),
        ("", False),
        ("B. right lung", True),
        ("yes", False),
        ("A or B", False),
        ("C: both", False),
        ("none", False),
    ],
)
def test_multiple_choice(answer: str, right: bool) -> None:
    assert judge_choice(answer, "B", OPTIONS).right is right


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("B", True),
        ("(B)", True),
        ("B) right lung", True),
        ("right lung", True),
        ("right lung.", True),
        ("The answer is B.", True),
        ("I cannot tell", False),
        ("It is the right lung", False),
        ("", False),
        ("E", False),
    ],
)
def test_what_counts_as_read(answer: str, read: bool) -> None:
    """MedEvalKit guesses for every answer; ours says when it was a guess."""
    assert judge_choice(answer, "B", OPTIONS).read is read


@pytest.mark.parametrize(
    ("answer", "if_yes", "if_no"),
    [
        ("Yes.", True, False),
        ("no", False, True),
        ("Yes, there is no effusion", False, False),
        ("normal", False, True),  # the published rule looks inside words
        ("NO\n", False, True),
        ("it is present", False, False),
        ("\\boxed{yes}", True, False),
        ("the answer is yes", True, False),
        ("I know nothing", False, True),
        ("yes yes", True, False),
    ],
)
def test_yes_or_no(answer: str, if_yes: bool, if_no: bool) -> None:
    assert judge_yes_no(answer, "yes").right is if_yes
    assert judge_yes_no(answer, "no").right is if_no


def test_a_no_inside_a_word_is_not_read() -> None:
    assert not judge_yes_no("normal", "no").read
    assert judge_yes_no("No, it is normal.", "no").read


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("A then (B)", "B"),
        ("I think (A) or (C)", "C"),
        ("it must be pneumonia in this patient here", "B"),
        ("The A and B", "B"),
        ("B.", "B"),
        ("pneumonia is it, not heart failure, for this one", "A"),
    ],
)
def test_mmmu_choice(answer: str, letter: str) -> None:
    judged = judge_mmmu_choice(answer, letter, BARE)
    assert judged.right and judged.read and judged.said == letter


def test_mmmu_draws_the_same_letter_every_time() -> None:
    drawn = {judge_mmmu_choice("hm", "A", BARE, "item-7").said for _ in range(20)}
    assert len(drawn) == 1
    spread = {judge_mmmu_choice("hm", "A", BARE, f"item-{n}").said for n in range(60)}
    assert spread == set("ABCD")
    assert not judge_mmmu_choice("hm", "A", BARE, "item-7").read


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The answer is 3.5", "3.5", True),
        ("about 12 or so", "12", True),
        ("it is pneumonia", "pneumonia", True),
        ("1,200 cells", "1200", True),
        ("C", "C", True),
        ("Left lung = 4", "4", True),
        ("no idea", "5", False),
    ],
)
def test_mmmu_open(answer: str, gold: str, right: bool) -> None:
    assert judge_mmmu_open(answer, [gold]).right is right


def test_phrases_and_open_answers() -> None:
    assert judge_phrase("Axial.\n", "axial").right
    assert not judge_phrase("axial plane", "axial").right
    assert judge_open("Pneumonia", "pneumonia").right
    assert not judge_open("a pneumonia", "pneumonia").right
    assert judge_count("There are 12 cells", "12").right
    assert not judge_count("twelve", "12").read


def test_tags() -> None:
    assert tagged("x \\boxed{a{b}c} y") == "a{b}c"
    assert tagged("<answer> B </answer>") == "B"
    assert tagged("\\boxed{open") == "\\boxed{open"


@given(st.text(max_size=80), st.sampled_from("ABCD"))
def test_any_answer_gets_a_verdict(answer: str, gold: str) -> None:
    assert judge_choice(answer, gold, OPTIONS).said in ("a", "b", "c", "d")
    assert judge_mmmu_choice(answer, gold, BARE).said in "ABCD"
    judge_yes_no(answer, "yes")
    judge_mmmu_open(answer, [gold, "3.5"])


@given(st.sampled_from("ABCD"))
def test_a_bare_letter_is_that_letter(letter: str) -> None:
    for form in ("{}", "{}.", "({})", "Answer: {}", "\\boxed{{{}}}", "{}\n\nsince"):
        judged = judge_choice(form.format(letter), letter, OPTIONS)
        assert judged.right and judged.read
