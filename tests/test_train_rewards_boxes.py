"""Box rewards: values computed by hand, the properties all must have, and the ways to cheat."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medmo_edge.boxes import XYXY, Box, Geometry, format_boxes, giou, iou, render_boxes
from medmo_edge.train.rewards_boxes import (
    FLOOR,
    box_reward,
    count_reward,
    distinct_reward,
    format_reward,
    iou_reward,
    label_reward,
    labelled_box_reward,
)

SIZE = (30.0, 40.0)  # diagonal 50
ON_BOXES = (
    iou_reward,
    label_reward,
    count_reward,
    distinct_reward,
    lambda found, wanted: labelled_box_reward(found, wanted, sizes=[(100, 100)] * 2),
    lambda found, wanted: labelled_box_reward(found, wanted, sizes=[(100, 100)] * 2, floor=FLOOR),
)
Reward = Callable[[Sequence[Box], Sequence[Box]], float]


def boxes_of(*rows: XYXY, label: str = "WBC", image: int = 0) -> list[Box]:
    return [Box(label, *row, image) for row in rows]


def box_strategy() -> st.SearchStrategy[Box]:
    start, side = st.integers(0, 60), st.integers(1, 40)
    corners = st.tuples(start, start, side, side)
    labels = st.sampled_from(["WBC", "RBC"])
    return st.builds(
        lambda c, label, image: Box(label, c[0], c[1], c[0] + c[2], c[1] + c[3], image),
        corners,
        labels,
        st.integers(0, 1),
    )


BOXES = st.lists(box_strategy(), max_size=5)

# By hand ---------------------------------------------------------------------------------------


def test_the_papers_formula_on_one_pair() -> None:
    # L1 = (5 + 0 + 5 + 0) / (2 * 50) = 0.1; IoU = 50 / 150; the hull is the union: GIoU = 1/3.
    # (5 * 0.9 + 2 * (4/3) / 2) / 7 = 35 / 42
    assert box_reward([(5, 0, 15, 10)], [(0, 0, 10, 10)], size=SIZE) == pytest.approx(35 / 42)
    # Apart: L1 = 40 / 100, hull 30 x 10, union 200: GIoU = -1/3; (5 * 0.6 + 2/3) / 7 = 11 / 21
    assert box_reward([(20, 0, 30, 10)], [(0, 0, 10, 10)], size=SIZE) == pytest.approx(11 / 21)
    assert box_reward([(20, 0, 30, 10)], [(0, 0, 10, 10)], size=SIZE, floor=0.5) == pytest.approx(
        1 / 21
    )


def test_missing_and_superfluous_boxes_cost_their_weights() -> None:
    a, b = (0.0, 0.0, 10.0, 10.0), (15.0, 20.0, 25.0, 38.0)
    assert box_reward([a], [a, b], size=SIZE) == pytest.approx(1 / 2 - 0.5 / 2)
    assert box_reward([a], [a, b], size=SIZE, fn_weight=0) == pytest.approx(1 / 2)
    assert box_reward([a, b], [a], size=SIZE) == pytest.approx(1 - 0.5)
    assert box_reward([a, b], [a], size=SIZE, fp_weight=0) == 1
    assert box_reward([a, b], [a], size=SIZE, fp_weight=0.2) == pytest.approx(0.8)
    assert box_reward([a, b, b, b], [a], size=SIZE) == 0  # not below


def test_nothing_to_find_and_boxes_that_are_none() -> None:
    a, flat, nan = (0.0, 0.0, 10.0, 10.0), (5.0, 5.0, 5.0, 9.0), (0.0, 0.0, float("nan"), 9.0)
    assert box_reward([], [], size=SIZE) == 1
    assert box_reward([a], [], size=SIZE) == 0
    assert box_reward([], [a], size=SIZE) == 0
    assert box_reward([a, flat], [a], size=SIZE) == pytest.approx(0.5)  # one too many
    assert box_reward([nan], [a], size=SIZE) == 0
    assert box_reward([a], [a, flat], size=SIZE) == 1  # a label without area is no label
    assert box_reward([], [flat], size=SIZE) == 1


def test_the_pairing_is_the_best_one() -> None:
    """Against all pairings, with GIoU and IoU from the core's scalar functions."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        low = rng.integers(0, 20, (2, 3, 2))
        rows = np.concatenate([low, low + rng.integers(1, 10, (2, 3, 2))], axis=2).astype(float)
        truth, found = ([(a, b, c, d) for a, b, c, d in part] for part in rows)

        def cost_and_score(a: XYXY, b: XYXY) -> tuple[float, float]:
            l1 = sum(abs(p - q) for p, q in zip(a, b, strict=True)) / 100
            return 5 * l1 + 2 * (1 - giou(a, b)), (5 * (1 - l1) + giou(a, b) + 1) / 7

        pairings = [
            [cost_and_score(a, found[j]) for a, j in zip(truth, order, strict=True)]
            for order in itertools.permutations(range(3))
        ]
        best = min(pairings, key=lambda pairs: sum(cost for cost, _ in pairs))
        wanted = sum(score for _, score in best) / 3
        assert box_reward(found, truth, size=SIZE) == pytest.approx(wanted)


def test_labels_and_pictures_are_kept_apart() -> None:
    a, b = (0.0, 0.0, 10.0, 10.0), (15.0, 20.0, 25.0, 38.0)
    truth = [*boxes_of(a), *boxes_of(b, label="RBC"), *boxes_of(a, image=1)]
    sizes = [SIZE, SIZE]
    assert labelled_box_reward(truth, truth, sizes=sizes) == 1
    assert labelled_box_reward(boxes_of(a, label=" wbc "), boxes_of(a), sizes=sizes) == 1
    swapped = [*boxes_of(a, label="RBC"), *boxes_of(b), *boxes_of(a, image=1)]
    wanted = []  # two pairs of the wrong place, one right
    for x, y in ((b, a), (a, b)):
        l1 = sum(abs(p - q) for p, q in zip(x, y, strict=True)) / 100
        wanted.append((5 * (1 - l1) + giou(x, y) + 1) / 7)
    found = labelled_box_reward(swapped, truth, sizes=sizes)
    assert found == pytest.approx((1 + sum(wanted)) / 3)
    # Another picture: one matched, one missing, one too many.
    elsewhere = [*boxes_of(a), *boxes_of(b, image=1)]
    found = labelled_box_reward(elsewhere, boxes_of(a, b), sizes=sizes)
    assert found == pytest.approx((1 - 0.5 - 0.5) / 2)


def test_overlap_label_count_and_repetition_by_hand() -> None:
    a, b = (0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)  # IoU 1/3
    assert iou_reward(boxes_of(b), boxes_of(a)) == pytest.approx(1 / 3)
    assert iou_reward(boxes_of(b), boxes_of(a), threshold=0.5) == 0
    assert iou_reward(boxes_of(a, (50, 50, 60, 60)), boxes_of(a)) == pytest.approx(1 / 2)
    assert iou_reward([], []) == label_reward([], []) == count_reward([], []) == 1
    two = [*boxes_of(a), *boxes_of((50, 50, 60, 60), label="RBC")]
    assert label_reward(boxes_of(a, (50, 50, 60, 60)), two) == pytest.approx(1 / 2)
    assert label_reward(boxes_of((0, 0, 100, 100)), boxes_of((5, 5, 20, 20))) == 0  # IoU 0.02
    assert count_reward(boxes_of(a, a, a), two) == pytest.approx(1 / 4)  # WBC 3:1, RBC 0:1
    # 0.2 is free: (1/3 - 0.2) / 0.8 of each of the two
    assert distinct_reward(boxes_of(a, b), boxes_of(a)) == pytest.approx(1 - (1 / 3 - 0.2) / 0.8)
    assert distinct_reward(boxes_of(a, b), boxes_of(a, b)) == 1  # the truth overlaps as much
    assert distinct_reward(boxes_of(a, a, a), boxes_of(a)) == 0


# Properties ------------------------------------------------------------------------------------


@given(BOXES, BOXES, st.randoms())
def test_rewards_stay_in_range_and_ignore_the_order(
    found: list[Box], wanted: list[Box], random: object
) -> None:
    for reward in ON_BOXES:
        value = reward(found, wanted)
        assert 0 <= value <= 1
        for boxes in (found, wanted):
            shuffled = list(boxes)
            random.shuffle(shuffled)  # type: ignore[attr-defined]
            again = reward(shuffled, wanted) if boxes is found else reward(found, shuffled)
            assert again == pytest.approx(value, abs=1e-6)


@given(BOXES)
def test_the_perfect_answer_earns_one(wanted: list[Box]) -> None:
    for reward in ON_BOXES:
        assert reward(wanted, wanted) == pytest.approx(1)


@given(BOXES)
def test_an_empty_answer_earns_nothing(wanted: list[Box]) -> None:
    assume(wanted)
    for reward in ON_BOXES:
        assert reward([], wanted) == 0


@given(
    st.integers(1, 60), st.integers(1, 60), st.lists(st.integers(-99, 99), min_size=2, max_size=6)
)
def test_a_better_overlap_never_earns_less(width: int, height: int, shifts: list[int]) -> None:
    """Boxes of one size, moved along one axis: the IoU orders the rewards."""
    truth = Box("WBC", 200, 200, 200 + width, 200 + height)
    moved = [Box("WBC", 200 + s, 200, 200 + s + width, 200 + height) for s in shifts]
    moved.sort(key=lambda box: iou(box.xyxy, truth.xyxy))
    size = (500.0, 500.0)
    by_overlap: list[list[float]] = [
        [iou_reward([box], [truth]) for box in moved],
        [box_reward([box.xyxy], [truth.xyxy], size=size) for box in moved],
        [box_reward([box.xyxy], [truth.xyxy], size=size, floor=FLOOR) for box in moved],
    ]
    for rewards in by_overlap:
        for (first, second), (worse, better) in zip(
            itertools.pairwise(moved), itertools.pairwise(rewards), strict=True
        ):
            if iou(first.xyxy, truth.xyxy) < iou(second.xyxy, truth.xyxy):
                assert worse <= better + 1e-9


@given(BOXES, box_strategy())
def test_one_box_more_than_there_are_never_pays(wanted: list[Box], extra: Box) -> None:
    """Why the penalties are half a match: the best a further guess can gain is less."""
    assume(wanted)
    sizes = [(100.0, 100.0)] * 2
    for floor in (0.0, FLOOR):
        honest = labelled_box_reward(wanted, wanted, sizes=sizes, floor=floor)
        greedy = labelled_box_reward([*wanted, extra], wanted, sizes=sizes, floor=floor)
        assert greedy < honest


# The form --------------------------------------------------------------------------------------

GEOMETRY = Geometry(
    width=50, height=100, frame_width=50, frame_height=100, resized_width=64, resized_height=96
)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("WBC <box>[[1, 2, 30, 40]]</box>", 1),
        (" WBC <box>[[1,2,30,40],[5, 6, 7, 8]]</box>, RBC <box> [[0, 0, 1000, 1000]] </box>.\n", 1),
        ("WBC <box>[[1, 2, 30, 40]]</box> is what I see", 0),
        ("WBC <box>[[1, 2, 30, 40]]", 0),
        ("<box>[[1, 2, 30, 40]]</box>", 0),
        ("WBC <box>[1, 2, 30, 40]</box>", 0),
        ("WBC <box>[[1, 2, 30]]</box>", 0),
        ("WBC <box>[[0.1, 0.2, 0.3, 0.4]]</box>", 0),
        ("WBC <box>[[30, 2, 1, 40]]</box>", 0),
        ("WBC <box>[[1, 2, 1, 40]]</box>", 0),
        ("WBC <box>[[1, 2, 30, 4000]]</box>", 0),
        ("WBC <box>[]</box>", 0),
        ("WBC", 0),
        ("", 0),
        ("<box>" * 500, 0),
    ],
)
def test_the_form_of_an_answer(text: str, score: float) -> None:
    truth = boxes_of((1, 2, 3, 4))
    assert format_reward(text, truth, geometries=[GEOMETRY], coords="norm1000") == score


def test_the_form_where_there_is_nothing_to_find() -> None:
    def form(text: str) -> float:
        return format_reward(text, [], geometries=[GEOMETRY], coords="norm1000")

    assert form("None.") == form("No WBC found.") == 1
    assert form(" ") == form("WBC <box>[[1, 2, 3, 4]]</box>") == form("<box>") == 0


@given(st.lists(box_strategy(), min_size=1, max_size=5))
def test_what_training_renders_has_the_form(boxes: list[Box]) -> None:
    one = [Box(box.label, *box.xyxy) for box in boxes]
    text = render_boxes(one, GEOMETRY, "norm1000")
    assert format_reward(text, one, geometries=[GEOMETRY], coords="norm1000") == 1


def test_a_hostile_answer_is_judged_in_time() -> None:
    """Ten thousand boxes against fifty, and tags that never close."""
    truth = boxes_of(*((i, i, i + 3.0, i + 3.0) for i in range(50)))
    many = [(i % 900, i // 12, i % 900 + 9, i // 12 + 9) for i in range(10_000)]
    found = boxes_of(*many)
    assert labelled_box_reward(found, truth, sizes=[(1000, 1000)]) == 0
    for text in ("WBC <box>[[" * 20_000, "WBC " * 50_000, format_boxes("WBC", many)):
        format_reward(text, truth, geometries=[GEOMETRY], coords="norm1000")
