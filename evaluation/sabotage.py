"""Deliberate faults for the gate's own test: how real exports and runtimes went wrong.

Each fault damages a copy of an artifact and gives it a manifest that fits again, so that no hash
can catch it, or patches the runtime for a while. Only GGUF artifacts are damaged here. A gate that
passes one of these is broken; benchmarks/sabotage_matrix.py prints which stage caught which.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from medmo_edge.images import Frame
from medmo_edge.manifest import MANIFEST_NAME, Manifest, record_file, write_manifest
from medmo_edge.runtime.chat import Chat, Picture

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to break an artifact; ``stages`` are those of which at least one must notice.

    ``damage`` changes the files of a folder, ``patching`` the runtime while the context is open.
    """

    name: str
    what: str
    stages: tuple[str, ...]
    damage: Callable[[Path], None] | None = None
    patching: Callable[[], AbstractContextManager[Any]] = nullcontext


def damaged_copy(artifact: Path, fault: Fault, folder: Path) -> Path:
    """A copy of ``artifact`` at ``folder`` with the fault in it and a manifest that fits."""
    shutil.copytree(artifact, folder)
    if fault.damage is not None:
        fault.damage(folder)
        rehash(folder)
    return folder


def rehash(folder: Path) -> None:
    """Make the manifest fit the files again, as an exporter that made the error would have."""
    values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    for name, record in values["files"].items():
        values["files"][name] = record_file(folder / name, record["role"])
    write_manifest(folder, Manifest(**values))


def _edit_manifest(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    write_manifest(folder, Manifest(**(values | changes)))


@contextmanager
def _gguf(folder: Path, name: str) -> Iterator[Any]:
    """A GGUF file whose tensors and numbers can be changed in place."""
    from gguf import GGUFReader

    reader = GGUFReader(folder / name, "r+")
    yield reader
    reader.data.flush()


def _tensors(reader: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in reader.tensors}


def _drop_deepstack(folder: Path) -> None:
    with _gguf(folder, "mmproj.gguf") as reader:
        for name, tensor in _tensors(reader).items():
            if name.startswith("v.deepstack.") and ".fc2." in name:
                tensor.data[...] = 0


@contextmanager
def _deepstack_not_injected() -> Iterator[None]:
    from medmo_edge.runtime.llamacpp import LlamaCpp

    real = LlamaCpp.append_rows

    def append(self: Any, rows: NDArray[np.float32], height: int, width: int) -> None:
        main = self._facts.hidden_size
        real(self, np.concatenate([rows[:, :main], 0 * rows[:, main:]], axis=1), height, width)

    with patch.object(LlamaCpp, "append_rows", append):
        yield


def _one_dimensional_rope(folder: Path) -> None:
    """All frequencies follow the time axis, on which an image's tokens are all at one place."""
    with _gguf(folder, "model.gguf") as reader:
        field = reader.fields["qwen3vl.rope.dimension_sections"]
        parts = [field.parts[index] for index in field.data]
        parts[0][0] = sum(int(part[0]) for part in parts)
        for part in parts[1:]:
            part[0] = 0


@contextmanager
def _running_positions() -> Iterator[None]:
    """Image tokens counted like words: the other way to lose the second dimension."""
    from medmo_edge.runtime import llamacpp_vision

    def positions(height: int, width: int, start: int) -> NDArray[np.int32]:
        sections = np.zeros((4, height * width), np.int32)
        sections[:3] = start + np.arange(height * width, dtype=np.int32)
        return sections

    with patch.object(llamacpp_vision, "image_positions", positions):
        yield


def _loose_corners(folder: Path) -> None:
    """The position table warped so that llama.cpp's aligned interpolation onto a 16 x 16 grid reads
    what an interpolation by pixel centres would have read from the original.
    """
    grid = 16
    with _gguf(folder, "mmproj.gguf") as reader:
        tensor = _tensors(reader)["v.position_embd.weight"]
        side = math.isqrt(len(tensor.data))
        aligned = np.arange(side) * (grid - 1) / (side - 1)
        loose = np.clip((aligned + 0.5) * side / grid - 0.5, 0, side - 1)
        mixing = np.maximum(0, 1 - np.abs(loose[:, None] - np.arange(side)))
        square = tensor.data.reshape(side, side, -1).astype(np.float64)
        warped = np.einsum("ha,abd,wb->hwd", mixing, square, mixing)
        tensor.data[...] = warped.reshape(tensor.data.shape)


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


def _swap_layers(folder: Path) -> None:
    _swap(folder, "model.gguf", "blk.0.", "blk.1.")


def _swap_vision_layers(folder: Path) -> None:
    _swap(folder, "mmproj.gguf", "v.blk.0.", "v.blk.1.")


def _clip_mean(folder: Path) -> None:
    with _gguf(folder, "mmproj.gguf") as reader:
        for key, values in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
            field = reader.fields[f"clip.vision.{key}"]
            for index, value in zip(field.data, values, strict=True):
                field.parts[index][0] = value


def _clip_mean_in_manifest(folder: Path) -> None:
    values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    settings = values["preprocessing"] | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    _edit_manifest(folder, preprocessing=settings)


def _other_coords(folder: Path) -> None:
    _edit_manifest(folder, coords="pixel_resized")


@contextmanager
def _resized_for_source() -> Iterator[None]:
    """Boxes are scaled to the picture that the model saw, not to the source."""
    real = Chat.picture

    def picture(self: Chat, frame: Frame) -> Picture:
        found = real(self, frame)
        geometry = found.geometry
        wrong = replace(geometry, width=geometry.resized_width, height=geometry.resized_height)
        return replace(found, geometry=wrong)

    with patch.object(Chat, "picture", picture):
        yield


def _scale_tensor(folder: Path) -> None:
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


def _drop_merge(folder: Path) -> None:
    """The last merge: the rarest, in no question of a small sample set."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


FAULTS: tuple[Fault, ...] = (
    Fault(
        name="deepstack-zero",
        what="deepstack features dropped in the vision file",
        stages=("vision",),
        damage=_drop_deepstack,
    ),
    Fault(
        name="deepstack-lost",
        what="deepstack features dropped on the way into the decoder",
        stages=("prefill", "answer"),
        patching=_deepstack_not_injected,
    ),
    Fault(
        name="rope-1d",
        what="M-RoPE reduced to the time axis",
        stages=("prefill", "answer"),
        damage=_one_dimensional_rope,
    ),
    Fault(
        name="rope-running",
        what="image tokens numbered like words",
        stages=("prefill", "answer"),
        patching=_running_positions,
    ),
    Fault(
        name="corners",
        what="position embedding without aligned corners",
        stages=("vision",),
        damage=_loose_corners,
    ),
    Fault(
        name="layers-swapped",
        what="two language layers swapped",
        stages=("weights", "prefill", "answer"),
        damage=_swap_layers,
    ),
    Fault(
        name="vision-swapped",
        what="two vision layers swapped",
        stages=("weights", "vision"),
        damage=_swap_vision_layers,
    ),
    Fault(
        name="clip-mean",
        what="image normalised with CLIP's mean and deviation",
        stages=("vision",),
        damage=_clip_mean,
    ),
    Fault(
        name="clip-manifest",
        what="CLIP's mean and deviation in the manifest",
        stages=("preprocessing",),
        damage=_clip_mean_in_manifest,
    ),
    Fault(
        name="convention",
        what="boxes read in the wrong convention",
        stages=("boxes",),
        damage=_other_coords,
    ),
    Fault(
        name="resized-pixels",
        what="boxes scaled to the resized picture",
        stages=("boxes",),
        patching=_resized_for_source,
    ),
    Fault(
        name="scaled-tensor",
        what="one tensor scaled by 1.05",
        stages=("weights",),
        damage=_scale_tensor,
    ),
    Fault(
        name="merge-missing",
        what="tokenizer without its last merge",
        stages=("tokenizer",),
        damage=_drop_merge,
    ),
)
