"""Scales and ranges that quantisers take from a calibration record.

Nothing is measured here. A linear without an entry, or with a range that cannot be used, is an
error and never a default: a guessed range clips silently.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from medmo_edge.calibration.imatrix import Imatrix
from medmo_edge.calibration.record import Record
from medmo_edge.calibration.statistics import LinearStats
from medmo_edge.errors import CalibrationError

FP8_MAX = 448.0  # the largest value of float8 e4m3
INT8_MAX = 127.0

Range = Literal["amax", "p9999", "p999"]

# Linears that read the same input must share its scale, so that one kernel can serve all of them.
_SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


def fp8_scales(record: Record, range: Range = "amax") -> dict[str, float]:
    """Per linear (without ".weight"), the float32 scale s for which x / s fits float8 e4m3.

    Shared by q, k and v, and by gate and up. ``range`` is what maps to 448; a percentile clips the
    rest. For a graph: QuantizeLinear(x, s) and DequantizeLinear(., s) before the matrix product.
    Errors: CalibrationError for a range that is zero, NaN or infinite.
    """
    return {name: _divided(amax, FP8_MAX) for name, amax in _ranges(record, range).items()}


def int8_scales(record: Record, range: Range = "p9999") -> dict[str, float]:
    """Per linear (without ".weight"), the float32 step of a symmetric int8 range -127..127.

    Shared as for fp8; what lies beyond ``range`` is clipped. Errors: CalibrationError for a range
    that is zero, NaN or infinite.
    """
    return {name: _divided(amax, INT8_MAX) for name, amax in _ranges(record, range).items()}


def importance(record: Record, names: Mapping[str, str]) -> Imatrix:
    """An importance matrix in llama.cpp's terms: ``names`` maps its tensor names to our linears.

    Linears that the record does not know are left out: the quantiser judges whether it needs them.
    Errors: CalibrationError for a linear whose input is zero everywhere.
    """
    known = {ours: theirs for theirs, ours in names.items() if ours in record.linears}
    for name in known:
        if not record.linears[name].amax > 0:
            raise _unusable(record, name, record.linears[name].amax)
    means = {theirs: record.linears[ours].mean_sq for ours, theirs in known.items()}
    counts = {theirs: float(record.linears[ours].count) for ours, theirs in known.items()}
    chunk = 512  # what llama.cpp counts tokens in, unless told otherwise
    return Imatrix(
        means=means,
        counts=counts,
        datasets=(f"{record.samples.get('file')} sha256:{record.samples.get('sha256')}",),
        chunk_count=max(1, int(max(counts.values(), default=0)) // chunk),
        chunk_size=chunk,
    )


def _ranges(record: Record, range: Range) -> dict[str, float]:
    """The chosen range of every linear, the largest of those that share an input."""
    found: dict[str, float] = {}
    for name, stats in record.linears.items():
        amax = max(getattr(stats, range) for stats in _sharing(record, name))
        if not (math.isfinite(amax) and amax > 0):
            raise _unusable(record, name, amax)
        found[name] = amax
    return found


def _sharing(record: Record, name: str) -> Iterable[LinearStats]:
    for group in _SHARED:
        for member in group:
            if name.endswith(f".{member}"):
                prefix = name.removesuffix(member)
                return [
                    record.linears[prefix + other]
                    for other in group
                    if prefix + other in record.linears
                ]
    return [record.linears[name]]


def _divided(amax: float, highest: float) -> float:
    return float(np.float32(amax) / np.float32(highest))


def _unusable(record: Record, name: str, amax: float) -> CalibrationError:
    what = "only zeros" if amax == 0 else f"a range of {amax:g}"
    return CalibrationError(
        f"{record.path}: {name} saw {what}, so it has no scale: calibrate with more samples"
    )
