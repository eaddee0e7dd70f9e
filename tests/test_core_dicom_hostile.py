"""Broken and hostile DICOM files: one ImageError line, within 10 s and 1 GB, whatever the bytes.

The files are put together byte by byte here, without pydicom, so that they can lie freely.
"""

import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmo_edge.dicom_process import IN_PROCESS
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame, read_image

INSTALLED = Path(pydicom.data.__file__).parent / "test_files"

EXPLICIT = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
JPEG = "1.2.840.10008.1.2.4.50"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
HTJ2K = "1.2.840.10008.1.2.4.201"

LONG = ("OB", "OW", "SQ", "UN", "UT")


def element(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """One explicit little endian element; ``length`` may lie."""
    value += (b"\0" if vr in ("UI", "OB") else b" ") * (len(value) % 2)
    length = len(value) if length is None else length
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr.encode())
    if vr in LONG:
        return head + struct.pack("<HI", 0, length) + value
    return head + struct.pack("<H", length) + value


def us(tag: int, number: int) -> bytes:
    return element(tag, "US", struct.pack("<H", number))


def image_elements(rows: int = 8, columns: int = 8, bits: int = 8) -> dict[int, bytes]:
    return {
        0x00080016: element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.7"),
        0x00280002: us(0x00280002, 1),
        0x00280004: element(0x00280004, "CS", b"MONOCHROME2"),
        0x00280010: us(0x00280010, rows),
        0x00280011: us(0x00280011, columns),
        0x00280100: us(0x00280100, bits),
        0x00280101: us(0x00280101, bits),
        0x00280102: us(0x00280102, bits - 1),
        0x00280103: us(0x00280103, 0),
    }


def fragments(*payloads: bytes) -> bytes:
    """Encapsulated pixel data with an empty offset table."""
    items = b"".join(
        b"\xfe\xff\x00\xe0" + struct.pack("<I", len(payload)) + payload
        for payload in (b"", *payloads)
    )
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    return element(0x7FE00010, "OB", b"", 0xFFFFFFFF) + items + end


def file_bytes(syntax: str, elements: dict[int, bytes], pixels: bytes) -> bytes:
    meta = element(0x00020010, "UI", syntax.encode())
    head = bytes(128) + b"DICM" + element(0x00020000, "UL", struct.pack("<I", len(meta))) + meta
    return head + b"".join(elements[tag] for tag in sorted(elements)) + pixels


def native(size: int = 64, **changes: Any) -> bytes:
    return file_bytes(
        EXPLICIT, image_elements(**changes), element(0x7FE00010, "OB", bytes(range(size)))
    )


def jpeg2000(columns: int, rows: int) -> bytes:
    """The first bytes of a codestream that promises columns x rows, cut to 70 bytes."""
    siz = struct.pack(">HHIIIIIIIIH3B", 41, 0, columns, rows, 0, 0, columns, rows, 0, 0, 1, 7, 1, 1)
    return (b"\xff\x4f\xff\x51" + siz).ljust(70, b"\0")


def jpeg(columns: int, rows: int, marker: int = 0xC0) -> bytes:
    frame = struct.pack(">BBHBHHB3B", 0xFF, marker, 11, 8, rows, columns, 1, 1, 0x11, 0)
    return (b"\xff\xd8" + frame).ljust(70, b"\0")


def rle() -> bytes:
    return (struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0").ljust(70, b"\0")


def compressed(syntax: str, payload: bytes, rows: int = 8, columns: int = 8) -> bytes:
    return file_bytes(syntax, image_elements(rows, columns), fragments(payload))


def deflate_bomb() -> bytes:
    """About 261 kB on disk, 256 MB inflated."""
    elements = b"".join(image_elements().values())
    zeros = element(0x00091010, "OB", b"", 2**28) + bytes(2**28)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return file_bytes(DEFLATED, {}, deflater.compress(elements + zeros) + deflater.flush())


def nested(depth: int) -> bytes:
    """Sequences of undefined length, one inside of the other."""
    opening = element(0x00081140, "SQ", b"", 0xFFFFFFFF) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return file_bytes(EXPLICIT, {0: opening * depth}, b"")


def without(tag: int) -> bytes:
    elements = image_elements()
    del elements[tag]
    return file_bytes(EXPLICIT, elements, element(0x7FE00010, "OB", bytes(64)))


def replaced(tag: int, value: bytes) -> bytes:
    pixels = element(0x7FE00010, "OB", bytes(range(64)))
    return file_bytes(EXPLICIT, {**image_elements(), tag: value}, pixels)


BIG = {"rows": 65535, "columns": 65535}
LARGE = {"rows": 8192, "columns": 8192}  # just within the pixel limit
FRAMES = 0x00280008
TEXT_ROWS = element(0x00280010, "LO", b"eight")
BAD_VR = b"\x28\x00\x00\x01" + b"??" + struct.pack("<HH", 2, 8)

SMALL_LIE, BIG_LIE = jpeg2000(8192, 8192), jpeg2000(60000, 60000)
PIXELS = element(0x7FE00010, "OB", bytes(64))

# name -> (bytes, pattern of the message); these aim at memory or time and go through the child.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "text": (b"Dear colleague, please find attached\n" * 9, "neither a DICOM file nor"),
    "noise": (bytes(128) + b"DICM" + bytes(range(1, 255)) * 9, "damaged|no pixel data|no DICOM"),
    "truncated pixels": (native()[:-9], "pixel data is truncated"),
    "lying rows": (native(rows=60000), "pixel data is truncated"),
    "giant element": (
        replaced(0x00091010, element(0x00091010, "OB", b"x", 0xFFFFFFF0)),
        "no pixel data|damaged",
    ),
    "giant native": (native(**BIG), "above the limit"),
    "giant rle": (compressed(RLE, rle(), **BIG), "above the limit"),
    "giant jpeg 2000": (compressed(JPEG_2000, BIG_LIE, **BIG), "above the limit"),
    "giant jpeg": (compressed(JPEG, jpeg(65535, 65535), **BIG), "above the limit"),
    "large rle": (compressed(RLE, rle(), **LARGE), "cannot hold"),
    "large jpeg 2000": (compressed(JPEG_2000, SMALL_LIE, **LARGE), "cannot be decoded|memory"),
    "large htj2k": (compressed(HTJ2K, SMALL_LIE, **LARGE), "cannot be decoded|memory"),
    "large jpeg": (compressed(JPEG, jpeg(8192, 8192), **LARGE), "cannot be decoded"),
    "large lossless": (
        compressed(JPEG_LOSSLESS, jpeg(8192, 8192, 0xC3), **LARGE),
        "cannot be decoded|one constant",
    ),
    "large jpeg-ls": (compressed(JPEG_LS, jpeg(8192, 8192, 0xF7), **LARGE), "cannot be decoded"),
    "lying jpeg 2000": (compressed(JPEG_2000, BIG_LIE), "compressed frame is 60000 x 60000"),
    "deflate bomb": (deflate_bomb(), "grows beyond the limit"),
    "nested": (nested(3000), "nested too deeply|damaged"),
}

# The same for files that can do no harm: only the message matters.
BROKEN: dict[str, tuple[bytes, str]] = {
    "magic only": (bytes(128) + b"DICM", "no DICOM data element"),
    "no pixel data": (file_bytes(EXPLICIT, image_elements(), b""), "pixel data is missing"),
    "no image at all": (file_bytes(EXPLICIT, {0: us(0x00280002, 1)}, b""), "holds no pixel data"),
    "truncated header": (native()[:200], "damaged|no pixel data"),
    "lying bits": (native(bits=32), "pixel data is truncated"),
    "lying frames": (replaced(FRAMES, element(FRAMES, "IS", b"999999")), "is truncated"),
    "negative frames": (replaced(FRAMES, element(FRAMES, "IS", b"-1")), "NumberOfFrames is -1"),
    "zero rows": (native(rows=0), "Rows is 0"),
    "odd bits": (native(bits=12), "12 bits allocated"),
    "rows as text": (replaced(0x00280010, TEXT_ROWS), "Rows"),
    "unknown vr": (replaced(0x00280100, BAD_VR), "pixel data is missing|BitsAllocated"),
    "lying jpeg": (compressed(JPEG, jpeg(65000, 65000)), "compressed frame is 65000 x 65000"),
    "not a codestream": (compressed(JPEG, b"none" * 40), "no JPEG or JPEG 2000 marker"),
    "empty fragment": (compressed(JPEG, b""), "no JPEG or JPEG 2000 marker"),
    "endless markers": (compressed(JPEG, b"\xff\xd8" + b"\xff" * 999), "ends before its size"),
    "no fragments": (file_bytes(JPEG, image_elements(), fragments()), "no fragment"),
    "cut fragments": (compressed(JPEG, jpeg(8, 8))[:-30], "pixel data is truncated"),
    "encapsulated, not compressed": (compressed(EXPLICIT, b"12345678"), "not compressed"),
    "compressed, not encapsulated": (
        file_bytes(JPEG, image_elements(), PIXELS),
        "not encapsulated",
    ),
    "deflate noise": (file_bytes(DEFLATED, {}, b"\xff" * 999), "deflated data set is damaged"),
    "deflate cut": (
        file_bytes(DEFLATED, {}, zlib.compress(native())[2:-20]),
        "deflated data set is truncated",
    ),
    "dicomdir": (
        file_bytes(EXPLICIT, {0: element(0x00041220, "SQ", b"")}, b""),
        "DICOMDIR index",
    ),
}

MISSING = {
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "PixelRepresentation": 0x00280103,
}

# Reads every file named on standard input; prints error and seconds of each and peak memory.
RUNNER = """
import json, resource, sys, time
from medmo_edge.errors import ImageError
from medmo_edge.images import read_image
results = []
for path in json.load(sys.stdin):
    start = time.monotonic()
    try:
        read_image(path)
        error = None
    except ImageError as caught:
        error = str(caught)
    results.append((error, time.monotonic() - start))
# ru_maxrss of this process would begin at the size of the one that started it
own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
peaks = [int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
json.dump({"results": results, "peak_kb": peaks, "pydicom": "pydicom" in sys.modules}, sys.stdout)
"""


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / f"{name.replace(' ', '-')}.dcm"
    path.write_bytes(data)
    return path


def test_the_builder_makes_readable_files(tmp_path: Path) -> None:
    """Otherwise the files below would be refused for a mistake of this test."""
    frame = read_image(write(tmp_path, "good", native()))
    assert frame.pixels[..., 0].ravel().tolist() == list(range(64))


def test_every_hostile_file_costs_one_line_little_time_and_memory(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, data) for name, (data, _) in HOSTILE.items()]
    bomb = paths[list(HOSTILE).index("deflate bomb")]
    assert 200_000 < bomb.stat().st_size < 300_000
    run = subprocess.run(
        [sys.executable, "-P", "-c", RUNNER],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == "", "noise of a library reached the user"
    report = json.loads(run.stdout)
    assert not report["pydicom"], "the parent process must not parse DICOM itself"
    assert max(report["peak_kb"]) < 10**6
    for path, (error, seconds), (name, (_, reason)) in zip(
        paths, report["results"], HOSTILE.items(), strict=True
    ):
        assert error is not None, f"{name} was rendered"
        assert "\n" not in error
        assert error.startswith(f"{path}: ")
        assert seconds < 10, name
        assert re.search(reason, error), f"{name}: {error}"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For cases in which only the message matters."""
    monkeypatch.setenv(IN_PROCESS, "1")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(ImageError, match=reason):
        read_image(write(tmp_path, "broken", data))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("keyword", "tag"), MISSING.items())
def test_missing_elements_are_named(tmp_path: Path, keyword: str, tag: int) -> None:
    with pytest.raises(ImageError, match=f"DICOM element {keyword} is missing"):
        read_image(write(tmp_path, "missing", without(tag)))


@pytest.mark.usefixtures("in_process")
def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    data = native()
    for length in range(1, len(data)):
        with pytest.raises(ImageError):
            read_image(write(tmp_path, "cut", data[:length]))


def test_a_blank_frame_is_believed_and_a_failed_decode_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(IN_PROCESS, "1")
    blank = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x07" * 32  # 32 runs of 128 sevens
    frame = read_image(write(tmp_path, "blank", compressed(RLE, blank, 64, 64)))
    assert (frame.pixels == 7).all()
    # A picture of 64 x 64 random bytes whose decoder gives zeros.
    noise = np.random.default_rng(0).integers(0, 256, 4096, np.uint8).tobytes()
    runs = b"".join(b"\x7f" + noise[i : i + 128] for i in range(0, 4096, 128))
    path = write(tmp_path, "noise", compressed(RLE, blank[:64] + runs, 64, 64))
    assert read_image(path).pixels.std() > 0
    monkeypatch.setattr(
        "medmo_edge.dicom_decode._by_pydicom",
        lambda *_: (np.zeros((64, 64), np.uint8), {"photometric_interpretation": "MONOCHROME2"}),
    )
    with pytest.raises(ImageError, match="one constant value"):
        read_image(path)
    ends = {tag: us(tag, 0) for tag in (0x00280106, 0x00280107)}
    declared = file_bytes(RLE, {**image_elements(64, 64), **ends}, fragments(blank[:64] + runs))
    assert (read_image(write(tmp_path, "declared", declared)).pixels == 0).all()


@pytest.mark.usefixtures("in_process")
def test_frames_are_found_with_and_without_offset_table(tmp_path: Path) -> None:
    """Three JPEG frames, the second one in two fragments, found by their start markers."""
    import io

    from PIL import Image

    payloads = []
    for level in (30, 90, 200):
        stream = io.BytesIO()
        Image.new("L", (8, 8), level).save(stream, "JPEG", quality=95)
        payloads.append(stream.getvalue() + b"\0" * (stream.tell() % 2))
    middle = [payloads[1][:100], payloads[1][100:]]
    elements = image_elements() | {0x00280008: element(0x00280008, "IS", b"3")}
    data = file_bytes(JPEG, elements, fragments(payloads[0], *middle, payloads[2]))
    path = write(tmp_path, "three", data)
    levels = [int(read_image(path, frame=number).pixels.mean()) for number in range(3)]
    assert np.abs(np.array(levels) - [30, 90, 200]).max() <= 1


FUZZED = {
    "native": native(),
    "rle": (INSTALLED / "SC_rgb_rle.dcm").read_bytes(),
    "deflated": file_bytes(
        DEFLATED, {}, zlib.compress(native()[native().index(b"\x08\x00\x16") :])[2:-4]
    ),
    "big endian": (INSTALLED / "rtdose_expb_1frame.dcm").read_bytes(),
}
MUTATIONS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8)


def mutated(data: bytes, changes: list[tuple[float, int]], keep: float) -> bytes:
    changed = bytearray(data)
    for place, value in changes:
        changed[int(place * len(data))] = value
    return bytes(changed[: max(1, int(keep * len(data)))])


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=MUTATIONS, keep=st.sampled_from([1.0, 1.0, 0.97, 0.5]))
def test_any_mutation_gives_a_frame_or_an_image_error(
    name: str,
    changes: list[tuple[float, int]],
    keep: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process: the decoders of these syntaxes are memory-safe, a crash would be ours."""
    monkeypatch.setenv(IN_PROCESS, "1")
    path = write(tmp_path, "fuzz", mutated(FUZZED[name], changes, keep))
    try:
        frame = read_image(path)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(frame, Frame)
        json.dumps(frame.source.to_dict())
