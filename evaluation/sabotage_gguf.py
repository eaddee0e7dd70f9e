"""Faults put into GGUF artifacts and the llama.cpp backend; see ``sabotage``.

Files are changed in place, in the type each tensor is stored in. Nothing here repairs anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SCALE = 1.05

# Where a block of each quantised type keeps the float16 numbers that scale it: (bytes of a block,
# offsets). Source: ggml-common.h.
_SCALES = {
    "Q8_0": (34, (0,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
    "IQ4_XS": (136, (0,)),
}


@contextmanager
def _gguf(folder: Path, name: str) -> Iterator[Any]:
    """A GGUF file whose tensors and numbers can be changed in place."""
    from gguf import GGUFReader

    reader = GGUFReader(folder / name, "r+")
    yield reader
    reader.data.flush()


def _tensors(reader: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in reader.tensors}


def drop_deepstack(folder: Path) -> None:
    """Zeros for the last matrix and bias of every deepstack merger."""
    with _gguf(folder, "mmproj.gguf") as reader:
        for name, tensor in _tensors(reader).items():
            if name.startswith("v.deepstack.") and ".fc2." in name:
                tensor.data[...] = 0


@contextmanager
def deepstack_not_injected(_: Checkpoint) -> Iterator[None]:
    """Image rows reach the decoder with their main features alone."""
    from medmo_edge.runtime.llamacpp import LlamaCpp

    real = LlamaCpp.append_rows

    def append(self: Any, rows: NDArray[np.float32], height: int, width: int) -> None:
        main = self._facts.hidden_size
        real(self, np.concatenate([rows[:, :main], 0 * rows[:, main:]], axis=1), height, width)

    with patch.object(LlamaCpp, "append_rows", append):
        yield


def one_dimensional_rope(folder: Path) -> None:
    """All frequencies follow the time axis, on which an image's tokens are all at one place."""
    with _gguf(folder, "model.gguf") as reader:
        field = reader.fields["qwen3vl.rope.dimension_sections"]
        parts = [field.parts[index] for index in field.data]
        parts[0][0] = sum(int(part[0]) for part in parts)
        for part in parts[1:]:
            part[0] = 0


@contextmanager
def loose_corners(checkpoint: Checkpoint) -> Iterator[None]:
    """The vision tower of the checkpoint with positions interpolated between pixel centres."""
    from medmo_edge.evaluation import plain_forward
    from medmo_edge.runtime.llamacpp import LlamaCpp

    def stretch(side: int, count: int) -> NDArray[np.float32]:
        at = np.clip((np.arange(count) + 0.5) * side / count - 0.5, 0, side - 1)
        away = np.abs(at[:, None] - np.arange(side))
        return np.asarray(np.maximum(0, 1 - away), np.float32)

    def encode(self: Any, resized: NDArray[np.uint8]) -> NDArray[np.float32]:
        return plain_forward.encode(checkpoint, resized)

    with (
        patch.object(plain_forward, "_stretch", stretch),
        patch.object(LlamaCpp, "encode_image", encode),
    ):
        yield


def _swap(folder: Path, file: str, first: str, second: str) -> None:
    with _gguf(folder, file) as reader:
        tensors = _tensors(reader)
        for name, tensor in tensors.items():
            if name.startswith(first):
                other = tensors[second + name.removeprefix(first)]
                if other.tensor_type != tensor.tensor_type:
                    continue  # mixed types of k-quants: these two stay
                kept = tensor.data.copy()
                tensor.data[...] = other.data
                other.data[...] = kept


def swap_layers(folder: Path) -> None:
    """The first two layers of the language model."""
    _swap(folder, "model.gguf", "blk.0.", "blk.1.")


def swap_vision_layers(folder: Path) -> None:
    """The first two layers of the vision tower."""
    _swap(folder, "mmproj.gguf", "v.blk.0.", "v.blk.1.")


def clip_mean(folder: Path) -> None:
    """The vision file normalises as CLIP does."""
    with _gguf(folder, "mmproj.gguf") as reader:
        for key, values in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
            field = reader.fields[f"clip.vision.{key}"]
            for index, value in zip(field.data, values, strict=True):
                field.parts[index][0] = value


def scale_one_tensor(folder: Path) -> None:
    """The value projection of the last layer, all of its scales."""
    with _gguf(folder, "model.gguf") as reader:
        names = [tensor.name for tensor in reader.tensors if tensor.name.endswith("attn_v.weight")]
        scale_tensor(_tensors(reader)[names[-1]], SCALE)


def scale_tensor(tensor: Any, factor: float) -> None:
    """Multiply one tensor of an open GGUF file by ``factor``, in the type it is stored in."""
    kind = tensor.tensor_type.name
    if kind in _SCALES:
        size, offsets = _SCALES[kind]
        blocks = tensor.data.reshape(-1, size)
        for offset in offsets:
            scales = blocks[:, offset : offset + 2].copy().view(np.float16)
            blocks[:, offset : offset + 2] = (scales * np.float16(factor)).view(np.uint8)
    elif kind == "BF16":
        bits = tensor.data.view(np.uint16).astype(np.uint32) << 16
        scaled = (bits.view(np.float32) * np.float32(factor)).view(np.uint32)
        tensor.data.view(np.uint16)[...] = scaled >> 16
    else:
        tensor.data[...] = tensor.data * factor
