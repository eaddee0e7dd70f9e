"""The table of rewards, their sum, TRL's signature, and what a failing reward says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.boxes import Box, Geometry, render_boxes
from medmo_edge.errors import RecipeError, SampleError
from medmo_edge.samples import Sample
from medmo_edge.train import rewards
from medmo_edge.train.rewards import (
    DEFAULT_WEIGHTS,
    REWARDS,
    Case,
    columns,
    combine,
    judge,
    require_applicable,
    trl_reward,
)

ROOT = Path(__file__).parents[1]
GEOMETRY = Geometry(
    width=500, height=100, frame_width=500, frame_height=100, resized_width=512, resized_height=96
)
TRUTH = (Box("WBC", 50, 10, 100, 60), Box("RBC", 200, 20, 300, 90))
LOCATE = Sample(
    id="smear",
    task="locate",
    images=(Path("/x/smear.png"),),
    messages=[{"role": "user", "content": "Locate everything."}],
    boxes=TRUTH,
)


def test_importing_rewards_needs_no_torch_and_no_trl() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['trl'] = None;"
        "from medmo_edge.train.rewards import box_reward;"
        "print(box_reward([(0, 0, 9, 9)], [(0, 0, 9, 9)], size=(9, 9)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1.0"


@pytest.fixture(scope="module")
def cheats() -> str:
    """What benchmarks/reward_cheats.py prints: two tables."""
    command = [sys.executable, str(ROOT / "benchmarks" / "reward_cheats.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_documented_table_is_what_the_rewards_give(cheats: str) -> None:
    """docs/rewards.md holds what benchmarks/reward_cheats.py prints."""
    document = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for table in cheats.split("\n\n"):
        assert table in document, (
            "docs/rewards.md is behind reward_cheats.py: copy its tables there"
        )


def test_every_cheat_earns_far_less_than_honest_work(cheats: str) -> None:
    boxes, facts = cheats.split("\n\n")
    names = [name.strip() for name in boxes.splitlines()[0].split("|")[1:-1]]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in boxes.splitlines()[2:]]
    table = {row[0]: dict(zip(names[1:], map(float, row[1:]), strict=True)) for row in rows}
    honest = {
        "perfect",
        "a little beside",
        "one of three missing",
        '"None." where there is nothing',
    }
    assert min(table[name]["sum"] for name in honest) > 0.6
    assert max(row["sum"] for name, row in table.items() if name not in honest) <= 0.25
    assert max(row["box"] for name, row in table.items() if name not in honest) <= 0.15
    for name in ("grid of 400 boxes", "right boxes and a grid of 25"):
        assert table[name]["paper"] > 0.8 and table[name]["penalised"] == 0  # the published hole
    honest = {"B", "B. Lung", "Yes, there is.", "32 mm", "the report itself"}
    honest |= {"the report without its effusion"}
    for line in facts.splitlines()[2:]:
        _, answer, score = (cell.strip() for cell in line.split("|")[1:-1])
        assert float(score) >= 0.7 if answer in honest else float(score) <= 0.2, answer


def case(text: str, **changes: Any) -> Case:
    return Case(**({"text": text, "sample_id": "s1"} | changes))


def test_which_rewards_apply_to_which_task() -> None:
    def applying(case: Case) -> set[str]:
        return {name for name in REWARDS if judge(name, case) is not None}

    boxes = {"box", "iou", "label", "count", "format", "distinct"}
    assert applying(case("x", boxes=TRUTH, geometries=(GEOMETRY,))) == boxes
    assert applying(case("x", boxes=(), geometries=(GEOMETRY,))) == boxes
    assert applying(case("B", answer="B", choices=("a", "b"))) == {"option"}
    assert applying(case("x", answer="Yes")) == {"yes_no"} == applying(case("x", answer="No."))
    assert applying(case("x", answer="3 cm")) == {"number"}
    assert applying(case("x", answer="left lung")) == set()
    assert applying(case("x", target="No effusion.")) == {"findings"}
    assert applying(case("x", target="A good picture.")) == set()
    assert set(DEFAULT_WEIGHTS) == set(REWARDS)


def test_the_sum_is_the_weighted_mean_of_what_applies() -> None:
    text = render_boxes(TRUTH, GEOMETRY, "norm1000")
    perfect = case(text, boxes=TRUTH, geometries=(GEOMETRY,))
    assert combine(perfect) == pytest.approx(1, abs=0.01)  # the grid of 1000 rounds
    half = case(render_boxes(TRUTH[:1], GEOMETRY, "norm1000"), boxes=TRUTH, geometries=(GEOMETRY,))
    iou = judge("iou", half) or 0.0
    assert iou == pytest.approx(0.5, abs=0.01) and judge("count", half) == 0.5
    weighted = combine(half, {"iou": 3, "count": 1, "yes_no": 9})
    assert weighted == pytest.approx((3 * iou + 0.5) / 4)
    assert combine(case("x")) is None
    assert combine(case("yes", answer="yes"), {"yes_no": 0.0}) is None


@given(st.text(max_size=80))
def test_any_text_is_judged_between_nought_and_one(text: str) -> None:
    for one in (
        case(text, boxes=TRUTH, geometries=(GEOMETRY,)),
        case(text, answer="B", choices=("lung", "liver")),
        case(text, answer="no"),
        case(text, answer="3 cm"),
        case(text, target="Left pleural effusion."),
    ):
        value = combine(one)
        assert value is not None and 0 <= value <= 1


def test_pictures_are_told_apart() -> None:
    truth = (Box("WBC", 50, 10, 100, 60, 1),)
    text = "image 2: " + render_boxes([Box("WBC", 50, 10, 100, 60)], GEOMETRY, "norm1000")
    both = (GEOMETRY, GEOMETRY)
    assert combine(case(text, boxes=truth, geometries=both)) == pytest.approx(1, abs=0.01)
    wrong = combine(case(text.replace("2:", "1:"), boxes=truth, geometries=both))
    assert wrong is not None and wrong < 0.2


# TRL -------------------------------------------------------------------------------------------


def rows(*samples: Sample) -> dict[str, list[Any]]:
    """The columns of a batch as TRL passes them, through JSON as a data set stores them."""
    made = [json.loads(json.dumps(columns(one, [GEOMETRY]))) for one in samples]
    return {name: [row[name] for row in made] for name in made[0]}


def test_trl_calls_it_with_strings_and_with_messages() -> None:
    perfect = render_boxes(TRUTH, GEOMETRY, "norm1000")
    vqa = Sample(id="q", task="vqa", messages=[{"role": "user", "content": "?"}], answer="yes")
    open_question = Sample(id="o", task="vqa", messages=vqa.messages, answer="left lung")
    texts = [perfect, "no", "left lung"]
    reward = trl_reward()
    batch = rows(LOCATE, vqa, open_question)
    for completions in (texts, [[{"role": "assistant", "content": text}] for text in texts]):
        values = reward(
            prompts=["p"] * 3,
            completions=completions,
            completion_ids=[[1]] * 3,
            trainer_state=None,
            **batch,
        )
        assert values == [pytest.approx(1, abs=0.01), 0.0, None]
    assert reward.__name__ == "medmo" and trl_reward({"iou": 1.0}).__name__ == "iou"


@pytest.mark.slow  # importing datasets takes 5 s
def test_rows_survive_a_table_of_mixed_tasks() -> None:
    datasets = pytest.importorskip("datasets", reason="TRL reads its rows from datasets")
    half = Box("WBC", 50.5, 10, 100, 60)
    nothing = Sample(id="n", task="locate", images=LOCATE.images, messages=LOCATE.messages)
    vqa = Sample(id="q", task="vqa", messages=LOCATE.messages, answer="B", choices=("x", "y"))
    samples = [LOCATE, nothing, replace(LOCATE, id="half", boxes=(half,)), vqa]
    table = datasets.Dataset.from_list([columns(one, [GEOMETRY]) for one in samples])
    texts = [render_boxes(one.boxes, GEOMETRY, "norm1000") or "None." for one in samples[:3]]
    found = trl_reward()(prompts=["p"] * 4, completions=[*texts, "B"], **table[:])
    assert found == [pytest.approx(1, abs=0.01)] * 4


def test_a_missing_column_is_named() -> None:
    with pytest.raises(SampleError, match="no column 'sample_id': make its rows with columns"):
        trl_reward()(prompts=["p"], completions=["x"])


def test_a_reward_that_raises_names_reward_and_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(case: Case) -> float:
        raise ValueError("no\nreason")

    monkeypatch.setitem(REWARDS, "iou", bad)
    message = (
        r"reward 'iou' failed on sample 'smear' \(ValueError: no reason\): put the sample right"
    )
    with pytest.raises(SampleError, match=message):
        trl_reward()(prompts=["p"], completions=["x"], **rows(LOCATE))
    monkeypatch.setitem(REWARDS, "iou", lambda case: 1.5)
    with pytest.raises(SampleError, match=r"reward 'iou' gave 1.5 on sample 'smear', not 0..1"):
        trl_reward()(prompts=["p"], completions=["x"], **rows(LOCATE))
    with pytest.raises(RecipeError, match="reward 'ious' is unknown: use box, iou"):
        combine(case("x"), {"ious": 1.0})
    truth = (Box("WBC", 1, 1, 2, 2, 3),)  # a picture that is not there
    with pytest.raises(SampleError, match=r"reward 'box' failed on sample 's1' \(IndexError"):
        judge("box", case("x", boxes=truth, geometries=(GEOMETRY,)))


def test_a_choice_may_be_given_as_letter_or_text() -> None:
    for answer in ("B", "b", "lung"):
        assert judge("option", case("B", answer=answer, choices=("liver", "lung"))) == 1
    for answer in ("E", "AB", ""):
        with pytest.raises(SampleError, match=f"sample .s1. .ValueError: its answer .{answer}. is"):
            judge("option", case("B", answer=answer, choices=("liver", "lung")))


def test_a_data_set_without_answers_for_a_reward_is_refused() -> None:
    cases = [case("", answer="yes"), case("", answer="left lung")]
    require_applicable({"yes_no": 1.0, "box": 0.0}, cases)
    with pytest.raises(RecipeError, match="reward 'option' applies to none of 2 samples"):
        require_applicable({"yes_no": 1.0, "option": 1.0}, cases)


def test_public_names_resolve() -> None:
    assert all(getattr(rewards, name) is not None for name in rewards.__all__)
