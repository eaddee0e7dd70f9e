"""Views: boxes stay on what they frame, and no view makes a text untrue."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.boxes import Box
from medmo_edge.images import Frame
from medmo_edge.prompts import user_message
from medmo_edge.samples import Sample
from medmo_edge.train.views import view

Sides = st.integers(20, 60)


def picture(height: int, width: int, boxes: tuple[Box, ...]) -> Frame:
    """Grey, with the n-th box in the colour n + 1."""
    pixels = np.full((height, width, 3), 200, np.uint8)
    for number, box in enumerate(boxes):
        pixels[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = number + 1
    return Frame.from_pixels(pixels)


def sample(text: str, boxes: tuple[Box, ...] = (), task: str = "locate") -> Sample:
    messages = [user_message(text, 1)]
    return Sample(id="a", task=task, images=(Path("a.png"),), messages=messages, boxes=boxes)


def views(one: Sample, frame: Frame, count: int = 60) -> list[tuple[Sample, Frame]]:
    made = [view(one, [frame], np.random.default_rng(seed)) for seed in range(count)]
    return [(seen, frames[0]) for seen, frames in made]


@given(height=Sides, width=Sides, seed=st.integers(0, 999), data=st.data())
def test_boxes_frame_what_they_framed(
    height: int, width: int, seed: int, data: st.DataObject
) -> None:
    half = width // 2  # one box in each half, so that they do not overlap
    boxes = []
    for left, right in ((0, half), (half, width)):
        x1 = data.draw(st.integers(left, right - 1))
        y1 = data.draw(st.integers(0, height - 1))
        x2 = data.draw(st.integers(x1 + 1, right))
        boxes.append(Box("mass", x1, y1, x2, data.draw(st.integers(y1 + 1, height))))
    one = sample("Locate the mass.", tuple(boxes))
    frame = picture(height, width, one.boxes)
    seen, (shown,) = view(one, [frame], np.random.default_rng(seed))
    assert len(seen.boxes) == 2
    for number, box in enumerate(seen.boxes):
        expected = np.zeros(shown.pixels.shape[:2], np.bool_)
        expected[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = True
        assert np.array_equal((shown.pixels == number + 1).all(axis=2), expected)
    assert (shown.source.height, shown.source.width) == shown.pixels.shape[:2]


@given(height=Sides, width=Sides, seed=st.integers(0, 999))
def test_sizes_alone_give_the_same_view(height: int, width: int, seed: int) -> None:
    one = sample("Locate the mass.", (Box("mass", 3, 4, 15, 17),))
    frame = picture(height, width, one.boxes)
    hollow = Frame(np.broadcast_to(np.uint8(0), frame.pixels.shape), frame.source)
    seen, (shown,) = view(one, [frame], np.random.default_rng(seed))
    planned, (outline,) = view(one, [hollow], np.random.default_rng(seed))
    assert planned == seen and outline.pixels.shape == shown.pixels.shape


def corners(frame: Frame) -> tuple[int, int]:
    """Which corner of a picture of four different quarters is at the top left and right."""
    return int(frame.pixels[0, 0, 0]), int(frame.pixels[0, -1, 0])


@pytest.fixture()
def quarters() -> Frame:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30], pixels[20:, 30:] = 1, 2, 3, 4
    return Frame.from_pixels(pixels)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("What is this?", {(1, 2), (2, 1), (3, 4), (4, 3), (1, 3), (2, 4), (3, 1), (4, 2)}),
        ("Is the left lung clear?", {(1, 2), (3, 4)}),
        ("Is it in the RIGHT_lobe?", {(1, 2), (3, 4)}),
        ("\u5de6\u80ba", {(1, 2), (3, 4)}),
        (
            "Which quarter is brightly lit?",
            {(1, 2), (2, 1), (3, 4), (4, 3), (1, 3), (2, 4), (3, 1), (4, 2)},
        ),
        ("Is there fluid at the base?", {(1, 2), (2, 1)}),
        ("Is there an apical scar?", {(1, 2), (2, 1)}),
        ("Is the upper left lobe clear?", {(1, 2)}),
        ("What is at 12, 40?", {(1, 2)}),
    ],
)
def test_texts_forbid_views_that_make_them_untrue(
    quarters: Frame, text: str, allowed: set[tuple[int, int]]
) -> None:
    made = views(sample(text, task="vqa"), quarters)
    assert {corners(frame) for _, frame in made} == allowed
    assert all(sorted(frame.pixels.shape) == [3, 40, 60] for _, frame in made)  # never cropped


@pytest.mark.parametrize("place", ["answer", "label", "told", "choices"])
def test_a_side_anywhere_in_the_sample_counts(quarters: Frame, place: str) -> None:
    one = sample("What is this?", task="vqa")
    told = {"role": "assistant", "content": "left"}
    changed = {
        "answer": replace(one, answer="left"),
        "label": replace(one, boxes=(Box("left lung", 0, 0, 9, 9),)),
        "told": replace(one, messages=[*one.messages, told]),
        "choices": replace(one, choices=("left", "none")),
    }[place]
    assert {corners(frame) for _, frame in views(changed, quarters)} == {(1, 2), (3, 4)}


def test_crops_are_of_every_size_and_keep_the_box_whole() -> None:
    one = sample("Locate the mass.", (Box("mass", 30, 12, 44, 20),))
    made = views(one, picture(40, 60, one.boxes), 200)
    areas = {frame.pixels.shape[0] * frame.pixels.shape[1] for _, frame in made}
    assert len(areas) > 50 and max(areas) == 2400 and min(areas) >= 0.36 * 2400
    assert {seen.boxes[0].area for seen, _ in made} == {14.0 * 8}


def test_pictures_of_one_sample_turn_together(quarters: Frame) -> None:
    one = replace(sample("Do they differ?", task="vqa"), images=(Path("a.png"), Path("b.png")))
    for seed in range(30):
        _, shown = view(one, [quarters, quarters], np.random.default_rng(seed))
        assert np.array_equal(shown[0].pixels, shown[1].pixels)
