"""Scores against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.evaluation.scores import (
    ImageMatch,
    answer_score,
    bootstrap,
    box_score,
    match_image,
    normalise,
)

SQUARE = (0.0, 0.0, 10.0, 10.0)
HALF = (0.0, 0.0, 10.0, 5.0)  # IoU with SQUARE 50 / 100
SHIFTED = (5.0, 0.0, 15.0, 10.0)  # IoU with SQUARE 50 / 150
FAR = (100.0, 100.0, 110.0, 110.0)


@pytest.mark.parametrize(
    ("truth", "predicted", "ious", "false_positives"),
    [
        ([SQUARE], [SQUARE], (1.0,), 0),
        ([SQUARE], [HALF], (0.5,), 0),
        ([SQUARE], [SHIFTED], (1 / 3,), 0),
        ([SQUARE], [FAR], (0.0,), 1),
        ([SQUARE], [], (0.0,), 0),
        ([], [SQUARE, FAR], (), 2),
        ([], [], (), 0),
        # One truth box is served once: the better of two predictions, the other is too many.
        ([SQUARE], [SHIFTED, HALF], (0.5,), 1),
        # Greedy pairing would give SQUARE its perfect partner and leave SHIFTED with HALF's 0.2.
        ([SHIFTED, SQUARE], [SQUARE, HALF], (0.2, 1.0), 0),
        ([SQUARE, FAR], [FAR], (0.0, 1.0), 0),
    ],
)
def test_one_image(
    truth: list[tuple[float, ...]],
    predicted: list[tuple[float, ...]],
    ious: tuple[float, ...],
    false_positives: int,
) -> None:
    found = match_image(truth, predicted)
    assert found.ious == pytest.approx(ious)
    assert found.false_positives == false_positives


def test_boxes_count_alike_whatever_image_they_are_in() -> None:
    score = box_score(
        [
            ImageMatch(ious=(0.8, 0.6), false_positives=0),
            ImageMatch(ious=(0.1,), false_positives=2),
            ImageMatch(ious=(), false_positives=1),
        ]
    )
    assert score.mean_iou == pytest.approx(0.5)
    assert (score.at_50, score.at_75) == pytest.approx((2 / 3, 1 / 3))
    assert (score.false_positives, score.num_truth, score.num_images) == (3, 3, 3)


def test_thresholds_include_their_value() -> None:
    score = box_score([ImageMatch(ious=(0.5, 0.75), false_positives=0)])
    assert (score.at_50, score.at_75) == (1.0, 0.5)


def test_without_truth_boxes_only_false_positives_are_known() -> None:
    score = box_score([ImageMatch(ious=(), false_positives=4)])
    assert math.isnan(score.mean_iou) and math.isnan(score.at_50)
    assert score.false_positives == 4


def test_the_interval_narrows_with_more_images() -> None:
    few = [ImageMatch(ious=(value,), false_positives=0) for value in (0.2, 0.8)] * 5
    low, high = box_score(few).interval
    low_many, high_many = box_score(few * 20).interval
    assert low < 0.5 < high and low_many < 0.5 < high_many
    assert high_many - low_many < (high - low) / 3


def test_yes_and_no_against_the_majority() -> None:
    truth = ["Yes.", "Yes.", "Yes.", "No."]
    score = answer_score(truth, ["yes", "No, it is clear.", "Yes.", "No."])
    assert score.accuracy == 0.75
    assert (score.baseline, score.baseline_answer, score.num_answers) == (0.75, "yes", 4)
    assert score.interval[0] < 0.75 < score.interval[1]


@pytest.mark.parametrize("text", ["Yes.", "yes", " YES! ", "Yes, there is one.", "yes\nindeed"])
def test_forms_of_one_answer(text: str) -> None:
    assert normalise(text) == "yes"


def test_the_bootstrap_repeats_itself_and_brackets_a_known_spread() -> None:
    values = [0.0] * 50 + [1.0] * 50

    def mean(drawn: object) -> float:
        return sum(values[i] for i in drawn) / len(values)  # type: ignore[attr-defined]

    low, high = bootstrap(mean, len(values))
    assert (low, high) == bootstrap(mean, len(values))
    # Binomial, n = 100, p = 1/2: plus or minus 1.96 * 0.05.
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.015)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), max_size=6),
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), max_size=6),
)
def test_the_order_of_boxes_does_not_matter(
    truth: list[tuple[float, float]], predicted: list[tuple[float, float]]
) -> None:
    real = [(x, y, x + 10, y + 8) for x, y in truth]
    said = [(x, y, x + 10, y + 8) for x, y in predicted]
    one, other = match_image(real, said), match_image(real[::-1], said[::-1])
    assert sum(one.ious) == pytest.approx(sum(other.ious))
    assert one.false_positives >= len(said) - len(real)
