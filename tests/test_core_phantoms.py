"""Drawn radiographs: the same for the same seed, and their boxes and facts true to the pixels."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmo_edge.phantoms import CLEAR_NODULE, EFFUSION, HEART, MIN_SIDE, NODULE, Phantom, draw

SEEDS = range(12)


def difference(one: Phantom, other: Phantom) -> NDArray[np.int64]:
    return np.abs(one.pixels.astype(np.int64) - other.pixels.astype(np.int64))


def test_one_seed_is_one_picture_and_two_seeds_are_two() -> None:
    first, again, other = draw(3), draw(3), draw(4)
    assert np.array_equal(first.pixels, again.pixels)
    assert (first.boxes, first.anatomy, first.facts) == (again.boxes, again.anatomy, again.facts)
    assert not np.array_equal(first.pixels, other.pixels)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**63),
    width=st.integers(MIN_SIDE, 260),
    height=st.integers(MIN_SIDE, 260),
)
@example(seed=0, width=183, height=64)
def test_any_seed_and_size_gives_a_picture_with_boxes_inside(
    seed: int, width: int, height: int
) -> None:
    phantom = draw(seed, size=(width, height), nodule=True, effusion=True)
    assert phantom.pixels.shape == (height, width) and phantom.pixels.dtype == np.uint8
    assert phantom.pixels.std() > 20
    for box in phantom.boxes + phantom.anatomy:
        assert 0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height


@pytest.mark.parametrize("seed", SEEDS)
def test_the_nodule_is_inside_its_box_and_nothing_of_it_outside(seed: int) -> None:
    with_nodule = draw(seed, size=(240, 260), nodule=True, effusion=False)
    changed = difference(with_nodule, draw(seed, size=(240, 260), nodule=False, effusion=False)) > 0
    (box,) = with_nodule.boxes
    rows, columns = np.nonzero(changed)
    assert box.label == NODULE and len(rows) > 300
    assert columns.min() >= box.x1 - 1 and columns.max() < box.x2 + 1
    assert rows.min() >= box.y1 - 1 and rows.max() < box.y2 + 1
    # Tight as well: the visible lesion reaches nearly to each side of its box.
    assert np.ptp(columns) + 1 > 0.85 * (box.x2 - box.x1)
    assert np.ptp(rows) + 1 > 0.85 * (box.y2 - box.y1)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_effusion_box_holds_the_fluid(seed: int) -> None:
    wet = draw(seed, size=(240, 260), nodule=False, effusion=True)
    change = difference(wet, draw(seed, size=(240, 260), nodule=False, effusion=False))
    (box,) = wet.boxes
    x1, y1, x2, y2 = (int(value) for value in box.xyxy)
    assert box.label == EFFUSION
    assert change[y1:y2, x1:x2].sum() > 0.95 * change.sum() > 0
    # Behind the heart fluid shows by a few levels only, and still counts.
    columns, rows = change[y1:y2].max(axis=0) > 1, change[:, x1:x2].max(axis=1) > 1
    assert columns.sum() > 0.9 * (x2 - x1) and rows.sum() > 0.9 * (y2 - y1)


def test_a_clear_nodule_is_bright_and_as_large_as_promised() -> None:
    for seed in SEEDS:
        phantom = draw(seed, size=(240, 260), nodule=True, effusion=False)
        healthy = draw(seed, size=(240, 260), nodule=False, effusion=False)
        (box,) = phantom.boxes
        middle = (int((box.y1 + box.y2) / 2), int((box.x1 + box.x2) / 2))
        assert int(phantom.pixels[middle]) - int(healthy.pixels[middle]) > 25
        across = (box.x2 - box.x1) / 240
        assert CLEAR_NODULE[0] <= across <= CLEAR_NODULE[1] and across >= 1 / 8


def test_the_diameter_can_be_chosen() -> None:
    phantom = draw(5, size=(400, 400), nodule=True, nodule_diameter=(0.05, 0.06))
    across = next((box.x2 - box.x1) / 400 for box in phantom.boxes if box.label == NODULE)
    assert 0.05 <= across <= 0.06


def test_facts_agree_with_the_boxes_and_with_what_was_asked_for() -> None:
    for seed in range(40):
        phantom = draw(seed, size=(96, 96))
        labels = [box.label for box in phantom.boxes]
        assert phantom.facts["nodules"] == labels.count(NODULE)
        assert phantom.facts["effusions"] == labels.count(EFFUSION)
        assert phantom.facts["heart_enlarged"] == (phantom.facts["cardiothoracic_ratio"] > 0.5)
        assert [box.label for box in phantom.anatomy] == [HEART]
    assert draw(1, size=(96, 96), heart_enlarged=True).facts["heart_enlarged"] is True
    assert draw(1, size=(96, 96), nodule=False, effusion=False).boxes == ()


def test_findings_come_about_as_often_as_promised() -> None:
    facts = [draw(seed, size=(64, 64)).facts for seed in range(300)]
    share = {name: np.mean([fact[name] for fact in facts]) for name in facts[0]}
    assert share["nodules"] == pytest.approx(1 / 2, abs=0.1)
    assert share["effusions"] == pytest.approx(1 / 3, abs=0.1)
    assert share["heart_enlarged"] == pytest.approx(1 / 3, abs=0.1)


def test_the_size_changes_the_sharpness_but_not_the_chest() -> None:
    small = draw(9, size=(128, 144), nodule=True)
    large = draw(9, size=(512, 576), nodule=True)
    assert large.facts == small.facts
    for one, four in zip(small.boxes, large.boxes, strict=True):
        assert np.allclose(np.array(four.xyxy) / 4, one.xyxy, atol=1.5)


def test_a_picture_too_small_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 64 pixels a side, not 63 x 200"):
        draw(0, size=(63, 200))


def test_a_phantom_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        draw(0, size=(64, 64)).seed = 1  # type: ignore[misc]
