"""Views of scenes: boxes stay on their objects, which is checked on pixels, not on arithmetic."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medmo_edge.boxes import Box
from medmo_edge.preprocess import Preprocessing
from medmo_edge.train.scenes import (
    KEEP,
    Scene,
    augment,
    chest_scene,
    crop,
    mirror,
    recolour,
    transpose,
    upside_down,
    vary_resolution,
    visible_part,
)

LABELS = ("WBC", "RBC", "Platelets")
COLOURS = {"WBC": (250, 0, 0), "RBC": (0, 250, 0), "Platelets": (0, 0, 250)}


def painted(
    boxes: dict[str, tuple[int, int, int, int]], width: int = 90, height: int = 70
) -> Scene:
    """A black smear with each box filled in its label's colour."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for label, (x1, y1, x2, y2) in boxes.items():
        pixels[y1:y2, x1:x2] = COLOURS[label]
    found = tuple(Box(label, *xyxy) for label, xyxy in boxes.items())
    return Scene(kind="blood", pixels=pixels, boxes=found)


def colour_box(scene: Scene, label: str) -> tuple[int, ...]:
    """Where the label's colour is in the picture."""
    channel = scene.pixels.astype(int)[:, :, LABELS.index(label)]
    others = scene.pixels.astype(int).sum(axis=2) - channel
    rows, columns = np.nonzero(channel > others + 60)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


APART = {"WBC": (5, 8, 30, 28), "RBC": (40, 10, 62, 33), "Platelets": (50, 50, 58, 60)}


@pytest.mark.parametrize("turn", [mirror, upside_down, transpose])
def test_a_turn_moves_boxes_with_their_objects(turn: Callable[[Scene], Scene]) -> None:
    scene = painted(APART)
    turned = turn(scene)
    assert not np.array_equal(turned.pixels, scene.pixels)
    for box in turned.boxes:
        assert box.xyxy == colour_box(turned, box.label)
    back = turn(turned)
    assert np.array_equal(back.pixels, scene.pixels) and back.boxes == scene.boxes


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_any_view_keeps_boxes_on_their_objects(seed: int) -> None:
    view = augment(painted(APART), np.random.default_rng(seed))
    height, width = view.pixels.shape[:2]
    for box in view.boxes:
        assert 0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height
        assert box.xyxy == colour_box(view, box.label)


@settings(max_examples=100)
@given(
    x=st.integers(0, 60), y=st.integers(0, 50), across=st.integers(5, 90), down=st.integers(5, 70)
)
def test_a_crop_cuts_boxes_at_its_edge_and_drops_what_is_mostly_outside(
    x: int, y: int, across: int, down: int
) -> None:
    assume(x + across <= 90 and y + down <= 70)
    scene, window = painted(APART), (x, y, x + across, y + down)
    cut = crop(scene, window)
    assert cut.pixels.shape == (down, across, 3)
    kept = {box.label for box in cut.boxes}
    assert kept == {box.label for box in scene.boxes if visible_part(box, window) >= KEEP}
    for box in cut.boxes:
        assert box.xyxy == colour_box(cut, box.label)


def test_the_visible_part() -> None:
    box = Box("WBC", 10, 10, 20, 30)
    assert visible_part(box, (0, 0, 100, 100)) == 1
    assert visible_part(box, (15, 0, 100, 100)) == 0.5
    assert visible_part(box, (15, 20, 100, 100)) == 0.25
    assert visible_part(box, (20, 0, 100, 100)) == 0


def test_smears_with_and_without_a_white_cell_are_seen_in_like_sizes() -> None:
    """Else the size of a view would tell whether there is a white cell."""
    boxes = {"WBC": (20, 20, 45, 42)}
    scene = painted(boxes, width=160, height=120)
    views = [augment(scene, np.random.default_rng(seed)) for seed in range(600)]
    parts = [view.pixels.shape[0] * view.pixels.shape[1] / (160 * 120) for view in views]
    present = np.array([view.count("WBC") > 0 for view in views])
    assert 0.15 < np.mean(~present) < 0.5
    small = np.array(parts) < 0.5
    assert present[small].mean() > 0.3 and (~present)[small].mean() > 0.3


def test_views_around_a_platelet_show_it_larger_and_not_always() -> None:
    scene = painted({"Platelets": (60, 50, 66, 57)}, width=160, height=120)
    (whole,) = scene.boxes
    views = [augment(scene, np.random.default_rng(seed), "Platelets") for seed in range(400)]
    sizes = [
        box.area / (view.pixels.size / 3) for view in views for box in view.labelled("Platelets")
    ]
    assert 0.6 < len(sizes) / len(views) < 0.85
    assert np.median(sizes) > 1.5 * whole.area / (160 * 120)
    assert max(sizes) > 6 * whole.area / (160 * 120)


def test_a_chest_is_never_turned() -> None:
    """The heart stays on the picture's right of the middle, where the phantom put it."""
    for seed in range(20):
        scene = chest_scene(seed)
        view = augment(scene, np.random.default_rng(seed))
        (heart,) = view.labelled("heart")
        (before,) = scene.labelled("heart")
        assert heart.x2 - heart.x1 <= before.x2 - before.x1 + 1e-6
        centre = (heart.x1 + heart.x2) / 2 / view.pixels.shape[1]
        assert 0.4 < centre < 0.75
        assert (heart.y1 + heart.y2) / 2 > 0.5 * view.pixels.shape[0]


def test_colours_change_and_boxes_do_not() -> None:
    scene = chest_scene(1)
    changed = recolour(scene, np.random.default_rng(0), tint=0.07)
    assert changed.boxes == scene.boxes
    assert not np.array_equal(changed.pixels, scene.pixels)
    order = np.argsort(scene.pixels[:, :, 0].ravel(), kind="stable")
    assert (np.diff(changed.pixels[:, :, 0].ravel()[order].astype(int)) >= 0).all()


def test_resolution_varies_within_its_limits() -> None:
    limits = Preprocessing(min_pixels=20_000, max_pixels=80_000)
    drawn = [vary_resolution(limits, np.random.default_rng(seed)) for seed in range(50)]
    assert {one.min_pixels for one in drawn} == {20_000}
    assert all(20_000 <= one.max_pixels <= 80_000 for one in drawn)
    assert 10 < sum(one == limits for one in drawn) < 40
