"""Deliberate faults for the gate's own test: how real exports and runtimes went wrong.

Each fault damages a copy of an artifact and gives it a manifest that fits again, so that no hash
can catch it, or patches the runtime for a while. A gate that passes one of these is broken;
benchmarks/sabotage_matrix.py prints which stage caught which.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.evaluation import sabotage_gguf as gguf
from medmo_edge.evaluation import sabotage_onnx as onnx
from medmo_edge.images import Frame
from medmo_edge.manifest import MANIFEST_NAME, Manifest, record_file, write_manifest
from medmo_edge.runtime.chat import Chat, Picture

Damage = Callable[[Path], None]
Patching = Callable[[Checkpoint], AbstractContextManager[Any]]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BOTH = ("llamacpp", "ort")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to break an artifact; ``stages``: one of these must be the first that fails.

    By backend: ``damage`` changes the files of a folder, ``patching`` the runtime while its context
    is open.
    """

    name: str
    what: str
    stages: tuple[str, ...]
    damage: Mapping[str, Damage] = field(default_factory=dict)
    patching: Mapping[str, Patching] = field(default_factory=dict)

    def fits(self, backend: str) -> bool:
        """Whether this fault can be made for artifacts of ``backend``."""
        return backend in self.damage or backend in self.patching

    def patched(self, backend: str, checkpoint: Checkpoint) -> AbstractContextManager[Any]:
        """The runtime with the fault in it, or as it is."""
        make = self.patching.get(backend)
        return make(checkpoint) if make else nullcontext()


def damaged_copy(artifact: Path, fault: Fault, folder: Path) -> Path:
    """A copy of ``artifact`` at ``folder`` with the fault in it and a manifest that fits."""
    shutil.copytree(artifact, folder)
    damage = fault.damage.get(_read(folder)["backend"])
    if damage is not None:
        damage(folder)
        _rehash(folder)
    return folder


def _read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return values


def _rehash(folder: Path) -> None:
    """Make the manifest fit the files again, as an exporter that made the error would have."""
    values = _read(folder)
    for name, record in values["files"].items():
        values["files"][name] = record_file(folder / name, record["role"])
    write_manifest(folder, Manifest(**values))


def _edit_manifest(folder: Path, **changes: Any) -> None:
    write_manifest(folder, Manifest(**(_read(folder) | changes)))


def _clip_mean_in_manifest(folder: Path) -> None:
    changed = _read(folder)["preprocessing"] | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    _edit_manifest(folder, preprocessing=changed)


def _other_coords(folder: Path) -> None:
    _edit_manifest(folder, coords="pixel_resized")


@contextmanager
def _resized_for_source(_: Checkpoint) -> Iterator[None]:
    """Boxes are scaled to the picture that the model saw, not to the source."""
    real = Chat.picture

    def picture(self: Chat, frame: Frame) -> Picture:
        found = real(self, frame)
        size = found.geometry
        wrong = replace(size, width=size.resized_width, height=size.resized_height)
        return replace(found, geometry=wrong)

    with patch.object(Chat, "picture", picture):
        yield


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
        stages=("weights", "vision"),
        damage={"llamacpp": gguf.drop_deepstack, "ort": onnx.drop_deepstack},
    ),
    Fault(
        name="deepstack-lost",
        what="deepstack features dropped on the way into the decoder",
        stages=("prefill", "answer"),
        patching={"llamacpp": gguf.deepstack_not_injected, "ort": onnx.deepstack_not_injected},
    ),
    Fault(
        name="rope-1d",
        what="M-RoPE reduced to the time axis",
        stages=("prefill", "answer", "quantisation"),
        damage={"llamacpp": gguf.one_dimensional_rope},
        patching={"ort": onnx.one_dimensional_rope},
    ),
    Fault(
        name="corners",
        what="position embedding without aligned corners",
        stages=("vision",),
        patching={"llamacpp": gguf.loose_corners, "ort": onnx.loose_corners},
    ),
    Fault(
        name="layers-swapped",
        what="two language layers swapped",
        stages=("weights",),
        damage={"llamacpp": gguf.swap_layers, "ort": onnx.swap_layers},
    ),
    Fault(
        name="vision-swapped",
        what="two vision layers swapped",
        stages=("weights",),
        damage={"llamacpp": gguf.swap_vision_layers, "ort": onnx.swap_vision_layers},
    ),
    Fault(
        name="clip-mean",
        what="CLIP's mean and deviation in the vision file",
        stages=("vision",),
        damage={"llamacpp": gguf.clip_mean},
    ),
    Fault(
        name="clip-manifest",
        what="CLIP's mean and deviation in the manifest",
        stages=("preprocessing",),
        damage=dict.fromkeys(_BOTH, _clip_mean_in_manifest),
    ),
    Fault(
        name="convention",
        what="boxes read in the wrong convention",
        stages=("boxes",),
        damage=dict.fromkeys(_BOTH, _other_coords),
    ),
    Fault(
        name="resized-pixels",
        what="boxes scaled to the resized picture",
        stages=("boxes",),
        patching=dict.fromkeys(_BOTH, _resized_for_source),
    ),
    Fault(
        name="scaled-tensor",
        what="one tensor scaled by 1.05",
        stages=("weights",),
        damage={"llamacpp": gguf.scale_one_tensor, "ort": onnx.scale_one_tensor},
    ),
    Fault(
        name="merge-missing",
        what="tokenizer without its last merge",
        stages=("tokenizer",),
        damage=dict.fromkeys(_BOTH, _drop_merge),
    ),
)
