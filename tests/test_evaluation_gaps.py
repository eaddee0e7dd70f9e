"""Gaps, truth scores, retention and gates: against values worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.boxes import Box
from medmo_edge.errors import UsageError
from medmo_edge.evaluation.gaps import (
    APART,
    Gap,
    LogitGap,
    box_agreement,
    feature_gaps,
    first_difference,
    logit_gap,
    margins,
    patch_difference,
)
from medmo_edge.evaluation.gates import read_gates
from medmo_edge.evaluation.measure import Record, read_journal
from medmo_edge.evaluation.retention import pictures_needed, retention
from medmo_edge.evaluation.stages import Measured, WeightGap, first_failure, judge, overall
from medmo_edge.evaluation.truth import Score, score
from medmo_edge.samples import Sample


def floats(*rows: Any) -> Any:
    """An array of float32."""
    return np.array(rows, np.float32)


def test_feature_gaps_see_direction_and_length_of_every_level() -> None:
    base = floats([3, 4, 1, 0], [0, 2, 0, 1])  # two levels of two columns, two tokens
    side = floats([3, 4, 0, 1], [0, 4, 0, 1])  # token 2 twice as long, level 2 turned in token 1
    first, second = feature_gaps([side], [base], 2)
    assert first.worst_cosine == pytest.approx(1) and first.worst_error == pytest.approx(1)
    assert first.mean_error == pytest.approx(0.5)
    assert second.worst_cosine == pytest.approx(0) and second.mean_cosine == pytest.approx(0.5)
    assert second.worst_error == pytest.approx(math.sqrt(2))


def test_what_cannot_be_compared_is_apart() -> None:
    one, other = floats([1, 2]), floats([1, 2], [3, 4])
    assert feature_gaps([one], [other], 1)[0].worst_error == APART
    assert feature_gaps([floats([np.nan, 2])], [one], 1)[0].mean_error == APART
    assert patch_difference([one], [other]) == APART
    assert logit_gap(one, other).mean_kl == APART
    assert logit_gap(floats([np.nan, 2]), one).max_difference == APART
    assert feature_gaps([], [], 3) == () and patch_difference([], []) == 0


def test_logit_gap_is_kl_from_the_base_in_nats() -> None:
    base, side = floats([math.log(3), 0.0]), floats([0.0, 0.0])
    found = logit_gap(side, base)
    assert found.mean_kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found.max_difference == pytest.approx(math.log(3)) and found.top1 == 1.0
    assert logit_gap(floats([0.0, 1.0]), base).top1 == 0.0
    assert margins(floats([5, 1, 3], [2, 2, 0])).tolist() == [2, 0]


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_first_difference_is_where_the_common_beginning_ends(a: list[int], b: list[int]) -> None:
    first = first_difference(a, b)
    if first is None:
        assert a == b
    else:
        assert a[:first] == b[:first] and a[first : first + 1] != b[first : first + 1]


def test_boxes_agree_by_image_and_label_and_a_lonely_one_counts_nothing() -> None:
    one, other = Box("Nodule", 0, 0, 10, 10), Box("nodule", 0, 0, 10, 5)
    assert box_agreement([one], [other]) == pytest.approx(0.5)
    assert box_agreement([one], [replace(other, image=1)]) == 0
    assert box_agreement([one, other], [one]) == pytest.approx(0.5)
    assert box_agreement([], []) is None


def sample(task: str, **values: Any) -> Sample:
    """A sample without message, which scoring does not read."""
    return Sample(id="s", task=task, **values)


def test_answers_are_right_or_wrong_and_boxes_have_their_overlap() -> None:
    box = Box("nodule", 0, 0, 10, 10)
    half = score(sample("locate", boxes=(box, replace(box, x2=20))), "", [box])
    assert half == Score(kind="boxes", value=1.0, weight=2.0)
    assert score(sample("locate"), "None.", []) == Score(kind="answers", value=1, weight=1)
    assert score(sample("locate"), "", [box]) == Score(kind="answers", value=0, weight=1)
    assert score(sample("vqa", answer="Yes"), "yes, there is", []) == Score(
        kind="answers", value=1, weight=1
    )
    options = {"answer": "B", "choices": ("lung", "heart")}
    for text, right in (("B", 1), ("(b)", 1), ("Heart.", 1), ("A", 0), ("lung", 0)):
        found = score(sample("text_qa", **options), text, [])
        assert found is not None and found.value == right, text
    assert score(sample("report", answer="clear lungs"), "clear lungs", []) is None


def gap_of(**changes: Any) -> Gap:
    """A gap without any difference."""
    nothing = LogitGap(mean_kl=0, max_kl=0, max_difference=0, top1=1)
    values: dict[str, Any] = {
        "features": feature_gaps([floats([1, 2])], [floats([1, 2])], 1),
        "prefill": nothing,
        "answer": nothing,
        "first_difference": None,
        "margin": None,
        "box_iou": 1.0,
    }
    return Gap(**(values | changes))


def record_of(number: int, kind: Any, artifact: float, **changes: Any) -> Record:
    """A record whose reference scores 1."""
    scores = {
        "reference": Score(kind=kind, value=1.0, weight=1.0),
        "artifact": Score(kind=kind, value=artifact, weight=1.0),
    }
    values: dict[str, Any] = {
        "id": f"{kind}-{number}",
        "picture": f"{number}.png",
        "task": "vqa",
        "num_tokens": 3,
        "patches": 0.0,
        "prompt_equal": True,
        "stability": 5.0,
        "complete": True,
        "whole": gap_of(),
        "runtime": gap_of(),
        "quantisation": None,
        "same_text_iou": 1.0,
        "rejected": (0, 0),
        "scores": scores,
    }
    return Record(**(values | changes))


def test_a_few_perfect_answers_do_not_prove_retention() -> None:
    few = [record_of(number, "answers", 1.0) for number in range(20)]
    kept = retention(few, "answers")
    assert kept is not None and kept.value == 1.0 and kept.pictures == 20
    assert 0.80 < kept.interval[0] < 0.90  # about 1 - 3 / 20
    needed = pictures_needed(few, "answers", 0.99)
    assert needed is not None and 250 <= needed <= 500  # the rule of three says 300
    many = [record_of(number, "answers", 1.0) for number in range(needed)]
    proved = retention(many, "answers")
    assert proved is not None and proved.interval[0] >= 0.99
    assert retention(few, "boxes") is None
    assert pictures_needed([record_of(0, "answers", 0.5)], "answers", 0.99) is None


def test_questions_about_one_picture_are_not_independent() -> None:
    spread = [record_of(number, "answers", 1.0) for number in range(60)]
    heaped = [replace(each, picture=str(n % 6)) for n, each in enumerate(spread)]
    wide, narrow = retention(heaped, "answers"), retention(spread, "answers")
    assert wide is not None and narrow is not None
    assert wide.interval[0] < narrow.interval[0] and wide.questions == narrow.questions == 60


def measured(records: list[Record], **changes: Any) -> Measured:
    """A sound f16 artifact."""
    values: dict[str, Any] = {
        "records": records,
        "weights": [WeightGap(name="w", stored_as="F16", scale=1.0, error=0.0)],
        "same_tokenizer": True,
        "target": "gguf-f16",
        "base_target": "gguf-f16",
    }
    return Measured(**(values | changes))


def many_records(count: int = 40, **changes: Any) -> list[Record]:
    """Perfect records of both kinds; 400 are enough for every gate."""
    return [
        record_of(number, kind, 1.0, **changes)
        for number in range(count)
        for kind in ("answers", "boxes")
    ]


def test_a_perfect_artifact_passes_only_with_enough_samples() -> None:
    gates = read_gates()
    assert overall(judge(measured(many_records(400)), gates)) == "pass"
    few = judge(measured(many_records()[:8]), gates)
    assert overall(few) == "undecided" and first_failure(few) is None
    undecided = [stage.name for stage in few if stage.verdict == "undecided"]
    assert undecided == ["agreement", "answers retained", "IoU retained"]
    assert all("not enough samples" in s.note for s in few if s.verdict == "undecided")


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("weights", {"weights": [WeightGap(name="w", stored_as="F16", scale=1.05, error=0.05)]}),
        ("tokenizer", {"same_tokenizer": False}),
    ],
)
def test_each_wrong_file_fails_its_stage(stage: str, changes: dict[str, Any]) -> None:
    assert first_failure(judge(measured(many_records(), **changes), read_gates())) == stage


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("tokenizer", {"prompt_equal": False}),
        ("preprocessing", {"patches": 0.01}),
        ("boxes", {"same_text_iou": 0.9}),
        ("boxes", {"rejected": (0, 1)}),
        ("agreement", {"whole": gap_of(first_difference=1, margin=3.0)}),
        ("agreement", {"whole": gap_of(first_difference=1, margin=None)}),
    ],
)
def test_each_wrong_record_fails_its_stage(stage: str, changes: dict[str, Any]) -> None:
    assert first_failure(judge(measured(many_records(**changes)), read_gates())) == stage


def test_a_lost_score_fails_and_a_near_tie_is_no_disagreement() -> None:
    lost = [replace(r, scores=record_of(0, "boxes", 0.5).scores) for r in many_records()]
    assert first_failure(judge(measured(lost), read_gates())) == "IoU retained"
    tied = gap_of(first_difference=1, margin=0.001)
    records = [*many_records()[:40], *many_records(whole=tied)[40:]]
    (stage,) = (s for s in judge(measured(records), read_gates()) if s.name == "agreement")
    assert stage.verdict == "pass" and stage.figures["not_stable"] == 40


@pytest.mark.parametrize(("pictures", "verdict"), [(2, "undecided"), (12, "fail")])
def test_a_score_lost_on_two_pictures_proves_no_loss_yet(pictures: int, verdict: str) -> None:
    lost = [
        replace(one, picture=str(index), scores=record_of(0, "boxes", 0.5).scores)
        for index, one in enumerate(many_records()[:pictures])
    ]
    stages = {stage.name: stage for stage in judge(measured(lost), read_gates())}
    assert stages["IoU retained"].verdict == verdict


def test_nothing_passes_that_was_not_measured() -> None:
    no_boxes = [replace(each, same_text_iou=None, scores=None) for each in many_records()]
    stages = {stage.name: stage for stage in judge(measured(no_boxes), read_gates())}
    assert stages["boxes"].verdict == stages["IoU retained"].verdict == "undecided"
    blind = [replace(each, whole=gap_of(features=())) for each in many_records()]
    stages = {stage.name: stage for stage in judge(measured(blind), read_gates())}
    assert stages["vision"].verdict == stages["preprocessing"].verdict == "undecided"


def test_gates_are_changed_key_by_key_and_unknown_keys_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text("[four_bit]\nmin_iou_retained = 0.9\n[targets]\nq4_k_m = 'eight_bit'\n")
    gates = read_gates(file)
    assert gates.losses("gguf-q4_k_m").min_iou_retained == 0.99  # now of the stricter class
    assert gates.losses("onnx-int4").min_iou_retained == 0.9
    assert gates.losses("onnx-int4").min_answers_retained == 0.97  # the default stays
    for text, words in (
        ("[four_bit]\nmin_iou = 0.9\n", "unknown key four_bit.min_iou"),
        ("[four-bit]\n", "unknown section 'four-bit'"),
        ("[vision]\nmin_mean_cosine = '1'\n", "not a number"),
        ("[vision]\nmin_mean_cosine = true\n", "not a number"),
        ("[targets]\nq4_k_m = 'lax'\n", "class 'lax' is not one of"),
        ("[vision\n", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words.replace("[", r"\[")):
            read_gates(file)
    with pytest.raises(UsageError, match="no gate is set for target gguf-q2_k"):
        gates.losses("gguf-q2_k")


def test_default_gates_are_those_of_the_contract() -> None:
    gates = read_gates()
    for target in ("gguf-q8_0", "onnx-int8", "trt-fp8"):
        assert gates.losses(target).min_answers_retained == 0.99
        assert gates.losses(target).min_iou_retained == 0.99
    for target in ("gguf-q4_k_m", "onnx-int4", "gguf-iq4_xs"):
        assert gates.losses(target).min_answers_retained == 0.97
        assert gates.losses(target).min_iou_retained == 0.95
    assert {losses.min_agreement for losses in gates.classes.values()} == {0.95}
    assert gates.limits["boxes"]["min_valid"] == 1.0


def test_a_journal_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    records = [record_of(0, "answers", 1.0), record_of(1, "boxes", 0.5, quantisation=gap_of())]
    journal = tmp_path / "journal.jsonl"
    whole = "".join(record.to_json() + "\n" for record in records)
    journal.write_text(whole + records[0].to_json()[:-20])
    assert read_journal(journal) == records
    assert journal.read_text() == whole
    assert read_journal(tmp_path / "none.jsonl") == []
