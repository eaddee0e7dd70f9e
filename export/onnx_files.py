"""The files of an ONNX artifact: both graphs with their weights, and the embedding table.

Chooses the encoding of every matrix by target; how graphs look is in ``onnx_decoder`` and
``onnx_vision``. Embeddings stay outside the graphs, in the checkpoint's own numbers: the host looks
rows up in a memory map and splices image features in.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ExportError, UsageError
from medmo_edge.export.onnx_decoder import OPSETS, DecoderPlan, Form, build_decoder
from medmo_edge.export.onnx_graph import Graph, save_graph
from medmo_edge.export.onnx_linear import FLOAT, Encoding, Folding, GraphDtype, Weights
from medmo_edge.export.onnx_vision import VisionPlan, build_vision

DECODER_FILE, VISION_FILE, EMBEDDINGS_FILE = "decoder.onnx", "vision.onnx", "embed_tokens.npy"
FOLDING_FILE, FOLDING_ROLE = "awq_scales.npz", "folding"
ROLES = {
    VISION_FILE: "vision",
    f"{VISION_FILE}.data": "vision_data",
    DECODER_FILE: "decoder",
    f"{DECODER_FILE}.data": "decoder_data",
    EMBEDDINGS_FILE: "embeddings",
}
_EMBEDDINGS = "model.language_model.embed_tokens.weight"
_BLOCK_BYTES = 16 << 20
# Storage type in the checkpoint -> numpy type in the file, and its name in the manifest.
_EMBEDDING_TYPES: dict[str, tuple[str, str]] = {
    "BF16": ("uint16", "bfloat16"),
    "F16": ("float16", "float16"),
    "F32": ("float32", "float32"),
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a target stores the parts; matrices that do not fit their blocks stay in ``dtype``."""

    dtype: GraphDtype = "float32"
    matrix: Encoding = FLOAT
    head: Encoding = FLOAT
    vision_normed: Encoding = FLOAT
    vision_free: Encoding = FLOAT


_INT8 = Encoding(kind="nbits", bits=8, block=32)
_INT4 = Encoding(kind="nbits", bits=4, block=32)
_DYNAMIC = Encoding(kind="dynamic")
_DYNAMIC_ROWS = Encoding(kind="dynamic", per_token=True)

#: by target weights, for ONNX Runtime; the rows of TensorRT are its backend's business
RECIPES: dict[str, Recipe] = {
    "fp32": Recipe(),
    "fp16": Recipe(dtype="float16"),
    "int8": Recipe(
        matrix=_DYNAMIC_ROWS,
        head=_INT8,
        vision_normed=_DYNAMIC,
        vision_free=_DYNAMIC_ROWS,
    ),
    "int4": Recipe(matrix=_INT4, head=_INT8, vision_normed=_DYNAMIC, vision_free=_DYNAMIC_ROWS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxPlan:
    """Both graphs before the first byte is written."""

    form: Form
    recipe: Recipe
    decoder: Weights
    vision: Weights
    embedding_bytes: int

    @property
    def roles(self) -> Mapping[str, str]:
        """The role of every file that is written."""
        return {**ROLES, FOLDING_FILE: FOLDING_ROLE} if self.decoder.folding.rows else ROLES

    @property
    def data_bytes(self) -> int:
        """Bytes of all weights; the graphs themselves come on top."""
        graphs = self.decoder.graph.data_bytes + self.vision.graph.data_bytes
        return graphs + self.embedding_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOptions:
    """What a form or a calibration record adds: see DecoderPlan."""

    form: Form = "gqa"
    capacity: int = 4096
    folding: Folding = field(default_factory=Folding)
    activation_scales: Mapping[str, float] = field(default_factory=dict)


def plan_onnx(
    checkpoint: Checkpoint, recipe: Recipe, options: GraphOptions | None = None
) -> OnnxPlan:
    """Build both graphs. Errors: ExportError without the onnx package, CalibrationError."""
    _require_onnx()
    options = options or GraphOptions()
    plan = DecoderPlan(
        form=options.form,
        dtype=recipe.dtype,
        matrix=recipe.matrix,
        head=recipe.head,
        capacity=options.capacity,
        folding=options.folding,
        activation_scales=options.activation_scales,
    )
    vision = VisionPlan(
        form=options.form, dtype=recipe.dtype, normed=recipe.vision_normed, free=recipe.vision_free
    )
    return OnnxPlan(
        form=options.form,
        recipe=recipe,
        decoder=build_decoder(checkpoint, plan),
        vision=build_vision(checkpoint, vision),
        embedding_bytes=checkpoint.tensors[_EMBEDDINGS].nbytes,
    )


def find_recipe(weights: str) -> Recipe:
    """The recipe of a target's weights. Errors: UsageError for one that is not there."""
    try:
        return RECIPES[weights]
    except KeyError:
        raise UsageError(
            f"no ONNX recipe {weights!r}: choose one of {', '.join(RECIPES)}"
        ) from None


def write_onnx(
    plan: OnnxPlan, checkpoint: Checkpoint, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Write all files into ``folder``; returns what the manifest says about their weights."""
    _save(plan.decoder.graph, folder / DECODER_FILE, "language model", progress)
    _save(plan.vision.graph, folder / VISION_FILE, "vision tower", progress)
    _write_embeddings(checkpoint, folder / EMBEDDINGS_FILE, progress)
    if plan.decoder.folding.rows:  # for verify alone: no runtime reads it
        np.savez(folder / FOLDING_FILE, **dict(plan.decoder.folding.rows))  # type: ignore[arg-type]
    stored = checkpoint.tensors[_EMBEDDINGS].dtype
    return {
        "form": plan.form,
        "opset": OPSETS[plan.form],
        "graph_dtype": plan.recipe.dtype,
        "embeddings_dtype": _EMBEDDING_TYPES[stored][1],
        "language": _summary(plan.decoder),
        "vision": _summary(plan.vision),
        "notes": [],
    }


def _require_onnx() -> None:
    try:
        import ml_dtypes  # noqa: F401
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"ONNX targets need the onnx and ml_dtypes packages ({error}): "
            "pip install 'medmo-edge[export]'"
        ) from error


def _save(graph: Graph, path: Path, stage: str, progress: Progress) -> None:
    total = sum(weight.nbytes for group, _ in graph.fills for weight in group)
    save_graph(graph, path, _counter(stage, total, progress))


def _counter(stage: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(stage, done, total)

    return count


def _write_embeddings(checkpoint: Checkpoint, path: Path, progress: Progress) -> None:
    info = checkpoint.tensors[_EMBEDDINGS]
    dtype = np.dtype(_EMBEDDING_TYPES[info.dtype][0])
    header = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": info.shape}
    count = _counter("embeddings", info.nbytes, progress)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in checkpoint.row_blocks(_EMBEDDINGS, _BLOCK_BYTES):
            if not np.isfinite(block).all():
                raise ExportError(
                    f"{checkpoint.path}: tensor {_EMBEDDINGS} holds NaN or infinity: "
                    "the checkpoint is damaged or its training diverged"
                )
            stored = _as_stored(block, info.dtype)
            file.write(stored.data)
            count(stored.nbytes)


def _as_stored(block: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Back to the checkpoint's own bits, which float32 holds exactly."""
    if dtype == "BF16":
        return (np.ascontiguousarray(block).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.ascontiguousarray(block.astype(_EMBEDDING_TYPES[dtype][0]))


def _summary(weights: Weights) -> dict[str, Any]:
    """Tensors by type, parameters, bytes, and the matrices that do not fit what was wanted."""
    labels = [label for label, _ in weights.stored.values()]
    return {
        "types": dict(sorted(Counter(labels).items())),
        "parameters": sum(values for _, values in weights.stored.values()),
        "bytes": sum(weight.nbytes for group, _ in weights.graph.fills for weight in group),
        "fallbacks": dict(weights.fallbacks),
    }
