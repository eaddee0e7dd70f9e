"""The header of a GGUF file, read to refuse files that would make llama.cpp abort the process.

llama.cpp answers most damage with an error, but a missing count or tensor can end in a division by
zero or an assertion, which no caller can catch. Only that is checked here: no weights are read, and
a file made to attack is not detected. Layout: ggml/include/gguf.h, version 3, little endian.
"""

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmo_edge.errors import ArtifactError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 16

#: what must be there: a positive number, a text, or an array of at least one element
POSITIVE, TEXT, ARRAY = "a positive number", "a text", "an array"
_COUNTS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
LANGUAGE_KEYS = {
    "general.architecture": TEXT,
    **{f"qwen3vl.{name}": POSITIVE for name in _COUNTS},
    "qwen3vl.attention.head_count_kv": POSITIVE,
    "qwen3vl.attention.key_length": POSITIVE,
    "qwen3vl.attention.value_length": POSITIVE,
    "qwen3vl.context_length": POSITIVE,
    "qwen3vl.n_deepstack_layers": POSITIVE,
    "qwen3vl.rope.dimension_sections": ARRAY,
    "qwen3vl.rope.freq_base": POSITIVE,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.merges": ARRAY,
    "tokenizer.ggml.token_type": ARRAY,
    "tokenizer.ggml.tokens": ARRAY,
}
VISION_KEYS = {
    "general.architecture": TEXT,
    "clip.projector_type": TEXT,
    **{f"clip.vision.{name}": POSITIVE for name in _COUNTS},
    "clip.vision.image_mean": ARRAY,
    "clip.vision.image_size": POSITIVE,
    "clip.vision.image_std": ARRAY,
    "clip.vision.is_deepstack_layers": ARRAY,
    "clip.vision.patch_size": POSITIVE,
    "clip.vision.projection_dim": POSITIVE,
    "clip.vision.spatial_merge_size": POSITIVE,
}


#: tensors of the vision tower that llama.cpp takes for granted
VISION_TENSORS = (
    "v.patch_embd.weight",
    "v.patch_embd.weight.1",
    "v.patch_embd.bias",
    "v.position_embd.weight",
    "v.post_ln.weight",
    "v.post_ln.bias",
)


@dataclass(frozen=True, slots=True)
class Array:
    """An array value; its elements are skipped."""

    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata (key -> number, bool, text or ``Array``) and the names of the tensors."""

    values: dict[str, Any]
    tensors: tuple[str, ...]


def check_header(path: Path, required: Mapping[str, str], tensors: Sequence[str] = ()) -> None:
    """Refuse a file whose header cannot be read or lacks what ``required`` and ``tensors`` name.

    Errors: ArtifactError naming the file and the key or tensor.
    """
    header = read_header(path)
    for key, what in required.items():
        if not _is(what, header.values.get(key)):
            raise ArtifactError(f"{path}: {key} is not {what}: export again")
    for name in tensors:
        if name not in header.tensors:
            raise ArtifactError(f"{path}: tensor {name} is missing: export again")


def _is(what: str, value: Any) -> bool:
    if what == TEXT:
        return isinstance(value, str) and value != ""
    if what == ARRAY:
        return isinstance(value, Array) and value.length > 0
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and 0 < value < 1 << 32


def read_header(path: Path) -> Header:
    """Errors: ArtifactError when the file does not begin with a whole GGUF header."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (OSError, OverflowError, ValueError, struct.error) as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"{path} is not a GGUF file ({text}): export again") from error


class _Reader:
    """Walks over the bytes; every read beyond the end is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise ValueError("no GGUF signature")
        self._at = 4
        version, tensors, keys = self._number("I"), self._number("Q"), self._number("Q")
        if version != 3 or keys > _MAX_ENTRIES or tensors > _MAX_ENTRIES:
            raise ValueError(f"version {version}, {keys} keys, {tensors} tensors")
        values = {self._text(): self._value(self._number("I")) for _ in range(keys)}
        return Header(values, tuple(self._tensor() for _ in range(tensors)))

    def _tensor(self) -> str:
        """Name of one tensor; its dimensions, type and offset are skipped."""
        name = self._text()
        dimensions = self._number("I")
        self._at += 8 * dimensions + 4 + 8
        if self._at > len(self._data):
            raise ValueError("tensor table beyond the end of the file")
        return name

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._skip_array(self._number("I"), self._number("Q"))
        return self._number(_scalar(kind))

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        if self._at + length > len(self._data):
            raise ValueError("text beyond the end of the file")
        text = self._data[self._at : self._at + length].decode("utf-8", "replace")
        self._at += length
        return text

    def _skip_array(self, kind: int, length: int) -> Array:
        if kind != _STRING:
            self._at += length * struct.calcsize(_scalar(kind))
        elif length > len(self._data):
            raise ValueError("array beyond the end of the file")
        else:
            for _ in range(length):
                self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
        if self._at > len(self._data):
            raise ValueError("array beyond the end of the file")
        return Array(length)


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _SCALARS[kind]
