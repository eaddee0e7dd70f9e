"""What an artifact stores, read back and fitted to its checkpoint, tensor by tensor.

For ``medmo-edge verify``: a wrong scale or a swapped layer shows here with the tensor's name, also
where its effect on one answer is below the noise of quantisation. The numbers are dequantised by
the formats' own libraries or definitions, not by the code that wrote them; only which tensor
belongs where is taken from the exporter. Scales folded into neighbours cannot be compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ArtifactError
from medmo_edge.evaluation.stages import WeightGap
from medmo_edge.export.gguf_names import plan_tensors
from medmo_edge.export.onnx_read import onnx_tensors
from medmo_edge.manifest import Manifest

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor as an artifact holds it; ``rows(start, stop)`` in the layout of ``source``.

    ``frame`` picks one temporal slice [D, C, T, h, w] -> [D, C, h, w] of the source.
    """

    name: str
    source: str
    stored_as: str
    rows: Callable[[int, int], Array]
    frame: int | None = None


def compare_weights(
    manifest: Manifest, checkpoint: Checkpoint, progress: Progress
) -> list[WeightGap] | None:
    """The fit of every stored tensor; None for formats and artifacts that cannot be compared.

    Some rows of one tensor are in memory at a time. Errors: ArtifactError for a tensor that is not
    there or of another size, UsageError when a library is missing.
    """
    if manifest.backend == "llamacpp":
        found = list(_gguf_tensors(manifest, checkpoint))
    elif manifest.backend == "ort" and not _is_folded(manifest):
        found = [
            Stored(name=each.name, source=each.name, stored_as=each.stored_as, rows=each.rows)
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


def _is_folded(manifest: Manifest) -> bool:
    """AWQ moves scales between layers, and comes with a calibration record."""
    return "int4" in manifest.target and manifest.calibration is not None


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
        yield values.reshape(rows, -1), original.reshape(rows, -1)
        start += rows


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
