"""The two GGUF files of an artifact: the language model and the vision tower (mmproj).

Decides nothing about names, types or metadata itself: it puts the three together, checks an
importance matrix against them and writes the files. The vision tower is always 16 bit: below that
boxes suffer first, and it is a small part of the bytes.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.calibration.imatrix import Imatrix
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import CalibrationError, ExportError
from medmo_edge.export.gguf_metadata import add_language_keys, add_vision_keys
from medmo_edge.export.gguf_names import Planned, plan_tensors
from medmo_edge.export.gguf_quantise import Quantiser
from medmo_edge.export.gguf_types import Mixture, language_type, vision_type, wanted_type
from medmo_edge.export.gguf_write import Float16Overflow, GgufFile, write_gguf

LANGUAGE_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
# llama.cpp quantises these two without an importance matrix when it has none for them.
_NEED_NO_IMPORTANCE = ("token_embd.weight", "output.weight")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPlan:
    """Everything decided before the first byte is written."""

    language: GgufFile
    vision: GgufFile
    mixture: Mixture

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors of both files; metadata comes on top."""
        return self.language.data_bytes + self.vision.data_bytes


def plan_gguf(
    checkpoint: Checkpoint, weights: str, folder: Path, imatrix: Imatrix | None, source: str
) -> GgufPlan:
    """Plan the files of a target with ``weights`` (a row of the target table).

    ``source`` names the importance matrix's file. Errors: ExportError when the checkpoint's tensors
    are not exactly Qwen3-VL's, CalibrationError when the importance matrix is not this model's.
    """
    _require_gguf()
    text = checkpoint.config.text
    language, vision = plan_tensors(checkpoint)
    mixture = Mixture(
        weights=weights,
        num_layers=text.num_layers,
        heads_per_kv_head=text.num_heads // text.num_kv_heads,
        is_tied=text.tie_word_embeddings,
        has_imatrix=imatrix is not None,
    )
    types = {tensor.name: language_type(tensor, mixture) for tensor in language}
    if imatrix:
        _check_coverage(imatrix, language, types, source)
    keys = partial(
        add_language_keys,
        checkpoint=checkpoint,
        weights=weights,
        size_label=_size_label(language),
        imatrix=_imatrix_keys(imatrix, source),
    )
    return GgufPlan(
        language=GgufFile(
            path=folder / LANGUAGE_FILE,
            architecture="qwen3vl",
            tensors=language,
            types=types,
            add_keys=keys,
        ),
        vision=_plan_vision(checkpoint, vision, folder / VISION_FILE),
        mixture=mixture,
    )


def _plan_vision(checkpoint: Checkpoint, tensors: list[Planned], path: Path) -> GgufFile:
    size_label = _size_label(tensors)
    return GgufFile(
        path=path,
        architecture="clip",
        tensors=tensors,
        types={tensor.name: vision_type(tensor) for tensor in tensors},
        add_keys=partial(add_vision_keys, checkpoint=checkpoint, size_label=size_label),
    )


def write_files(
    plan: GgufPlan, checkpoint: Checkpoint, imatrix: Imatrix | None, progress: Progress
) -> dict[str, Any]:
    """Write both files; returns what the manifest says about their weights."""
    means = imatrix.means if imatrix else {}
    with Quantiser({name: _without_zeros(mean) for name, mean in means.items()}) as quantiser:
        language = _write(plan.language, checkpoint, quantiser, "language model", progress)
        vision = _write(plan.vision, checkpoint, quantiser, "vision tower", progress)
    notes = []
    if plan.mixture.weights == "iq4_xs" and not imatrix:
        notes.append("iq4_xs without an importance matrix: expect lower accuracy than with one")
    return {
        "language": _summary(language, _fallbacks(language, plan)),
        "vision": _summary(vision, _kept_wide(vision, plan.vision)),
        "notes": notes,
    }


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"GGUF targets need the gguf package ({error}): pip install 'medmo-edge[export]'"
        ) from error


def _write(
    file: GgufFile, checkpoint: Checkpoint, quantiser: Quantiser, stage: str, progress: Progress
) -> GgufFile:
    """Write one file, again with F32 for a tensor whose values turn out to exceed float16."""
    while True:
        done, total = 0, sum(file.bytes_of(tensor) for tensor in file.tensors)

        def count(size: int, total: int = total) -> None:
            nonlocal done
            done += size
            progress(stage, done, total)

        try:
            write_gguf(file, checkpoint, quantiser, count)
            return file
        except Float16Overflow as overflow:
            file = replace(file, types={**file.types, overflow.name: "F32"})


def _without_zeros(mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importances with zeros raised to a millionth of their mean.

    llama.cpp writes weights of zero where a whole sub-block (16 channels in Q6_K) has importance
    zero: a channel that calibration never met would be gone for good.
    """
    return np.where(mean > 0, mean, mean.mean() * np.float32(1e-6)).astype(np.float32)


def _check_coverage(
    imatrix: Imatrix, tensors: list[Planned], types: dict[str, str], source: str
) -> None:
    """llama.cpp only logs a missing entry and quantises that tensor blindly: refuse instead."""
    sizes = {tensor.name: tensor.shape[-1] for tensor in tensors if len(tensor.shape) == 2}
    for name in imatrix.means:
        if name not in sizes:
            raise CalibrationError(f"{source}: {name} is no weight of this checkpoint")
        if imatrix.means[name].size != sizes[name]:
            raise CalibrationError(
                f"{source}: {name} has {imatrix.means[name].size} channels, the checkpoint's "
                f"weight has {sizes[name]}: it was made for another model"
            )
    for name in sizes:
        is_quantised = types[name] not in ("F32", "F16", "BF16")
        if is_quantised and name not in imatrix.means and name not in _NEED_NO_IMPORTANCE:
            raise CalibrationError(
                f"{source}: {name} is missing: calibrate all layers, or leave the matrix out"
            )


def _imatrix_keys(imatrix: Imatrix | None, source: str) -> dict[str, Any]:
    """What llama-quantize records, under the same names."""
    if imatrix is None:
        return {}
    return {
        "file": Path(source).name,
        "dataset": ", ".join(imatrix.datasets),
        "entries_count": len(imatrix.means),
        "chunks_count": imatrix.chunk_count,
    }


def _size_label(tensors: list[Planned]) -> str:
    import gguf

    total = sum(prod(tensor.shape) for tensor in tensors)
    return gguf.size_label(total, total, 0, 0)


def _summary(file: GgufFile, fallbacks: dict[str, str]) -> dict[str, Any]:
    return {
        "types": dict(sorted(Counter(file.types.values()).items())),
        "parameters": sum(prod(tensor.shape) for tensor in file.tensors),
        "bytes": sum(file.bytes_of(tensor) for tensor in file.tensors),
        "fallbacks": fallbacks,
    }


def _fallbacks(written: GgufFile, plan: GgufPlan) -> dict[str, str]:
    """Matrices stored otherwise than the mixture wants: rows that fit no block, or overflow."""
    found = {}
    for tensor in written.tensors:
        if len(tensor.shape) == 2:
            wanted, _ = wanted_type(tensor.name, tensor.shape[-1], plan.mixture)
            if written.types[tensor.name] != wanted:
                found[tensor.name] = f"{wanted} -> {written.types[tensor.name]}"
    return found


def _kept_wide(written: GgufFile, planned: GgufFile) -> dict[str, str]:
    return {
        name: f"{planned.types[name]} -> {kind}"
        for name, kind in written.types.items()
        if kind != planned.types[name]
    }
