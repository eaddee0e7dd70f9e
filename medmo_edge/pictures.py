"""Ordinary pictures (PNG, JPEG, TIFF, BMP, WebP, GIF) to uint8 RGB by Pillow.

What is done to the pixels, in this order: the frame is picked, EXIF orientation applied,
transparency put on white (as the Qwen-VL reference code does), grayscale deeper than 8 bits scaled
down. Not done: ICC colour management (CMYK is converted by Pillow's plain formula), 16-bit colour
(Pillow keeps its high bytes), SVG, HEIC, JPEG 2000 outside DICOM.

Grayscale deeper than 8 bits: without a window, unsigned 16-bit values are divided by the smallest
of 8, 10, 12, 14 or 16 bits of full scale that holds the largest value, so that a full-range picture
is not stretched and a 12-bit one not black; 32-bit integers and floats have no natural scale and
take the range of the frame.
"""

import threading
import warnings
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from medmo_edge.errors import ImageError
from medmo_edge.image_budgets import check_pixels

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")  # Pillow opens MPO as JPEG
DEPTHS = (8, 10, 12, 14, 16)

_ORIENTATION = 0x0112
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# warnings.catch_warnings changes state of the whole process: one reader at a time.
_QUIET = threading.Lock()


def read_picture(
    file: BinaryIO, frame: int, window: object
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """(uint8 [H, W, 3], values for a Source) of frame ``frame`` of an open picture file.

    Errors: ImageError.
    """
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            return _read(file, frame, window)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("does not fit into memory") from error
    except Image.DecompressionBombError as error:
        raise ImageError("has more pixels than the limit: scale it down first") from error
    # Pillow's parsers raise nearly anything on hostile bytes (struct.error, KeyError, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"is damaged or not supported ({reason[:200]})") from error


def _read(file: BinaryIO, frame: int, window: object) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    with Image.open(file, formats=FORMATS) as image:
        check_pixels(*image.size)
        num_frames = int(getattr(image, "n_frames", 1))
        if frame >= num_frames:
            raise ImageError(f"has {num_frames} frame(s), counted from 0: no frame {frame}")
        if frame:
            image.seek(frame)
            check_pixels(*image.size)
        notes: list[str] = []
        image_format = "jpeg" if image.format == "MPO" else str(image.format).lower()
        turned = _turn(image, notes)
        pixels, used_window = _to_rgb(turned, window, notes)
    height, width = pixels.shape[:2]
    return pixels, {
        "format": image_format,
        "width": width,
        "height": height,
        "frame": frame,
        "num_frames": num_frames,
        "window": used_window,
        "notes": tuple(notes),
    }


def _turn(image: Image.Image, notes: list[str]) -> Image.Image:
    orientation = image.getexif().get(_ORIENTATION, 1)
    image.load()
    # TIFF files are already turned by load(); exif_transpose sees that and leaves them alone.
    turned = ImageOps.exif_transpose(image)
    if orientation in range(2, 9):
        notes.append(f"EXIF orientation {orientation} applied")
    return turned


def _to_rgb(
    image: Image.Image, window: object, notes: list[str]
) -> tuple[NDArray[np.uint8], dict[str, Any] | None]:
    if image.mode in _DEEP_MODES:
        grey, used = _deep_to_grey(np.asarray(image), window, notes)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2), used
    if window is not None:
        raise ImageError("a window needs grayscale deeper than 8 bits: leave it out here")
    if image.mode == "LAB":
        raise ImageError("has CIELAB colours: save it as RGB")
    if image.has_transparency_data:
        image = _on_white(image, notes)
    elif image.mode not in ("RGB", "L"):
        notes.append(f"converted from {image.mode} to RGB")
    return np.array(image.convert("RGB")), None


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        notes.append("transparency put on white")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba)


def _deep_to_grey(
    values: NDArray[Any], window: object, notes: list[str]
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """uint8 [H, W] of 16-bit, 32-bit or float values, and the range or window used."""
    low, high, used = _deep_range(values, window)
    notes.append(f"values {low:g} to {high:g} scaled to 8 bits")
    # Row by row blocks: float64 of a whole large picture would need eight times its memory.
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, 2**20 // values.shape[1])
    for top in range(0, values.shape[0], rows):
        block = values[top : top + rows].astype(np.float64)
        unit = (block - low) / (high - low) if high > low else (block > low).astype(np.float64)
        unit = np.nan_to_num(unit, nan=0.0, posinf=1.0, neginf=0.0)
        grey[top : top + rows] = np.floor(np.clip(unit, 0, 1) * 255 + 0.5).astype(np.uint8)
    return grey, used


def _deep_range(values: NDArray[Any], window: object) -> tuple[float, float, dict[str, Any]]:
    if isinstance(window, tuple):
        # The pixels between which a LINEAR window runs, PS3.3 C.11.2.1.2.1.
        center, width = _checked_window(window)
        low, high = center - width / 2, center + width / 2 - 1
        return low, high, {"center": center, "width": width, "function": "LINEAR", "from": "asked"}
    if window not in (None, "auto"):
        raise ImageError(f"window {window!r} needs a DICOM file: give (center, width) or 'auto'")
    if values.dtype == np.uint16 and window is None:
        largest = int(values.max())
        depth = next(bits for bits in DEPTHS if largest < 2**bits)
        return 0.0, 2.0**depth - 1, {"low": 0.0, "high": 2.0**depth - 1, "from": "bit depth"}
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ImageError("holds no finite value")
    low, high = float(finite.min()), float(finite.max())
    return low, high, {"low": low, "high": high, "from": "frame range"}


def _checked_window(window: tuple[Any, ...]) -> tuple[float, float]:
    try:
        center, width = (float(value) for value in window)
    except (TypeError, ValueError) as error:
        raise ImageError(f"window {window!r} is not (center, width)") from error
    if not (np.isfinite(center) and np.isfinite(width) and width >= 1):
        raise ImageError(f"window width {width:g} is below 1")
    return center, width
