"""What a compressed frame says about itself, read from its first bytes before any decoder runs.

A codec allocates what the codestream promises, whatever the DICOM header says, so both must agree.
Only the size is parsed: JPEG and JPEG-LS frame headers (ITU T.81 B.2.2, T.87), the JPEG 2000 SIZ
segment (T.800 A.5.1), the RLE header (PS3.5 Annex G).
"""

from dataclasses import dataclass

from medmo_edge.errors import ImageError

RLE_LONGEST_RUN = 64  # two bytes give at most 128

_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}) | {0xF7}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


@dataclass(frozen=True, slots=True)
class CodestreamSize:
    """Size of a compressed frame: pixels, samples per pixel, bits per sample."""

    columns: int
    rows: int
    samples: int
    precision: int


def codestream_size(payload: bytes) -> CodestreamSize:
    """Read the size of a JPEG, JPEG-LS, JPEG 2000 or HTJ2K codestream.

    Errors: ImageError when the bytes are none of these or end before the size is known.
    """
    try:
        if payload[:2] == b"\xff\xd8":
            return _jpeg_size(payload)
        start = payload.find(b"\xff\x4f\xff\x51", 0, 4096)  # after the boxes of a JP2 wrapper
        if start >= 0:
            return _jpeg2000_size(payload, start + 4)
    except IndexError as error:
        raise ImageError("compressed frame ends before its size is known") from error
    raise ImageError("compressed frame starts with no JPEG or JPEG 2000 marker")


def _jpeg_size(payload: bytes) -> CodestreamSize:
    place = 2
    while True:
        if payload[place] != 0xFF:
            raise ImageError("compressed frame has damaged JPEG markers")
        marker = payload[place + 1]
        if marker == 0xFF or marker in _STANDALONE:
            place += 1 if marker == 0xFF else 2
            continue
        if marker in _JPEG_FRAMES:
            height, width = _word(payload, place + 5), _word(payload, place + 7)
            return CodestreamSize(width, height, payload[place + 9], payload[place + 4])
        if marker in (0xD9, 0xDA):
            raise ImageError("compressed frame has no JPEG frame header")
        place += 2 + _word(payload, place + 2)


def _jpeg2000_size(payload: bytes, siz: int) -> CodestreamSize:
    x1, y1, x0, y0 = (_long(payload, siz + 4 + 4 * i) for i in range(4))
    samples, precision = _word(payload, siz + 36), (payload[siz + 38] & 0x7F) + 1
    return CodestreamSize(x1 - x0, y1 - y0, samples, precision)


def _word(payload: bytes, place: int) -> int:
    return payload[place] << 8 | payload[place + 1]


def _long(payload: bytes, place: int) -> int:
    return _word(payload, place) << 16 | _word(payload, place + 2)


def check_rle(payload: bytes, frame_bytes: int) -> None:
    """Refuse an RLE frame that cannot hold ``frame_bytes`` even when every run is the longest.

    Errors: ImageError.
    """
    if len(payload) < 66 or (len(payload) - 64) * RLE_LONGEST_RUN < frame_bytes:
        raise ImageError(f"RLE frame of {len(payload)} bytes cannot hold {frame_bytes} bytes")
