"""The head of a DICOM file: a data set without pixels, where the pixels lie, and their layout.

Everything is checked before it is believed: deflated data sets are inflated under a limit before
pydicom sees them, elements above 1 MiB are left in the file, and Rows, Columns, bits and frames are
held against the limits and the bytes that are really there. No pixel is decoded here.
"""

import io
import re
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from medmo_edge.errors import ImageError
from medmo_edge.image_budgets import (
    FREE_INFLATED_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_INFLATE_RATIO,
    MAX_INFLATED_BYTES,
    check_pixels,
)

DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
DICOMDIR = "1.2.840.10008.1.3.10"

DEFER_BYTES = 2**20
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")
_UID = re.compile(r"[0-9.]{1,64}")
UNDEFINED_LENGTH = 0xFFFFFFFF
_INFLATE_CHUNK = 2**20
_LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT")
_PIXEL_VRS = (b"OB\0\0", b"OW\0\0", b"OF\0\0", b"OD\0\0", b"UN\0\0")
_PIXEL_KEYWORDS = {0x0008: "FloatPixelData", 0x0009: "DoubleFloatPixelData", 0x0010: "PixelData"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed data set and the place of its pixel data in ``stream``.

    ``length`` is in bytes, UNDEFINED_LENGTH for encapsulated pixel data; ``notes`` collects what
    had to be assumed.
    """

    dataset: Any
    transfer_syntax: str
    stream: BinaryIO
    keyword: str
    vr: str
    offset: int
    length: int
    notes: list[str] = field(default_factory=list)

    @property
    def encapsulated(self) -> bool:
        """Whether the pixel data is a sequence of fragments."""
        return self.length == UNDEFINED_LENGTH

    @property
    def little_endian(self) -> bool:
        """Byte order of the data set."""
        return self.transfer_syntax != BIG_ENDIAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the stored values of one frame are laid out; names as in PS3.3 C.7.6.3."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    planar: int
    photometric: str
    num_frames: int
    is_float: bool

    @property
    def values(self) -> int:
        """Stored values in one frame."""
        return self.rows * self.columns * self.samples

    @property
    def frame_bits(self) -> int:
        """Bits of one frame in a native transfer syntax; 4:2:2 keeps two of three samples."""
        bits = self.values * self.bits_allocated
        return bits * 2 // 3 if self.photometric in ("YBR_FULL_422", "YBR_PARTIAL_422") else bits


def read_header(file: BinaryIO) -> Header:
    """Parse an open DICOM file up to its pixel data.

    Errors: ImageError for files that are no DICOM image; pydicom's own exceptions for a data set
    that cannot be parsed (the caller turns them into one line).
    """
    from pydicom import dcmread

    syntax, start = transfer_syntax(file)
    if syntax and not _UID.fullmatch(syntax):
        raise ImageError("DICOM element TransferSyntaxUID is no UID")
    stream = _inflate(file, start) if syntax == DEFLATED else file
    stream.seek(0)
    dataset = dcmread(stream, defer_size=DEFER_BYTES, stop_before_pixels=True, force=True)
    _refuse_directory(dataset)
    notes: list[str] = []
    if not syntax:
        syntax = _guess_syntax(dataset)
        notes.append("transfer syntax is not stated: guessed from the encoding")
    keyword, vr, offset, length = _find_pixels(stream, dataset, syntax)
    return Header(
        dataset=dataset,
        transfer_syntax=syntax,
        stream=stream,
        keyword=keyword,
        vr=vr,
        offset=offset,
        length=length,
        notes=notes,
    )


def transfer_syntax(file: BinaryIO) -> tuple[str, int]:
    """(transfer syntax UID or "", offset of the data set) of an open file, read without pydicom.

    pydicom would inflate a deflated data set whole while reading its meta information.
    """
    file.seek(128)
    start = 132 if file.read(4) == b"DICM" else 0
    file.seek(start)
    syntax, place = "", start
    while True:
        head = file.read(8)
        if len(head) < 8 or head[:2] != b"\x02\x00" or not head[4:6].isalpha():
            return syntax, place
        length = int.from_bytes(head[6:8], "little")
        if head[4:6] in _LONG_VRS:
            length = int.from_bytes(file.read(4), "little")
            file.seek(length, io.SEEK_CUR)
        else:
            value = file.read(length)
            if head[2:4] == b"\x10\x00":
                syntax = value.rstrip(b"\0 ").decode("ascii", "replace")
        place = file.tell()


def _inflate(file: BinaryIO, start: int) -> BinaryIO:
    """The file with its deflated data set inflated, as an Explicit Little Endian one in memory."""
    meta = b"\2\0\x10\0UI\x14\0" + EXPLICIT.encode() + b"\0"
    inflated = io.BytesIO()
    inflated.write(
        bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0" + len(meta).to_bytes(4, "little") + meta
    )
    file.seek(start)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    taken = given = 0
    try:
        while not inflater.eof and (chunk := inflater.unconsumed_tail or file.read(_INFLATE_CHUNK)):
            taken += 0 if chunk is inflater.unconsumed_tail else len(chunk)
            given += inflated.write(inflater.decompress(chunk, _INFLATE_CHUNK))
            _check_inflation(taken, given)
        inflated.write(inflater.flush())
    except zlib.error as error:
        raise ImageError(f"deflated data set is damaged ({error})") from error
    if not inflater.eof:
        raise ImageError("deflated data set is truncated")
    return inflated


def _check_inflation(taken: int, given: int) -> None:
    if given > MAX_INFLATED_BYTES or (
        given > FREE_INFLATED_BYTES and given > MAX_INFLATE_RATIO * taken
    ):
        raise ImageError(
            f"deflated data set grows beyond the limit ({taken} to more than {given} bytes)"
        )


def _refuse_directory(dataset: Any) -> None:
    if (
        dataset.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR
        or "DirectoryRecordSequence" in dataset
    ):
        raise ImageError("is a DICOMDIR index, not an image: name one of the files it lists")
    if len(dataset) == 0:
        raise ImageError("holds no DICOM data element: it is no DICOM file, or a truncated one")


def _guess_syntax(dataset: Any) -> str:
    implicit, little = dataset.original_encoding
    if not little:
        return BIG_ENDIAN
    return IMPLICIT if implicit else EXPLICIT


def _find_pixels(stream: BinaryIO, dataset: Any, syntax: str) -> tuple[str, str, int, int]:
    """(keyword, VR, offset of the value, length) of the pixel element the reader stopped at."""
    order = "big" if syntax == BIG_ENDIAN else "little"
    head = stream.read(8)
    group, element = (int.from_bytes(head[i : i + 2], order) for i in (0, 2))  # type: ignore[arg-type]
    if len(head) < 8 or group != 0x7FE0 or element not in _PIXEL_KEYWORDS:
        if "Rows" in dataset:
            raise ImageError("pixel data is missing: the file is truncated or its header damaged")
        raise ImageError(f"holds no pixel data (it is a {describe_class(dataset)})")
    # Some files state an explicit syntax and are written implicitly: the VR is there or it is not.
    if syntax != IMPLICIT and head[4:8] in _PIXEL_VRS:
        vr, raw = head[4:6].decode("ascii"), stream.read(4)
    else:
        vr, raw = "OW", head[4:8]
    length = int.from_bytes(raw, order)  # type: ignore[arg-type]
    return _PIXEL_KEYWORDS[element], vr, stream.tell(), length


def describe_class(dataset: Any) -> str:
    """Name of the SOP class, or what there is of it."""
    uid = value_of(dataset, "SOPClassUID")
    if not uid:
        return "data set without SOP class"
    name = getattr(uid, "name", str(uid))
    if name != str(uid):
        return str(name)
    return f"SOP class {uid}" if _UID.fullmatch(str(uid)) else "SOP class that is no UID"


def value_of(dataset: Any, keyword: str) -> Any:
    """The value of an element, None when it is absent, empty or cannot be read as its VR says."""
    try:
        value = dataset.get(keyword)
    # pydicom converts on access and raises what the bytes provoke.
    except Exception:
        return None
    return None if value is None or value == "" else value


def read_layout(header: Header) -> Layout:
    """The checked layout of the pixel data.

    Errors: ImageError when an element is missing, contradictory or beyond the limits.
    """
    dataset, is_float = header.dataset, header.keyword != "PixelData"
    rows = _integer(dataset, "Rows", 1, 65535)
    columns = _integer(dataset, "Columns", 1, 65535)
    check_pixels(columns, rows)
    samples = _integer(dataset, "SamplesPerPixel", 1, 4, 1 if is_float else None)
    allocated = _integer(dataset, "BitsAllocated", 1, 64)
    stored = allocated if is_float else _integer(dataset, "BitsStored", 1, allocated)
    layout = Layout(
        rows=rows,
        columns=columns,
        samples=samples,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1
        if is_float
        else _integer(dataset, "HighBit", stored - 1, allocated - 1, stored - 1),
        signed=not is_float and _integer(dataset, "PixelRepresentation", 0, 1) == 1,
        planar=_integer(dataset, "PlanarConfiguration", 0, 1, 0) if samples > 1 else 0,
        photometric=_photometric(dataset, is_float),
        num_frames=_integer(dataset, "NumberOfFrames", 1, MAX_FRAMES, 1),
        is_float=is_float,
    )
    _check_layout(header, layout)
    return layout


def _integer(dataset: Any, keyword: str, low: int, high: int, default: int | None = None) -> int:
    try:
        value = dataset.get(keyword)
    except Exception as error:  # pydicom converts on access and raises what the bytes provoke
        raise ImageError(f"DICOM element {keyword} cannot be read") from error
    if value is None or value == "":
        if default is not None:
            return default
        raise ImageError(f"DICOM element {keyword} is missing")
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise ImageError(f"DICOM element {keyword} is not one number") from error
    if not low <= number <= high:
        raise ImageError(f"DICOM element {keyword} is {number}, not within {low} to {high}")
    return number


def _photometric(dataset: Any, is_float: bool) -> str:
    value = value_of(dataset, "PhotometricInterpretation")
    if not value:
        if is_float:
            return "MONOCHROME2"
        raise ImageError("DICOM element PhotometricInterpretation is missing")
    code = str(value).strip().upper()
    if not is_code(code):
        raise ImageError("DICOM element PhotometricInterpretation is no code")
    return code


def is_code(text: str) -> bool:
    """Whether ``text`` is a code string (PS3.5 6.2, CS): only such values are quoted in errors."""
    return _CODE.fullmatch(text) is not None


def _check_layout(header: Header, layout: Layout) -> None:
    """Hold the promises against each other and, for native pixel data, against the bytes there."""
    allocated, wanted = layout.bits_allocated, _FLOAT_BITS.get(header.keyword)
    if wanted and allocated != wanted or not wanted and allocated not in (1, 8, 16, 32):
        raise ImageError(f"{header.keyword} with {allocated} bits allocated is not supported")
    if layout.frame_bits / 8 > MAX_FRAME_BYTES:
        raise ImageError(
            f"one frame needs {layout.frame_bits // 8} bytes, above the limit of {MAX_FRAME_BYTES}"
        )
    if header.encapsulated:
        return
    needed = (layout.frame_bits * layout.num_frames + 7) // 8
    there = min(header.length, _size(header.stream) - header.offset)
    if there < needed:
        raise ImageError(
            f"pixel data is truncated: {layout.num_frames} frame(s) of {layout.columns} x "
            f"{layout.rows} need {needed} bytes, {there} are there"
        )


_FLOAT_BITS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}


def _size(stream: BinaryIO) -> int:
    place = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    stream.seek(place)
    return size
