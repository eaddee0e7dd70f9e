"""One DICOM frame to 8-bit grey or RGB, with the provenance of every step.

The order is the standard's: stored values, modality transformation, VOI, inversion (MONOCHROME1 or
Presentation LUT Shape INVERSE: once, never twice), 8 bits. Integers of up to 16 bits
are rendered through one table that is computed once per possible value; everything else in blocks
of rows, so that memory follows the stored frame. Anisotropic PixelSpacing is noted, not corrected:
boxes stay in stored pixels. Overlays and ICC profiles are ignored.
"""

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medmo_edge.dicom_attributes import (
    FrameAttributes,
    ModalityLut,
    Rescale,
    modality_of,
    padding_of,
    stored_bounds,
    views_of,
)
from medmo_edge.dicom_colour import BLOCK_VALUES, colour_to_rgb, palette_table
from medmo_edge.dicom_decode import Stored, decode_frame
from medmo_edge.dicom_header import Layout, is_code, read_header, read_layout
from medmo_edge.dicom_provenance import describe
from medmo_edge.dicom_square import square_size
from medmo_edge.dicom_window import Range, Subject, View, choose_view
from medmo_edge.errors import ImageError

TABLE_BITS = 16
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")

WindowRequest = str | int | tuple[float, float] | None


def render(
    file: BinaryIO, frame: int, window: WindowRequest
) -> tuple[NDArray[np.uint8], tuple[int, int], dict[str, Any]]:
    """One frame of an open DICOM file: uint8 [H, W] or [H, W, 3], its size with square pixels as
    (width, height), and the values for a Source.

    Errors: ImageError; anything pydicom raises on a data set that cannot be parsed.
    """
    header = read_header(file)
    layout = read_layout(header)
    stored = decode_frame(header, layout, frame)
    attributes = FrameAttributes.of(header, layout, frame)
    pixels, view, modality = _shade(stored, layout, attributes, window)
    size = square_size(layout.columns, layout.rows, attributes)
    return (
        pixels,
        size,
        {
            "format": "dicom",
            "width": layout.columns,
            "height": layout.rows,
            "frame": frame,
            "num_frames": layout.num_frames,
            "window": None if view is None else view.to_dict(),
            "dicom": describe(header, layout, stored, attributes, modality),
            "notes": tuple(attributes.notes),
        },
    )


def _shade(
    stored: Stored, layout: Layout, attributes: FrameAttributes, window: WindowRequest
) -> tuple[NDArray[np.uint8], View | None, Rescale | ModalityLut | None]:
    if stored.photometric in MONOCHROME:
        if layout.samples != 1:
            raise ImageError(f"{stored.photometric} with {layout.samples} samples per pixel")
        return _shade_monochrome(stored, layout, attributes, window)
    if window is not None:
        raise ImageError(f"a window needs a monochrome image, this is {stored.photometric}")
    if stored.photometric == "PALETTE COLOR":
        return _look_up_palette(stored.values, attributes), None, None
    return colour_to_rgb(stored.values, stored.photometric, layout.bits_stored), None, None


def _look_up_palette(values: NDArray[Any], attributes: FrameAttributes) -> NDArray[np.uint8]:
    if values.ndim != 2:
        raise ImageError("PALETTE COLOR with several samples per pixel")
    first, table = palette_table(attributes)
    rgb = np.empty((*values.shape, 3), np.uint8)
    for rows in _row_blocks(values):
        place = np.clip(values[rows].astype(np.int64) - first, 0, len(table) - 1)
        rgb[rows] = table[place]
    return rgb


def _row_blocks(values: NDArray[Any]) -> list[slice]:
    height = max(1, BLOCK_VALUES // values.shape[1])
    return [slice(top, top + height) for top in range(0, values.shape[0], height)]


def _shade_monochrome(
    stored: Stored, layout: Layout, attributes: FrameAttributes, window: WindowRequest
) -> tuple[NDArray[np.uint8], View, Rescale | ModalityLut]:
    values = stored.values
    modality = modality_of(attributes)
    padding = padding_of(attributes, layout)
    used = _used_values(values, padding)
    frame_range = _range_of(modality.apply(used))
    signed = layout.signed or (isinstance(modality, Rescale) and frame_range.low < 0)
    signed_input = signed and not isinstance(modality, ModalityLut)
    views = views_of(attributes, signed_input, layout.is_float)
    view = choose_view(window, views, _subject(layout, attributes, modality, frame_range))
    inverted = is_inverted(stored.photometric, attributes)

    def grey(block: NDArray[Any]) -> NDArray[np.uint8]:
        unit = view.curve.shade(modality.apply(block.astype(np.float64)))
        shaded = np.floor((1 - unit if inverted else unit) * 255 + 0.5).astype(np.uint8)
        # A window of the file was made for its padding; a computed range was not.
        if padding is not None and isinstance(view.curve, Range):
            shaded[(block >= padding[0]) & (block <= padding[1])] = 0
        return shaded

    return _map(values, grey), view, modality


def is_inverted(photometric: str, attributes: FrameAttributes) -> bool:
    """Whether low values are bright. MONOCHROME1 files also state the shape INVERSE: still once."""
    shape = attributes.text("PresentationLUTShape").upper()
    return photometric == "MONOCHROME1" or shape == "INVERSE"


def _map(values: NDArray[Any], grey: Any) -> NDArray[np.uint8]:
    """``grey`` of every value: by table for up to 16 bits, else directly."""
    result = np.empty(values.shape, np.uint8)
    if values.dtype.kind in "iu" and values.dtype.itemsize * 8 <= TABLE_BITS:
        limits = np.iinfo(values.dtype)
        table = grey(np.arange(limits.min, limits.max + 1, dtype=np.int64))
        for rows in _row_blocks(values):
            result[rows] = table[values[rows].astype(np.intp) - limits.min]
        return result
    for rows in _row_blocks(values):
        result[rows] = grey(values[rows])
    return result


def _used_values(values: NDArray[Any], padding: tuple[int, int] | None) -> NDArray[np.float64]:
    """The distinct values of small integers, else smallest and largest, without padding."""
    if values.dtype.kind in "iu" and values.dtype.itemsize * 8 <= TABLE_BITS:
        limits = np.iinfo(values.dtype)
        present = np.zeros(limits.max - limits.min + 1, bool)
        for rows in _row_blocks(values):
            present[values[rows].astype(np.intp) - limits.min] = True
        found = np.flatnonzero(present) + limits.min
        inner = _without_padding(found, padding)
        return (inner if inner.size else found).astype(np.float64)
    ends = []
    for rows in _row_blocks(values):
        block = _without_padding(values[rows].astype(np.float64), padding)
        block = block[np.isfinite(block)]
        if block.size:
            ends += [block.min(), block.max()]
    if not ends:
        raise ImageError("frame holds no finite value")
    return np.asarray(ends, np.float64)


def _without_padding(values: NDArray[Any], padding: tuple[int, int] | None) -> NDArray[Any]:
    if padding is None:
        return values
    return values[(values < padding[0]) | (values > padding[1])]


def _range_of(values: NDArray[np.float64]) -> Range:
    return Range(float(values.min()), float(values.max()))


def _subject(
    layout: Layout,
    attributes: FrameAttributes,
    modality: Rescale | ModalityLut,
    frame_range: Range,
) -> Subject:
    name = attributes.text("Modality").upper()
    return Subject(
        hounsfield=_is_hounsfield(attributes, modality),
        modality=name if is_code(name) else "",
        body_part=attributes.text("BodyPartExamined"),
        stored_range=_stored_range(layout, attributes, modality, frame_range),
        frame_range=frame_range,
    )


def _is_hounsfield(attributes: FrameAttributes, modality: Rescale | ModalityLut) -> bool:
    units = attributes.text("RescaleType", "PixelValueTransformationSequence").upper()
    if units:
        return units == "HU"
    image_type = attributes.text("ImageType").upper()
    return (
        attributes.text("Modality").upper() == "CT"
        and isinstance(modality, Rescale)
        and modality.stated
        and "LOCALIZER" not in image_type
    )


def _stored_range(
    layout: Layout,
    attributes: FrameAttributes,
    modality: Rescale | ModalityLut,
    frame_range: Range,
) -> Range | None:
    """The natural full scale of shallow pictures, which must not be stretched."""
    fraction = attributes.numbers("MaximumFractionalValue")
    if fraction and attributes.text("SegmentationType").upper() == "FRACTIONAL":
        return Range(0.0, fraction[0])
    if attributes.text("SegmentationType").upper() == "LABELMAP":
        return Range(0.0, frame_range.high)  # 0 is background: one label alone must be seen
    if layout.is_float or layout.bits_stored > 8:
        return None
    if isinstance(modality, ModalityLut):
        return Range(0.0, 2.0**modality.lut.bits - 1)
    bounds = stored_bounds(layout)
    return _range_of(modality.apply(np.array([bounds.low, bounds.high])))
