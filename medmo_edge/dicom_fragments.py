"""Encapsulated pixel data: find the bytes of one compressed frame without reading the others.

Every item header is visited (eight bytes each), so a truncated file is noticed before decoding
(PS3.5 Annex A.4). Frames are found by the Extended Offset Table, the Basic Offset Table, or by
counting; without a table, fragments of several frames are told apart by codec start markers.
"""

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO

from medmo_edge.dicom_header import Header, Layout
from medmo_edge.errors import ImageError
from medmo_edge.image_budgets import MAX_FRAME_BYTES

MAX_FRAGMENTS = 2**20

_ITEM = b"\xfe\xff\x00\xe0"
_END = b"\xfe\xff\xdd\xe0"
_FRAME_STARTS = (b"\xff\xd8", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")


@dataclass(frozen=True, slots=True)
class Fragment:
    """One item: place of its header relative to the first item, place of its value, its length."""

    start: int
    value: int
    length: int


def read_frame_payload(header: Header, layout: Layout, frame: int) -> bytes:
    """The compressed bytes of frame ``frame``.

    Errors: ImageError when the items are damaged, truncated or fewer than the frames.
    """
    stream = header.stream
    table, fragments = _walk(stream, header.offset)
    chosen = _fragments_of(header, layout, frame, table, fragments)
    if sum(fragment.length for fragment in chosen) > MAX_FRAME_BYTES:
        raise ImageError("compressed frame is above the limit")
    pieces = []
    for fragment in chosen:
        stream.seek(fragment.value)
        pieces.append(stream.read(fragment.length))
    return b"".join(pieces)


def _walk(stream: BinaryIO, offset: int) -> tuple[list[int], list[Fragment]]:
    """(Basic Offset Table, fragments) of the pixel data whose value starts at ``offset``."""
    end = stream.seek(0, io.SEEK_END)
    stream.seek(offset)
    table: list[int] | None = None
    fragments: list[Fragment] = []
    base = 0
    while True:
        place = stream.tell()
        head = stream.read(8)
        if head[:4] == _END:
            break
        length = int.from_bytes(head[4:8], "little")
        if len(head) < 8 or place + 8 + length > end:
            raise ImageError("pixel data is truncated: a fragment ends beyond the file")
        if head[:4] != _ITEM:
            raise ImageError("pixel data is damaged: no fragment where one must start")
        if table is None:
            table = _offsets(stream.read(length))
            base = stream.tell()
            continue
        fragments.append(Fragment(place - base, place + 8, length))
        if len(fragments) > MAX_FRAGMENTS:
            raise ImageError(f"pixel data has more than {MAX_FRAGMENTS} fragments")
        stream.seek(length, io.SEEK_CUR)
    if not fragments:
        raise ImageError("pixel data has no fragment")
    return table or [], fragments


def _offsets(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))


def _fragments_of(
    header: Header, layout: Layout, frame: int, table: list[int], fragments: list[Fragment]
) -> list[Fragment]:
    frames = layout.num_frames
    if len(fragments) == frames:
        return [fragments[frame]]
    if frames == 1:
        return fragments
    if len(fragments) < frames:
        raise ImageError(f"has {len(fragments)} fragment(s) for {frames} frames")
    starts = _extended_offsets(header) or table or _starts_by_marker(header.stream, fragments)
    if len(starts) != frames:
        raise ImageError(f"has {frames} frames, but {len(starts)} of them can be found")
    begin = starts[frame]
    stop = starts[frame + 1] if frame + 1 < frames else fragments[-1].start + 1
    chosen = [fragment for fragment in fragments if begin <= fragment.start < stop]
    if not chosen or chosen[0].start != begin:
        raise ImageError("offset table points between the fragments")
    return chosen


def _extended_offsets(header: Header) -> list[int]:
    data = header.dataset.get("ExtendedOffsetTable")
    if not isinstance(data, bytes):
        return []
    return list(struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8]))


def _starts_by_marker(stream: BinaryIO, fragments: list[Fragment]) -> list[int]:
    starts = []
    for fragment in fragments:
        stream.seek(fragment.value)
        if stream.read(8).startswith(_FRAME_STARTS):
            starts.append(fragment.start)
    return starts
