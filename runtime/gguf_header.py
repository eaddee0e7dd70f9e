"""The metadata of a GGUF file, read to refuse files that would make llama.cpp abort the process.

llama.cpp answers most damage with an error, but a missing or zero count ends in a division by zero
or an assertion, which no caller can catch. Only that is checked here: tensors are not read, and a
file made to attack is not detected. Layout: ggml/include/gguf.h, version 3, little endian.
"""

import mmap
import struct
from collections.abc import Mapping
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
_MAX_KEYS = 4096

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


@dataclass(frozen=True, slots=True)
class Array:
    """An array value; its elements are skipped."""

    length: int


def check_metadata(path: Path, required: Mapping[str, str]) -> None:
    """Refuse a file whose metadata lacks what ``required`` names, or cannot be read.

    Errors: ArtifactError naming the file and the key.
    """
    values = read_metadata(path)
    for key, what in required.items():
        value = values.get(key)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {
            POSITIVE: numeric and value is not None and 0 < value < 1 << 32,
            TEXT: isinstance(value, str) and value != "",
            ARRAY: isinstance(value, Array) and value.length > 0,
        }
        if not fits[what]:
            raise ArtifactError(f"{path}: {key} is not {what}: export again")


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> number, bool, text or ``Array``. Errors: ArtifactError when it is no GGUF metadata."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).metadata()
    except (OSError, ValueError, struct.error, IndexError) as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"{path} is not a GGUF file ({text}): export again") from error


class _Reader:
    """Walks over the bytes; every read beyond the end is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise ValueError("no GGUF signature")
        self._at = 4
        version, _, keys = self._number("I"), self._number("Q"), self._number("Q")
        if version != 3 or keys > _MAX_KEYS:
            raise ValueError(f"version {version} with {keys} keys")
        return {self._text(): self._value(self._number("I")) for _ in range(keys)}

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
