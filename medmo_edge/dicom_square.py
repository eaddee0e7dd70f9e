"""Square pixels: a frame with a PixelAspectRatio is enlarged along the axis of its longer pixels.

Only PixelAspectRatio is corrected (PS3.3 C.7.6.3.1.7: vertical\\horizontal). A PixelSpacing that
differs between rows and columns is noted: the frame stays as stored, as most viewers' pixel tools
and every measurement expect.
"""

import numpy as np
from numpy.typing import NDArray

from medmo_edge.dicom_attributes import FrameAttributes
from medmo_edge.image_budgets import check_pixels

MOST_OBLONG = 8.0
TOLERANCE = 0.01


def square_size(width: int, height: int, attributes: FrameAttributes) -> tuple[int, int]:
    """(width, height) that a frame of ``width`` x ``height`` has with square pixels.

    Errors: ImageError when the enlarged frame is above the pixel limit.
    """
    ratio = attributes.numbers("PixelAspectRatio")
    if len(ratio) != 2 or min(ratio) <= 0:
        _note_spacing(attributes)
        return width, height
    tall = ratio[0] / ratio[1]  # height of a pixel over its width
    if abs(tall - 1) <= TOLERANCE:
        return width, height
    if not 1 / MOST_OBLONG <= tall <= MOST_OBLONG:
        attributes.notes.append(f"PixelAspectRatio {ratio[0]:g}:{ratio[1]:g} ignored")
        return width, height
    size = (width, round(height * tall)) if tall > 1 else (round(width / tall), height)
    check_pixels(*size)
    attributes.notes.append(
        f"PixelAspectRatio {ratio[0]:g}:{ratio[1]:g}: resampled to {size[0]} x {size[1]}"
    )
    return size


def resample(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """``pixels`` [H, W] or [H, W, 3] at (width, height) ``size``, bicubic."""
    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    from PIL import Image

    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _note_spacing(attributes: FrameAttributes) -> None:
    spacing = attributes.numbers("PixelSpacing", "PixelMeasuresSequence")
    if len(spacing) == 2 and min(spacing) > 0 and abs(spacing[0] / spacing[1] - 1) > TOLERANCE:
        attributes.notes.append(
            f"pixels are {spacing[0]:g} x {spacing[1]:g} mm (rows x columns): shown as stored"
        )
