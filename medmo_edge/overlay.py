"""Draw an answer's boxes on the frame the model saw. For people: not a DICOM object."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medmo_edge.boxes import Box
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame

# Okabe-Ito colours: told apart by colour-blind readers, and bright on radiographs.
COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
MIN_LONG_SIDE = 768
NOTICE = "Research use only - not for diagnosis"


def draw_overlay(
    frame: Frame,
    boxes: Sequence[Box],
    *,
    truth: Sequence[Box] = (),
    notice: str = NOTICE,
    min_long_side: int = MIN_LONG_SIDE,
) -> NDArray[np.uint8]:
    """RGB picture [H, W, 3] of ``frame`` with ``boxes`` (source pixels) and their labels.

    One colour a label; ``truth`` boxes are dashed white. Frames below ``min_long_side`` are
    enlarged by a whole factor so that labels stay readable; ``notice`` is printed below the
    picture, never over it.
    """
    height, width = frame.pixels.shape[:2]
    scale = max(1, -(-min_long_side // max(height, width)))
    picture = Image.fromarray(frame.pixels, "RGB").resize((width * scale, height * scale))
    canvas = Image.new("RGB", (picture.width, picture.height + 24), "black")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    factors = (width * scale / frame.source.width, height * scale / frame.source.height)
    for box in truth:
        _draw_dashed(draw, _scaled(box, factors))
    colours = _colours([box.label for box in boxes])
    for box in boxes:
        _draw_box(draw, _scaled(box, factors), box.label, colours[box.label])
    draw.text((6, picture.height + 4), notice, fill="white", font=_font(14))
    return np.asarray(canvas)


def save_overlay(pixels: NDArray[np.uint8], path: Path, *, overwrite: bool = False) -> None:
    """Write ``pixels`` as a PNG by atomic rename; ImageError when it may not be replaced."""
    check_overlay_path(path, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(pixels, "RGB").save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        raise ImageError(f"cannot write overlay {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def check_overlay_path(path: Path, *, overwrite: bool) -> None:
    """Refuse early, before a model has run for a minute, what ``save_overlay`` would refuse."""
    if path.is_dir():
        raise ImageError(f"overlay {path} is a folder: name a .png file")
    if path.exists() and not overwrite:
        raise ImageError(f"overlay {path} exists already: choose another name or add --overwrite")
    if not path.absolute().parent.is_dir():
        raise ImageError(f"overlay {path}: its folder does not exist")


def _colours(labels: Sequence[str]) -> dict[str, str]:
    distinct = dict.fromkeys(labels)
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(distinct)}


def _scaled(box: Box, factors: tuple[float, float]) -> tuple[float, float, float, float]:
    x, y = factors
    return box.x1 * x, box.y1 * y, box.x2 * x - 1, box.y2 * y - 1  # half-open to inclusive


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_box(
    draw: ImageDraw.ImageDraw, xyxy: tuple[float, float, float, float], label: str, colour: str
) -> None:
    x1, y1, x2, y2 = xyxy
    draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=3)
    if not label:
        return
    font = _font(18)
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    text_width, text_height = right - left + 8, bottom - top + 8
    text_x = min(max(0.0, x1), max(0.0, draw.im.size[0] - text_width))
    text_y = y1 - text_height if y1 >= text_height else y1
    draw.rectangle((text_x, text_y, text_x + text_width, text_y + text_height), fill=colour)
    draw.text((text_x + 4 - left, text_y + 4 - top), label, fill="black", font=font)


def _draw_dashed(
    draw: ImageDraw.ImageDraw, xyxy: tuple[float, float, float, float], dash: int = 8
) -> None:
    x1, y1, x2, y2 = xyxy
    for start in np.arange(x1, x2, 2 * dash):
        end = min(start + dash, x2)
        draw.line((start, y1, end, y1), fill="white", width=2)
        draw.line((start, y2, end, y2), fill="white", width=2)
    for start in np.arange(y1, y2, 2 * dash):
        end = min(start + dash, y2)
        draw.line((x1, start, x1, end), fill="white", width=2)
        draw.line((x2, start, x2, end), fill="white", width=2)
