"""Random views of a sample's pictures: part of one, mirrored, upside down, transposed.

Boxes follow. Colours stay: what they mean differs between kinds of pictures. A view is refused
where it could make the text untrue: nothing is mirrored when any text names a side, nothing is
turned when one names a height, and only ``locate`` pictures are cropped, around all their boxes.
Chest radiographs have sides even when no text names them: the recipe says which files may turn.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from medmo_edge.boxes import Box
from medmo_edge.images import Frame, Source
from medmo_edge.samples import Sample, text_of
from medmo_edge.train.scenes import Scene, Window, crop, mirror, transpose, upside_down

_SIDES = re.compile(
    r"(?<![a-z])(left|right|lt|rt|dextr\w*|sinist\w*|(?:counter|anti)?-?clockwise|o'clock)(?![a-z])"
    "|[\u5de6\u53f3]",
    re.IGNORECASE,
)
_HEIGHTS = re.compile(
    r"(?<![a-z])(upper|lower|top|bottom|above|below|superior\w*|inferior\w*|ap(?:ex|ical|ices)"
    r"|bas(?:e|es|al|ilar)|up|down|vertical\w*|horizontal\w*|high|low|erect|supine)(?![a-z])"
    "|[\u4e0a\u4e0b]",
    re.IGNORECASE,
)
_PLACES = re.compile(r"\d\s*,\s*\d|\d+\s*%")  # coordinates in a text would not follow

CROPPED, MIRRORED, TURNED, TRANSPOSED = 0.7, 0.5, 0.5, 0.3
SMALLEST = 0.6  # part of a side that a crop keeps at least
LONGEST = 10  # a picture longer than this many times its width is not cropped


def view(
    sample: Sample, frames: Sequence[Frame], rng: np.random.Generator
) -> tuple[Sample, list[Frame]]:
    """The sample and its pictures as one random view, boxes in the new pictures' pixels.

    What is drawn depends on ``rng``, the sample and the sizes alone, so pixels may be missing:
    arrays of one repeated value give the sizes and boxes of the view.
    """
    draws = rng.random(4)
    texts = list(_texts(sample))
    if not frames or any(map(_PLACES.search, texts)):
        return sample, list(frames)
    upright = any(map(_HEIGHTS.search, texts))
    sided = any(map(_SIDES.search, texts))
    scenes = [_scene(sample, index, frame) for index, frame in enumerate(frames)]
    if sample.task == "locate" and len(scenes) == 1 and sample.boxes and draws[0] < CROPPED:
        scenes = [crop(scenes[0], _window(scenes[0], rng))]
    if not sided and draws[1] < MIRRORED:
        scenes = [mirror(scene) for scene in scenes]
    if not upright and draws[2] < TURNED:
        scenes = [upside_down(scene) for scene in scenes]
    if not (sided or upright) and draws[3] < TRANSPOSED:
        scenes = [transpose(scene) for scene in scenes]
    boxes = tuple(box for scene in scenes for box in scene.boxes)
    shown = [_frame(scene, frame) for scene, frame in zip(scenes, frames, strict=True)]
    return replace(sample, boxes=boxes), shown


def _texts(sample: Sample) -> Iterable[str]:
    """Everything that is said about the pictures."""
    yield from map(text_of, sample.messages)
    yield from (box.label for box in sample.boxes)
    yield from sample.choices
    yield sample.answer or ""


def _scene(sample: Sample, index: int, frame: Frame) -> Scene:
    """One picture with its boxes in the frame's pixels, which may be squarer than the source's."""
    height, width = frame.pixels.shape[:2]
    across, down = width / frame.source.width, height / frame.source.height
    boxes = tuple(
        Box(box.label, box.x1 * across, box.y1 * down, box.x2 * across, box.y2 * down, index)
        for box in sample.boxes
        if box.image == index
    )
    return Scene(kind="radiology", pixels=frame.pixels, boxes=boxes)


def _window(scene: Scene, rng: np.random.Generator) -> Window:
    """A part of the picture that holds all boxes whole."""
    height, width = scene.pixels.shape[:2]
    if max(height, width) > LONGEST * min(height, width):
        return 0, 0, width, height
    boxes = scene.boxes
    across = (min(box.x1 for box in boxes), max(box.x2 for box in boxes))
    down = (min(box.y1 for box in boxes), max(box.y2 for box in boxes))
    left, right = _stretch(width, across, rng)
    top, bottom = _stretch(height, down, rng)
    return left, top, right, bottom


def _stretch(side: int, holding: tuple[float, float], rng: np.random.Generator) -> tuple[int, int]:
    low, high = math.floor(holding[0]), min(side, math.ceil(holding[1]))
    length = max(high - low, math.ceil(side * rng.uniform(SMALLEST, 1.0)))
    first = int(rng.integers(max(0, high - length), min(low, side - length) + 1))
    return first, first + length


def _frame(scene: Scene, frame: Frame) -> Frame:
    height, width = scene.pixels.shape[:2]
    whole = frame.source
    return Frame(
        scene.pixels,
        Source(path=whole.path, format=whole.format, width=width, height=height),
    )
