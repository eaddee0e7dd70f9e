"""Curves of a run as one PNG, drawn with Pillow: a panel for each figure of metrics.jsonl.

Thin: every step; thick: its running mean. Figures that every run has come first (loss, reward,
overlap), then the others. No interaction, no comparison of runs: TensorBoard reads the same run.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Points = Sequence[tuple[int, float]]

FIRST = ("loss", "reward", "iou")  # parts of names, in the order of their panels
WIDTH, HEIGHT, MARGIN, PER_ROW = 420, 240, 46, 3
SMOOTHING = 20  # steps that the running mean looks back on
_INK, _PALE, _GRID, _STRONG = (40, 40, 40), (170, 190, 215), (225, 225, 225), (20, 80, 160)


def draw_curves(curves: Mapping[str, Points], title: str, path: Path) -> None:
    """Write a PNG with one panel for each name of ``curves`` that has two finite points or more.

    Nothing is written when none has. Errors: OSError.
    """
    from PIL import Image, ImageDraw

    shown = {name: _finite(points) for name, points in curves.items()}
    names = sorted((name for name in shown if len(shown[name]) > 1), key=_order)
    if not names:
        return
    rows = math.ceil(len(names) / PER_ROW)
    size = (WIDTH * min(PER_ROW, len(names)), HEIGHT * rows + 24)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.text((8, 6), title, fill=_INK)
    for index, name in enumerate(names):
        corner = (index % PER_ROW * WIDTH, 24 + index // PER_ROW * HEIGHT)
        _panel(pen, corner, name, shown[name])
    draft = path.with_name(f".{path.name}.tmp")
    image.save(draft, format="PNG")
    draft.replace(path)


def _order(name: str) -> tuple[int, str]:
    places = [place for place, part in enumerate(FIRST) if part in name]
    return (places[0] if places else len(FIRST), name)


def _finite(points: Points) -> Points:
    return [(step, value) for step, value in points if math.isfinite(value)]


def running_mean(points: Points, back: int = SMOOTHING) -> Points:
    """Each value replaced by the mean of it and of up to ``back`` - 1 before it."""
    values = [value for _, value in points]
    means = (
        sum(values[max(0, at + 1 - back) : at + 1]) / min(at + 1, back) for at in range(len(values))
    )
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _panel(pen: "ImageDraw", corner: tuple[int, int], name: str, points: Points) -> None:
    left, top = corner[0] + MARGIN, corner[1] + 20
    right, bottom = corner[0] + WIDTH - 12, corner[1] + HEIGHT - 26
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = _limits(values)
    span = max(1, steps[-1] - steps[0])

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - steps[0]) / span
        return left + across * (right - left), bottom - (value - low) / (high - low) * (
            bottom - top
        )

    pen.text((left, corner[1] + 4), name, fill=_INK)
    for part in range(5):
        value = low + (high - low) * part / 4
        height = place(steps[0], value)[1]
        pen.line([(left, height), (right, height)], fill=_GRID)
        pen.text((corner[0] + 4, height - 6), f"{value:.3g}", fill=_INK)
    pen.text((left, bottom + 6), f"step {steps[0]}", fill=_INK)
    pen.text((right - 40, bottom + 6), str(steps[-1]), fill=_INK)
    pen.line([place(*point) for point in points], fill=_PALE)
    pen.line([place(*point) for point in running_mean(points)], fill=_STRONG, width=2)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """A range that holds all values and is not empty."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
