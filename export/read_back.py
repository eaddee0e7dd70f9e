"""What an artifact stores, read back and fitted to its checkpoint, tensor by tensor.

For ``medmo-edge verify``: a wrong scale or a swapped layer shows here with the tensor's name, also
where its effect on one answer is below the noise of quantisation. The numbers are dequantised by
the formats' own libraries or definitions, not by the code that wrote them; only which tensor
belongs where is taken from the exporter. Scales that AWQ folded into neighbours come from the
artifact's own file of them and are applied to the checkpoint first; those of a matrix's columns
follow from those of the rows that make its input, so a folding that changes the function shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from medmo_edge.calibration.awq import columns_of
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ArtifactError
from medmo_edge.evaluation.stages import WeightGap
from medmo_edge.export.gguf_names import plan_tensors
from medmo_edge.export.onnx_files import FOLDING_ROLE
from medmo_edge.export.onnx_linear import Folding
from medmo_edge.export.onnx_read import onnx_tensors
from medmo_edge.manifest import Manifest

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
_BLOCK_BYTES = 64 << 20
_ONNX = ("ort", "trt")  # backends whose artifacts are graphs of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor as an artifact holds it; ``rows(start, stop)`` in the layout of ``source``.

    ``frame`` picks one temporal slice [D, C, T, h, w] -> [D, C, h, w] of the source. Before it was
    stored, ``columns`` multiplied the source's input channels and ``divisor`` divided its rows.
    """

    name: str
    source: str
    stored_as: str
    rows: Callable[[int, int], Array]
    frame: int | None = None
    columns: Array | None = None
    divisor: Array | None = None


def compare_weights(
    manifest: Manifest, checkpoint: Checkpoint, progress: Progress
) -> list[WeightGap] | None:
    """The fit of every stored tensor; None for formats and artifacts that cannot be compared.

    Some rows of one tensor are in memory at a time. Errors: ArtifactError for a tensor that is not
    there or of another size, UsageError when a library is missing.
    """
    if manifest.backend == "llamacpp":
        found = list(_gguf_tensors(manifest, checkpoint))
    elif manifest.backend in _ONNX and (folding := _folding(manifest, checkpoint)) is not None:
        found = [
            Stored(
                name=each.name,
                source=each.name,
                stored_as=each.stored_as,
                rows=each.rows,
                columns=folding.columns.get(each.name),
                divisor=folding.rows.get(each.name),
            )
            for each in onnx_tensors(manifest)
            if each.name in checkpoint.tensors
        ]
    else:
        return None
    gaps = []
    for number, stored in enumerate(found, start=1):
        gaps.append(_fit(stored, checkpoint))
        progress("weights", number, len(found))
    return gaps


def _folding(manifest: Manifest, checkpoint: Checkpoint) -> Folding | None:
    """The scales that AWQ moved; none without a calibration record, None where they are unknown.

    Errors: ArtifactError when the file of them is damaged or of another model.
    """
    if not any(record["role"] == FOLDING_ROLE for record in manifest.files.values()):
        return None if "int4" in manifest.target and manifest.calibration else Folding()
    path = manifest.path_of(FOLDING_ROLE)
    try:
        with np.load(path, allow_pickle=False) as held:
            rows = {name: np.asarray(held[name], np.float32) for name in held.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): copy the artifact again") from error
    for name, scale in rows.items():
        info = checkpoint.tensors.get(name)
        if info is None or scale.shape != info.shape[:1] or not (scale > 0).all():
            raise ArtifactError(f"{path} has no usable scales for {name}: export again")
    return Folding(columns=columns_of(rows, checkpoint.config.text), rows=rows)


def _fit(stored: Stored, checkpoint: Checkpoint) -> WeightGap:
    """Least squares: stored = scale * original, and the part of it that is left."""
    product = power = left = 0.0
    for values, original in _blocks(stored, checkpoint):
        if values.shape != original.shape:
            raise ArtifactError(
                f"tensor {stored.name} has rows of {values.size // max(1, len(values))} numbers, "
                f"its checkpoint's of {original.size // len(original)}: export again"
            )
        a, b = values.reshape(-1), original.reshape(-1)
        product += float(np.dot(a, b))
        power += float(np.dot(b, b))
        left += float(np.dot(a - b, a - b))
    scale, error = (product / power, (left / power) ** 0.5) if power else (1.0, left**0.5)
    return WeightGap(name=stored.name, stored_as=stored.stored_as, scale=scale, error=error)


def _blocks(stored: Stored, checkpoint: Checkpoint) -> Iterator[tuple[Array, Array]]:
    """Pairs of stored and original rows."""
    start = 0
    for original in checkpoint.row_blocks(stored.source, _BLOCK_BYTES):
        rows = len(original)
        values = stored.rows(start, start + rows)
        if stored.frame is not None:
            shape = checkpoint.tensors[stored.source].shape
            original = original.reshape(rows, *shape[1:])[:, :, stored.frame]
        yield values.reshape(rows, -1), _folded(stored, original.reshape(rows, -1), start)
        start += rows


def _folded(stored: Stored, original: Array, start: int) -> Array:
    """The checkpoint's rows from ``start`` on with the scales that were folded into them."""
    if stored.columns is not None:
        original = original * stored.columns
    if stored.divisor is not None:
        original = original / stored.divisor[start : start + len(original), None]
    return original


def _gguf_tensors(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Stored]:
    from gguf import GGUFReader

    for role, planned in zip(("language", "vision"), plan_tensors(checkpoint), strict=True):
        path = manifest.path_of(role)
        held = {tensor.name: tensor for tensor in GGUFReader(path, "r").tensors}
        for each in planned:
            if each.name not in held:
                raise ArtifactError(f"{path} lacks tensor {each.name}: export again")
            yield Stored(
                name=each.name,
                source=each.source,
                stored_as=held[each.name].tensor_type.name,
                rows=_dequantised(held[each.name]),
                frame=each.frame,
            )


def _dequantised(tensor: Any) -> Callable[[int, int], Array]:
    from gguf.quants import dequantize

    def rows(start: int, stop: int) -> Array:
        return np.asarray(dequantize(tensor.data[start:stop], tensor.tensor_type), np.float32)

    return rows
