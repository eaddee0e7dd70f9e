"""Colour spaces and palettes against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from medmo_edge.dicom_attributes import FrameAttributes
from medmo_edge.dicom_colour import colour_to_rgb, palette_table
from medmo_edge.errors import ImageError


# ITU-R BT.601: red, mid grey and white in full range; black, white and red in studio range.
@pytest.mark.parametrize(
    ("photometric", "stored", "expected"),
    [
        ("YBR_FULL", [76, 85, 255], [254, 0, 0]),
        ("YBR_FULL", [128, 128, 128], [128, 128, 128]),
        ("YBR_FULL_422", [255, 128, 128], [255, 255, 255]),
        ("YBR_PARTIAL", [16, 128, 128], [0, 0, 0]),
        ("YBR_PARTIAL_422", [235, 128, 128], [255, 255, 255]),
        ("YBR_PARTIAL", [82, 90, 240], [255, 1, 0]),
    ],
)
def test_ybr_becomes_rgb(photometric: str, stored: list[int], expected: list[int]) -> None:
    rgb = colour_to_rgb(np.array([[stored]], np.uint8), photometric, 8)
    assert np.abs(rgb.astype(int) - expected).max() <= 1


@given(st.lists(st.integers(0, 255), min_size=3, max_size=3))
def test_full_range_ybr_is_the_inverse_of_the_standard_matrix(rgb: list[int]) -> None:
    """PS3.3 C.7.6.3.1.2 gives RGB -> YBR_FULL; rounding to 8 bits costs at most 2 levels."""
    red, green, blue = rgb
    ybr = [
        0.2990 * red + 0.5870 * green + 0.1140 * blue,
        -0.1687 * red - 0.3313 * green + 0.5000 * blue + 128,
        0.5000 * red - 0.4187 * green - 0.0813 * blue + 128,
    ]
    stored = np.clip(np.rint(ybr), 0, 255).astype(np.uint8).reshape(1, 1, 3)
    assert np.abs(colour_to_rgb(stored, "YBR_FULL", 8).astype(int) - rgb).max() <= 2


def test_large_pictures_are_converted_in_blocks() -> None:
    rgb = np.random.default_rng(0).integers(0, 2**16, (700, 601, 3), np.uint16)
    expected = np.floor(rgb / 65535 * 255 + 0.5)
    np.testing.assert_array_equal(colour_to_rgb(rgb, "RGB", 16), expected)


def test_other_sample_counts_are_refused() -> None:
    with pytest.raises(ImageError, match="samples"):
        colour_to_rgb(np.zeros((2, 2, 4), np.uint8), "RGB", 8)


def palette(entries: bytes, count: int, *, first: int = 0, bits: int = 8) -> FrameAttributes:
    """Attributes with the same table three times, plain."""
    return _attributes(entries, "{}PaletteColorLookupTableData", count, first, bits)


def segmented(segments: bytes, count: int, *, bits: int = 8) -> FrameAttributes:
    """Attributes with the same table three times, segmented."""
    return _attributes(segments, "Segmented{}PaletteColorLookupTableData", count, 0, bits)


def _attributes(data: bytes, keyword: str, count: int, first: int, bits: int) -> FrameAttributes:
    made = Dataset()
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTableDescriptor"
        made.add_new(name, "US", [count % 2**16, first % 2**16, bits])
        made.add_new(keyword.format(colour), "OW", data)
    return FrameAttributes(dataset=made, groups=(), little_endian=True, signed=first < 0)


def table_of(attributes: FrameAttributes) -> list[int]:
    _, table = palette_table(attributes)
    assert (table == table[:, :1]).all()
    return [int(value) for value in table[:, 0]]


def test_descriptor_zero_means_65536_entries() -> None:
    entries = np.arange(2**16, dtype="<u2")
    first, table = palette_table(palette(entries.tobytes(), 2**16, bits=16))
    assert (first, len(table)) == (0, 2**16)
    np.testing.assert_array_equal(table[:, 1], np.floor(entries / 65535 * 255 + 0.5))


def test_a_negative_first_input_needs_signed_pixels() -> None:
    first, _ = palette_table(palette(bytes([1, 2, 3, 4]), 4, first=-2))
    assert first == -2


def test_segments_discrete_linear_and_indirect() -> None:
    # discrete 0, 10; linear to 40 in 3 steps; the first segment again; linear to 0 in 5 steps
    segments = bytes([0, 2, 0, 10, 1, 3, 40, 2, 1, 0, 0, 0, 0, 1, 5, 0])
    assert table_of(segmented(segments, 12)) == [0, 10, 20, 30, 40, 0, 10, 8, 6, 4, 2, 0]


def test_sixteen_bit_segments() -> None:
    segments = np.array([0, 1, 0, 1, 4, 65535], "<u2").tobytes()
    assert table_of(segmented(segments, 5, bits=16)) == [0, 64, 128, 191, 255]


@pytest.mark.parametrize(
    "segments",
    [b"", b"\1\5\0\0", b"\0\2\1\2", b"\2\1\0\0\0\0", b"\7\1\1\1", b"\0\1\1\0\2\1\7\0\0\0"],
)
def test_damaged_segments_are_refused(segments: bytes) -> None:
    with pytest.raises(ImageError, match="palette table red"):
        palette_table(segmented(segments, 256))


@given(st.binary(max_size=64), st.integers(1, 300), st.sampled_from([8, 16]))
def test_any_segments_give_a_table_or_an_image_error(
    segments: bytes, count: int, bits: int
) -> None:
    try:
        _, table = palette_table(segmented(segments, count, bits=bits))
    except ImageError:
        return
    assert table.shape == (count, 3)


def test_a_missing_palette_is_refused() -> None:
    empty = FrameAttributes(dataset=Dataset(), groups=(), little_endian=True, signed=False)
    with pytest.raises(ImageError, match="no red table"):
        palette_table(empty)
