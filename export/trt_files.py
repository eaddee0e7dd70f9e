"""Artifacts for TensorRT: plain ONNX graphs with typed numbers, and how to build engines of them.

The graphs are those of ``onnx_decoder`` and ``onnx_vision`` in the ``scatter`` form, so any ONNX
checker and ONNX Runtime can read them. Neither TensorRT nor a GPU takes part: engines are built
where they run, by the recipe that is put into the manifest here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from medmo_edge.calibration.record import Record
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ExportError, UsageError
from medmo_edge.export.onnx_calibrated import calibrated
from medmo_edge.export.onnx_files import (
    GraphOptions,
    OnnxPlan,
    Progress,
    Recipe,
    plan_onnx,
    write_onnx,
)
from medmo_edge.export.onnx_linear import Encoding
from medmo_edge.export.targets import Target

DEFAULT_CAPACITY, MIN_CAPACITY = 4096, 256
_CHUNK, _OPT_CHUNK = 1024, 512  # rows of a prompt evaluated at once: at most, and tuned for
_MAX_PATCHES, _OPT_PATCHES = 16384, 4096
_MIN_TENSORRT = "10.15"  # the first with KV cache, attention and rotary layers
_FLOAT16_MAX, _FLOAT16_SAFE = 65504.0, 3e4
_BFLOAT16_SM = 80  # the oldest compute capability with bfloat16 matrix products

#: by target weights; output matrix, vision tower, norms and embeddings stay in 16 bits
RECIPES: dict[str, Recipe] = {
    "bf16": Recipe(dtype="bfloat16"),
    "fp16": Recipe(dtype="float16"),
    "fp8": Recipe(dtype="bfloat16", matrix=Encoding(kind="fp8")),
    "int4-awq": Recipe(dtype="float16", matrix=Encoding(kind="int4", block=128)),
    "nvfp4": Recipe(dtype="bfloat16", matrix=Encoding(kind="nvfp4", block=16)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtPlan:
    """Both graphs before the first byte is written, the build recipe, and remarks for people."""

    graphs: OnnxPlan
    build: Mapping[str, Any]
    notes: tuple[str, ...]


def plan_trt(
    checkpoint: Checkpoint,
    row: Target,
    record: Record | None,
    capacity: int | None,
    progress: Progress,
) -> TrtPlan:
    """Build both graphs; ``capacity`` is the tokens of the longest conversation, default 4096.

    Errors: UsageError for a capacity that the model does not have, CalibrationError, ExportError
    for a calibration record whose values float16 cannot hold, or without the onnx package.
    """
    capacity = _checked_capacity(checkpoint, capacity)
    recipe, notes = _within_range(RECIPES[row.weights], row, record)
    options = GraphOptions(form="scatter", capacity=capacity)
    if record:
        options = calibrated(options, record, checkpoint, recipe, progress)
    graphs = plan_onnx(checkpoint, recipe, options)
    for note in notes:
        getLogger("medmo_edge").warning(note)
    return TrtPlan(
        graphs=graphs,
        build=_build_recipe(checkpoint, row, recipe, capacity),
        notes=notes,
    )


def write_trt(
    plan: TrtPlan, checkpoint: Checkpoint, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Write all files into ``folder``; returns what the manifest says about their weights."""
    weights = write_onnx(plan.graphs, checkpoint, folder, progress)
    return weights | {"notes": list(plan.notes), "build": dict(plan.build)}


def _checked_capacity(checkpoint: Checkpoint, wanted: int | None) -> int:
    most = checkpoint.config.text.max_positions
    if wanted is None:
        return min(DEFAULT_CAPACITY, most)
    if not MIN_CAPACITY <= wanted <= most:
        raise UsageError(
            f"--cache-length {wanted} is not within {MIN_CAPACITY} and the {most} positions of "
            "this model"
        )
    return wanted


def _within_range(
    recipe: Recipe, row: Target, record: Record | None
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe whose numbers hold what was seen in calibration, and what there is to say.

    The record knows the inputs of matrices only: a sum between layers may be larger.
    """
    if recipe.dtype != "float16" or record is None:
        return recipe, ()
    name, largest = max(
        ((name, stats.amax) for name, stats in record.linears.items()), key=lambda pair: pair[1]
    )
    if largest <= _FLOAT16_SAFE:
        return recipe, ()
    seen = f"calibration saw {largest:.3g} at the input of {name}, float16 ends at 65504"
    if row.weights != "fp16":
        return replace(recipe, dtype="bfloat16"), (f"graph in bfloat16: {seen}",)
    if largest > _FLOAT16_MAX:
        raise ExportError(f"{row.name} cannot hold this model ({seen}): export trt-bf16 instead")
    return recipe, (f"{row.name} may overflow: {seen}; trt-bf16 cannot",)


def _build_recipe(
    checkpoint: Checkpoint, row: Target, recipe: Recipe, capacity: int
) -> dict[str, Any]:
    """What ``medmo-edge build`` needs to know beside the graphs; see docs/tensorrt.md."""
    needed = row.min_sm or 0
    instead = dict(row.instead)
    if recipe.dtype == "bfloat16" and needed < _BFLOAT16_SM:
        needed, instead = _BFLOAT16_SM, {75: "gguf-q4_k_m"}
    chunk = min(_CHUNK, capacity)
    build: dict[str, Any] = {
        "capacity": capacity,
        "chunk": chunk,
        "opt": min(_OPT_CHUNK, chunk),
        "max_batch": 1,
        "vision_patches": _patches(checkpoint, capacity),
        "min_tensorrt": _MIN_TENSORRT,
        "min_sm": needed,
    }
    if instead:
        build["refused_sm"] = {str(sm): target for sm, target in sorted(instead.items())}
    return build


def _patches(checkpoint: Checkpoint, capacity: int) -> list[int]:
    """Fewest, usual and most patches of a picture: what preprocessing makes and the cache holds."""
    settings = checkpoint.preprocessing
    per_token = settings.merge_size**2
    area = settings.patch_size**2
    fewest = max(per_token, -(-settings.min_pixels // area))
    most = min(settings.max_pixels // area, per_token * capacity, _MAX_PATCHES)
    return [min(fewest, most), min(max(fewest, _OPT_PATCHES), most), most]
