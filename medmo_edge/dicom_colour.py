"""Colour frames to 8-bit RGB: palettes, YBR colour spaces, depths other than 8 bits.

Values are scaled by BitsStored, so full scale is full scale. YBR_ICT and YBR_RCT arrive here as
RGB (the decoders undo them with the wavelet). Not done: ICC profiles, supplemental palettes, the
retired ARGB, HSV and CMYK.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.dicom_attributes import FrameAttributes, lut_entries, numbers_of
from medmo_edge.dicom_header import value_of
from medmo_edge.errors import ImageError

BLOCK_VALUES = 2**20
COLOURS = ("Red", "Green", "Blue")

# Rows give R, G, B from Y, Cb - half, Cr - half (PS3.3 C.7.6.3.1.2; ITU-R BT.601).
_FULL = np.array(
    [[1, 0, 1.402], [1, -0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587], [1, 1.772, 0]]
)
# The same for Y in 16..235 and chroma in 16..240 of 0..255.
_PARTIAL = _FULL * np.array([255 / 219, 255 / 224, 255 / 224])


def colour_to_rgb(values: NDArray[Any], photometric: str, bits_stored: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of three stored samples per pixel [H, W, 3].

    Errors: ImageError for a colour space that is not supported.
    """
    if values.ndim != 3 or values.shape[2] != 3:
        raise ImageError(f"{photometric} with {values.shape[2:] or (1,)} samples is not supported")
    if photometric not in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL", "YBR_PARTIAL_422"):
        raise ImageError(f"photometric interpretation {photometric!r} is not supported")
    if photometric == "RGB" and bits_stored == 8 and values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    rgb = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK_VALUES // (values.shape[1] * 3))
    for top in range(0, values.shape[0], rows):
        block = values[top : top + rows].astype(np.float64)
        rgb[top : top + rows] = _block_to_rgb(block, photometric, bits_stored)
    return rgb


def _block_to_rgb(
    block: NDArray[np.float64], photometric: str, bits_stored: int
) -> NDArray[np.uint8]:
    full_scale = 2.0**bits_stored - 1
    if photometric != "RGB":
        half = 2.0 ** (bits_stored - 1)
        partial = "PARTIAL" in photometric
        black = 16 * 2.0 ** (bits_stored - 8) if partial else 0.0
        matrix = _PARTIAL if partial else _FULL
        block = (block - np.array([black, half, half])) @ matrix.T
    return np.floor(np.clip(block / full_scale, 0, 1) * 255 + 0.5).astype(np.uint8)


def palette_table(attributes: FrameAttributes) -> tuple[int, NDArray[np.uint8]]:
    """(first input, uint8 [N, 3]) of a PALETTE COLOR frame's tables (PS3.3 C.7.6.3.1.5).

    Errors: ImageError when a table is missing or broken.
    """
    tables = [_palette_channel(attributes, colour) for colour in COLOURS]
    first = tables[0][0]
    if len({(start, len(entries)) for start, entries, _ in tables}) != 1:
        raise ImageError("palette tables of the three colours differ in size")
    bits = 16 if any(bits > 8 for _, _, bits in tables) else 8
    rgb = np.stack([entries for _, entries, _ in tables], axis=1).astype(np.float64)
    # Many writers declare 16 bits and store 8-bit colours in them.
    if bits == 16 and rgb.max() <= 255:
        bits = 8
        attributes.notes.append("palette states 16 bits but holds 8-bit colours")
    scaled = np.floor(np.clip(rgb / (2**bits - 1), 0, 1) * 255 + 0.5)
    return first, scaled.astype(np.uint8)


def _palette_channel(
    attributes: FrameAttributes, colour: str
) -> tuple[int, NDArray[np.uint16], int]:
    descriptor = numbers_of(attributes.get(f"{colour}PaletteColorLookupTableDescriptor"))
    if len(descriptor) != 3:
        raise ImageError(f"palette has no {colour.lower()} table")
    count, first, bits = (int(number) for number in descriptor)
    count = count % 2**16 or 2**16
    first = first % 2**16
    if attributes.signed and first >= 2**15:
        first -= 2**16
    data = value_of(attributes.dataset, f"{colour}PaletteColorLookupTableData")
    if data is not None:
        entries = lut_entries(data, count, attributes.little_endian)
    else:
        segments = value_of(attributes.dataset, f"Segmented{colour}PaletteColorLookupTableData")
        entries = _expand(_words(segments, bits, attributes.little_endian), count, bits)
    if entries is None:
        raise ImageError(f"palette table {colour.lower()} is missing or too short")
    return first, entries, bits


def _words(data: Any, bits: int, little_endian: bool) -> list[int]:
    if not isinstance(data, bytes):
        return [int(number) for number in numbers_of(data)]
    if bits <= 8:
        return list(data)
    count = len(data) // 2
    return list(struct.unpack(f"{'<' if little_endian else '>'}{count}H", data[: 2 * count]))


def _expand(words: list[int], count: int, bits: int) -> NDArray[np.uint16] | None:
    """``count`` entries of a segmented palette (PS3.3 C.7.9.2), None when the segments do not fit.

    The offset of an indirect segment counts entries, as pydicom and GDCM read it.
    """
    entries: list[int] = []
    offset_words = 4 if bits <= 8 else 2
    place = 0
    while len(entries) < count and place + 1 < len(words):
        kind, length = words[place], words[place + 1]
        if kind == 2:
            parts = words[place + 2 : place + 2 + offset_words]
            target = sum(part << (bits * i) for i, part in enumerate(parts))
            if not _copy_segments(words, target, length, entries, count):
                return None
            place += 2 + offset_words
        else:
            place = _expand_segment(words, place, entries)
            if place < 0:
                return None
    return np.asarray(entries[:count], np.uint16) if len(entries) >= count else None


def _copy_segments(
    words: list[int], place: int, segments: int, entries: list[int], count: int
) -> bool:
    """Expand ``segments`` plain segments from ``place`` on; an indirect one among them is wrong."""
    for _ in range(segments):
        place = _expand_segment(words, place, entries)
        if place < 0 or len(entries) >= count:
            break
    return place >= 0


def _expand_segment(words: list[int], place: int, entries: list[int]) -> int:
    """Append one discrete or linear segment; the place behind it, -1 when it is damaged."""
    if place + 2 >= len(words):
        return -1
    kind, length = words[place], words[place + 1]
    if kind == 0:
        entries += words[place + 2 : place + 2 + length]
        return place + 2 + length
    if kind == 1 and entries:
        start, end = entries[-1], words[place + 2]
        entries += [int(start + (end - start) * (i + 1) / length + 0.5) for i in range(length)]
        return place + 3
    return -1
