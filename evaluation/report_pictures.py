"""Pictures of a report: small JPEGs with the boxes of truth and answer, readable on any background.

For people who look at a page; ``medmo_edge.overlay`` draws the pictures of single answers.
"""

import base64
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from medmo_edge.boxes import XYXY, Box
from medmo_edge.images import Frame

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

SIDE = 640  # pixels of the longer side
TRUTH, ANSWER, EDGE = "#19e0c8", "#ff9d1e", "#101010"
DASH = 12


def picture(frame: Frame, truth: Sequence[Box], answer: Sequence[Box]) -> str:
    """The frame as base64 JPEG: truth dashed, answer solid, both with a dark edge."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(frame.pixels)
    height, width = frame.pixels.shape[:2]
    scale = SIDE / max(width, height)
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    factors = image.width / frame.source.width, image.height / frame.source.height
    draw = ImageDraw.Draw(image)
    for box in answer:
        _solid(draw, _scaled(box, factors))
    for box in truth:
        _dashed(draw, _scaled(box, factors))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _scaled(box: Box, factors: tuple[float, float]) -> XYXY:
    """Inclusive corners, in order also for a box smaller than a pixel."""
    x1, y1 = box.x1 * factors[0], box.y1 * factors[1]
    return x1, y1, max(x1, box.x2 * factors[0] - 1), max(y1, box.y2 * factors[1] - 1)


def _solid(draw: "ImageDraw", xyxy: XYXY) -> None:
    x1, y1, x2, y2 = xyxy
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=EDGE, width=6)
    draw.rectangle(xyxy, outline=ANSWER, width=4)


def _dashed(draw: "ImageDraw", xyxy: XYXY) -> None:
    for colour, width in ((EDGE, 6), (TRUTH, 4)):
        for line in _dashes(xyxy):
            draw.line(line, fill=colour, width=width)


def _dashes(xyxy: XYXY) -> Iterator[XYXY]:
    """Short lines along the four sides."""
    x1, y1, x2, y2 = xyxy
    for x in np.arange(x1, x2 + 1, 2 * DASH):
        end = min(float(x) + DASH, x2)
        yield from ((float(x), y, end, y) for y in (y1, y2))
    for y in np.arange(y1, y2 + 1, 2 * DASH):
        end = min(float(y) + DASH, y2)
        yield from ((x, float(y), x, end) for x in (x1, x2))
