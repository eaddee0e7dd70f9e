"""Stored values of native frames, bit by bit, and the bytes that make up a compressed frame."""

import io
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from medmo_edge.dicom_codestream import CodestreamSize, check_rle, codestream_size
from medmo_edge.dicom_decode import DECODER_MODULES, DECODERS, PACKAGES, decode_frame
from medmo_edge.dicom_fragments import read_frame_payload
from medmo_edge.dicom_header import UNDEFINED_LENGTH, Header, Layout
from medmo_edge.errors import ImageError
from medmo_edge.images import read_image

INSTALLED = Path(pydicom.data.__file__).parent / "test_files"
LITTLE, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
JPEG = "1.2.840.10008.1.2.4.50"

BYTES = Layout(
    rows=1,
    columns=4,
    samples=1,
    bits_allocated=8,
    bits_stored=8,
    high_bit=7,
    signed=False,
    planar=0,
    photometric="MONOCHROME2",
    num_frames=1,
    is_float=False,
)
WORDS = replace(BYTES, bits_allocated=16, bits_stored=12, high_bit=11)


def header(
    data: bytes, *, syntax: str = LITTLE, vr: str = "OW", length: int | None = None
) -> Header:
    return Header(
        dataset=Dataset(),
        transfer_syntax=syntax,
        stream=io.BytesIO(data),
        keyword="PixelData",
        vr=vr,
        offset=0,
        length=len(data) if length is None else length,
    )


def stored(data: bytes, layout: Layout, frame: int = 0, **options: str) -> list[object]:
    return list(decode_frame(header(data, **options), layout, frame).values.reshape(-1).tolist())  # type: ignore[arg-type]


def test_bits_outside_of_the_stored_ones_are_masked() -> None:
    data = struct.pack("<4H", 0xF000, 0xF001, 0x0FFF, 0x8800)
    assert stored(data, WORDS) == [0, 1, 0xFFF, 0x800]
    assert stored(data, replace(WORDS, high_bit=15)) == [0xF00, 0xF00, 0x0FF, 0x880]
    assert stored(data, replace(WORDS, high_bit=13)) == [0xC00, 0xC00, 0x3FF, 0x200]


def test_the_sign_is_the_highest_stored_bit() -> None:
    data = struct.pack("<4H", 0x0800, 0x0FFF, 0x0000, 0xF7FF)
    assert stored(data, replace(WORDS, signed=True)) == [-2048, -1, 0, 2047]


@given(st.integers(1, 16), st.data())
def test_any_depth_is_read_from_any_bit(bits: int, data: st.DataObject) -> None:
    high = data.draw(st.integers(bits - 1, 15))
    signed = data.draw(st.booleans())
    low = -(2 ** (bits - 1)) if signed else 0
    values = data.draw(st.lists(st.integers(low, low + 2**bits - 1), min_size=4, max_size=4))
    noise = data.draw(st.integers(0, 2**16 - 1))
    shift, mask = high + 1 - bits, 2**bits - 1
    words = [(value & mask) << shift | noise & ~(mask << shift) & 0xFFFF for value in values]
    layout = replace(WORDS, bits_stored=bits, high_bit=high, signed=signed)
    assert stored(struct.pack("<4H", *words), layout) == values


def test_big_endian_words() -> None:
    assert stored(struct.pack(">4H", 1, 2, 3, 4), WORDS, syntax=BIG) == [1, 2, 3, 4]


@pytest.mark.parametrize("frame", [0, 1])
def test_big_endian_bytes_written_as_words(frame: int) -> None:
    """Frames of 9 bytes: the second one starts inside of a word."""
    data = bytes(range(1, 19))
    swapped = np.frombuffer(data, "<u2").astype(">u2").tobytes()
    layout = replace(BYTES, columns=9, num_frames=2)
    assert stored(swapped, layout, frame, syntax=BIG) == list(data[9 * frame : 9 * frame + 9])
    assert stored(data, layout, frame, syntax=BIG, vr="OB") == list(data[9 * frame :][:9])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_one_bit_frames_need_not_start_at_a_byte(
    rows: int, columns: int, frames: int, seed: int
) -> None:
    bits = np.random.default_rng(seed).integers(0, 2, (frames, rows * columns), np.uint8)
    data = np.packbits(bits.reshape(-1), bitorder="little").tobytes()
    layout = replace(
        BYTES, rows=rows, columns=columns, bits_allocated=1, bits_stored=1, num_frames=frames
    )
    layout = replace(layout, high_bit=0)
    for frame in range(frames):
        assert stored(data, layout, frame) == bits[frame].tolist()


def test_planes_become_pixels() -> None:
    layout = replace(BYTES, samples=3, columns=2, photometric="RGB")
    assert stored(bytes([1, 2, 3, 4, 5, 6]), layout) == [1, 2, 3, 4, 5, 6]
    planes = replace(layout, planar=1)
    assert stored(bytes([1, 4, 2, 5, 3, 6]), planes) == [1, 2, 3, 4, 5, 6]


def test_halved_chroma_is_spread_over_pixel_pairs() -> None:
    layout = replace(BYTES, samples=3, photometric="YBR_FULL_422")
    decoded = decode_frame(header(bytes([10, 20, 7, 8, 30, 40, 9, 6])), layout, 0)
    assert decoded.values.tolist() == [[[10, 7, 8], [20, 7, 8], [30, 9, 6], [40, 9, 6]]]
    assert decoded.photometric == "YBR_FULL"


def test_no_decoder_is_gpl_and_every_one_is_described() -> None:
    """pylibjpeg serves JPEG only through pylibjpeg-libjpeg, which is GPL: never ask it for that."""
    jpegs = [f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81)]
    assert all("pylibjpeg" not in DECODERS[syntax] for syntax in jpegs)
    named = {name for names in DECODERS.values() for name in names} - {"pydicom"}
    assert named == set(DECODER_MODULES) | {"imagecodecs"}
    assert named <= set(PACKAGES)


def item(payload: bytes) -> bytes:
    return b"\xfe\xff\x00\xe0" + struct.pack("<I", len(payload)) + payload


END = b"\xfe\xff\xdd\xe0\0\0\0\0"


def payloads(data: bytes, frames: int, table: bytes = b"", **extended: bytes) -> list[bytes]:
    made = header(item(table) + data + END, syntax=JPEG, vr="OB", length=UNDEFINED_LENGTH)
    for keyword, value in extended.items():
        setattr(made.dataset, keyword, value)
    layout = replace(BYTES, num_frames=frames)
    return [read_frame_payload(made, layout, frame) for frame in range(frames)]


A, B, C = b"\xff\xd8aaaa", b"\xff\xd8bb", b"cccc"  # B and C are one frame


def test_one_fragment_a_frame() -> None:
    assert payloads(item(A) + item(B) + item(C), 3) == [A, B, C]


def test_one_frame_in_several_fragments() -> None:
    assert payloads(item(A) + item(C), 1) == [A + C]


def test_frames_by_basic_offset_table() -> None:
    table = struct.pack("<2I", 0, 8 + len(A))
    assert payloads(item(A) + item(B) + item(C), 2, table) == [A, B + C]


def test_frames_by_extended_offset_table() -> None:
    offsets = struct.pack("<2Q", 0, 8 + len(A))
    found = payloads(item(A) + item(B) + item(C), 2, ExtendedOffsetTable=offsets)
    assert found == [A, B + C]


def test_frames_by_start_markers() -> None:
    assert payloads(item(A) + item(B) + item(C), 2) == [A, B + C]


@pytest.mark.parametrize(
    ("data", "frames", "table", "reason"),
    [
        (item(A), 2, b"", r"1 fragment\(s\) for 2 frames"),
        (item(A) + item(B) + item(C), 2, struct.pack("<2I", 0, 9), "between the fragments"),
        (item(C) + item(C) + item(C), 2, b"", "but 0 of them"),
        (item(A) + b"\xfe\xff\x00\xe0\xff\xff\xff\x7f", 1, b"", "beyond the file"),
        (item(A) + b"nonsense", 1, b"", "truncated|damaged"),
    ],
)
def test_damaged_fragments_are_refused(data: bytes, frames: int, table: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        payloads(data, frames, table)


def test_sizes_of_codestreams() -> None:
    sof = struct.pack(">BBHBHHB", 0xFF, 0xC3, 11, 12, 480, 640, 1)
    comment = b"\xff\xfe\0\4hi"
    assert codestream_size(b"\xff\xd8" + comment + b"\xff" + sof) == CodestreamSize(640, 480, 1, 12)
    siz = struct.pack(">HHIIIIIIIIH3B", 47, 0, 650, 490, 10, 10, 1, 1, 0, 0, 3, 15, 1, 1)
    expected = CodestreamSize(640, 480, 3, 16)
    assert codestream_size(b"\xff\x4f\xff\x51" + siz) == expected
    jp2 = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60)
    assert codestream_size(jp2 + b"\xff\x4f\xff\x51" + siz) == expected


@given(st.binary(max_size=80))
def test_any_bytes_have_a_size_or_an_image_error(tail: bytes) -> None:
    for start in (b"\xff\xd8", b"\xff\x4f\xff\x51", b""):
        try:
            codestream_size(start + tail)
        except ImageError:
            continue


def test_run_lengths_have_a_limit() -> None:
    check_rle(bytes(64) + bytes(2), 128)
    with pytest.raises(ImageError, match="cannot hold"):
        check_rle(bytes(64) + bytes(2), 129)


def test_a_decoder_that_panics_means_a_damaged_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pylibjpeg-rle leaves its buffer here; its panic is no Exception, and no frame is shown."""
    content = bytearray((INSTALLED / "MR_small_RLE.dcm").read_bytes())
    assert content[3614] == 63
    content[3614] = 34
    path = tmp_path / "panic.dcm"
    path.write_bytes(content)
    for inside in ("0", "1"):
        monkeypatch.setenv("MEDMO_EDGE_DICOM_IN_PROCESS", inside)
        with pytest.raises(ImageError, match="frame is damaged: pylibjpeg cannot follow it"):
            read_image(path)
