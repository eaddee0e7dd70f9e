"""Scenes: a picture with its boxes and facts, and the random views of it that training sees.

A view is a crop, flips and colours; boxes follow their objects and answers are written from them
afterwards. Radiology is never turned or mirrored: left and right, up and down mean something.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box
from medmo_edge.phantoms import draw
from medmo_edge.preprocess import Preprocessing

Kind = Literal["blood", "chest", "radiology"]
Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels

KEEP = 0.4  # a box keeps its label when at least this part of it is inside the crop
GONE = 0.05  # and is out of the picture below this part; between the two a crop is avoided
WHOLE = 0.75  # from this part on a lesion or cell counts as wholly seen
TRIES = 12
_CLOSEST = {"Platelets": 0.25}  # the smallest part of a smear's sides that a view may show
PHANTOM_SIZES = ((288, 320), (320, 320), (256, 320), (320, 256), (384, 448), (224, 256))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """pixels [H, W, 3] uint8, boxes in its pixels, and ``facts`` as ``phantoms`` states them.

    ``turns`` are questions with their answers that came with the picture.
    """

    kind: Kind
    pixels: NDArray[np.uint8]
    boxes: tuple[Box, ...]
    facts: Mapping[str, int | float | bool] = field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()

    def count(self, label: str) -> int:
        """How many boxes carry ``label``."""
        return sum(box.label == label for box in self.boxes)

    def labelled(self, label: str) -> tuple[Box, ...]:
        """The boxes that carry ``label``."""
        return tuple(box for box in self.boxes if box.label == label)


@lru_cache(maxsize=8192)
def chest_scene(seed: int, size: tuple[int, int] | None = None) -> Scene:
    """The phantom of ``seed``, at a size the seed chooses unless given, as RGB."""
    phantom = draw(seed, size=size or PHANTOM_SIZES[seed % len(PHANTOM_SIZES)])
    pixels = np.broadcast_to(phantom.pixels[:, :, None], (*phantom.pixels.shape, 3))
    boxes = phantom.boxes + phantom.anatomy
    return Scene(kind="chest", pixels=pixels, boxes=boxes, facts=phantom.facts)


def augment(scene: Scene, rng: np.random.Generator, around: str = "WBC") -> Scene:
    """A random view of ``scene``; of a smear often one around a box of the label ``around``."""
    if scene.kind != "blood":
        low = 0.85 if rng.random() < 0.6 else 1.0
        return recolour(crop(scene, _chest_window(scene, low, rng)), rng, tint=0.0)
    view = crop(scene, _blood_window(scene, rng, around))
    for turn, chance in ((mirror, 0.5), (upside_down, 0.5), (transpose, 0.3)):
        view = turn(view) if rng.random() < chance else view
    return recolour(view, rng, tint=0.07)


def _blood_window(scene: Scene, rng: np.random.Generator, around: str) -> Window:
    """The whole smear, a part around one of its cells ``around``, or a part without any.

    Both kinds of part come in like sizes: the size must not give the answer away.
    """
    height, width = scene.pixels.shape[:2]
    cells, low = scene.labelled(around), _CLOSEST.get(around, 0.4)
    kind = rng.random()
    if kind < 0.25:
        return 0, 0, width, height
    wanted = cells[int(rng.integers(len(cells)))] if kind < 0.75 and cells else None
    for _ in range(TRIES):
        window = _random_window(scene, rng.uniform(low, 1.0 if wanted else 0.8), rng, wanted)
        parts = [visible_part(cell, window) for cell in cells]
        if not any(GONE < part < WHOLE for part in parts) and (
            wanted or max(parts, default=0) < WHOLE
        ):
            break
    return window


def _chest_window(scene: Scene, low: float, rng: np.random.Generator) -> Window:
    for _ in range(TRIES):
        window = _random_window(scene, rng.uniform(low, 1.0), rng)
        if not any(GONE < visible_part(box, window) < WHOLE for box in scene.boxes):
            break
    return window


def _random_window(
    scene: Scene, part: float, rng: np.random.Generator, holding: Box | None = None
) -> Window:
    """A window of about ``part`` of each side, its shape a little off the picture's.

    It holds the box ``holding``, or as much of it as its own size allows.
    """
    height, width = scene.pixels.shape[:2]
    stretch = rng.uniform(0.85, 1.18)
    across = min(width, round(width * part * stretch**0.5))
    down = min(height, round(height * part / stretch**0.5))
    left = _place(across, width, (holding.x1, holding.x2) if holding else None, rng)
    top = _place(down, height, (holding.y1, holding.y2) if holding else None, rng)
    return left, top, left + across, top + down


def _place(
    length: int, side: int, holding: tuple[float, float] | None, rng: np.random.Generator
) -> int:
    """Where a stretch of ``length`` begins in ``side``, covering ``holding`` when it can."""
    first, last = 0, side - length
    if holding is not None:
        first = min(last, max(0, math.ceil(holding[1]) - length))
        last = max(first, min(last, int(holding[0])))
    return int(rng.integers(first, last + 1))


def visible_part(box: Box, window: Window) -> float:
    """The part of the box's area inside ``window``, 0..1."""
    across = min(box.x2, window[2]) - max(box.x1, window[0])
    down = min(box.y2, window[3]) - max(box.y1, window[1])
    return max(0.0, across) * max(0.0, down) / box.area


def crop(scene: Scene, window: Window) -> Scene:
    """The part of the picture in ``window``; boxes are cut at its edge or dropped (see KEEP)."""
    left, top, right, bottom = window
    boxes = tuple(
        replace(
            box,
            x1=max(box.x1, left) - left,
            y1=max(box.y1, top) - top,
            x2=min(box.x2, right) - left,
            y2=min(box.y2, bottom) - top,
        )
        for box in scene.boxes
        if visible_part(box, window) >= KEEP
    )
    return replace(scene, pixels=scene.pixels[top:bottom, left:right], boxes=boxes)


def mirror(scene: Scene) -> Scene:
    """Left and right exchanged."""
    width = scene.pixels.shape[1]
    boxes = tuple(replace(box, x1=width - box.x2, x2=width - box.x1) for box in scene.boxes)
    return replace(scene, pixels=scene.pixels[:, ::-1], boxes=boxes)


def upside_down(scene: Scene) -> Scene:
    """Top and bottom exchanged."""
    height = scene.pixels.shape[0]
    boxes = tuple(replace(box, y1=height - box.y2, y2=height - box.y1) for box in scene.boxes)
    return replace(scene, pixels=scene.pixels[::-1], boxes=boxes)


def transpose(scene: Scene) -> Scene:
    """Rows and columns exchanged."""
    boxes = tuple(replace(box, x1=box.y1, y1=box.x1, x2=box.y2, y2=box.x2) for box in scene.boxes)
    return replace(scene, pixels=scene.pixels.transpose(1, 0, 2), boxes=boxes)


def recolour(scene: Scene, rng: np.random.Generator, *, tint: float) -> Scene:
    """Contrast, brightness and a tint per channel, by one lookup table each."""
    gain = rng.uniform(0.8, 1.2) * rng.uniform(1 - tint, 1 + tint, 3)
    shift = rng.uniform(-0.1, 0.1) * 255
    levels = np.arange(256, dtype=np.float32)[:, None]
    table = np.clip((levels - 128) * gain + 128 + shift, 0, 255).astype(np.uint8)
    pixels = np.stack([table[scene.pixels[:, :, c], c] for c in range(3)], axis=2)
    return replace(scene, pixels=pixels)


def vary_resolution(limits: Preprocessing, rng: np.random.Generator) -> Preprocessing:
    """The same processor with a smaller pixel budget half of the time, down to ``min_pixels``."""
    if rng.random() < 0.5:
        return limits
    return replace(limits, max_pixels=int(rng.uniform(limits.min_pixels, limits.max_pixels)))
