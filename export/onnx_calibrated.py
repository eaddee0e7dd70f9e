"""What a calibration record changes in ONNX graphs: AWQ scales for 4 bit, input scales for fp8.

The search and the scales are calibration's; here they meet the encodings that the graphs store.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.calibration import awq
from medmo_edge.calibration.record import Record
from medmo_edge.calibration.scales import fp8_scales
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.export.onnx_encode import encode_int4, encode_nbits, nvfp4_step, round_nvfp4
from medmo_edge.export.onnx_files import GraphOptions, Progress, Recipe
from medmo_edge.export.onnx_linear import Encoding, Folding

Rows = NDArray[np.float32]


def calibrated(
    options: GraphOptions,
    record: Record,
    checkpoint: Checkpoint,
    recipe: Recipe,
    progress: Progress,
) -> GraphOptions:
    """``options`` with what ``recipe`` can use of the record: 4-bit matrices get AWQ's folding, fp8
    ones the scales of their inputs.

    Errors: CalibrationError when the record was made from another checkpoint or misses a layer.
    """
    record.check_belongs(checkpoint)
    if recipe.matrix.kind == "fp8":
        return replace(options, activation_scales=fp8_scales(record))
    if not can_fold(recipe.matrix):
        return options
    found = awq.search(
        checkpoint,
        record,
        partial(round_trip, encoding=recipe.matrix, dtype=np.dtype(np.float32)),
        lambda done, total: progress("AWQ search", done, total),
    )
    return replace(options, folding=Folding(columns=found.columns, rows=found.rows))


def can_fold(encoding: Encoding) -> bool:
    """Whether AWQ changes matrices of this encoding for the better: those of 4 bit."""
    return encoding.kind in ("int4", "nvfp4") or (encoding.kind == "nbits" and encoding.bits == 4)


def round_trip(rows: Rows, encoding: Encoding, dtype: np.dtype[Any]) -> Rows:
    """``rows`` [n, in] as they are read back from a 4-bit graph; unchanged where blocks misfit."""
    if not encoding.fits(rows.shape[1]):
        return rows
    if encoding.kind == "nvfp4":
        return _through_nvfp4(rows, encoding.block)
    if encoding.kind == "int4":
        codes, scales = encode_int4(rows, encoding.block, dtype)
    else:
        packed, scales = encode_nbits(rows, encoding.bits, encoding.block, dtype)
        pairs = np.stack([packed & 0xF, packed >> 4], axis=-1)
        codes = pairs.reshape(rows.shape).astype(np.int8) - np.int8(8)
    groups = codes.reshape(rows.shape[0], -1, encoding.block).astype(np.float32)
    wide: Rows = (groups * scales.astype(np.float32)[:, :, None]).reshape(rows.shape)
    return wide


def _through_nvfp4(rows: Rows, block: int) -> Rows:
    """The scale of the whole matrix is taken from these rows: a power of two more or less changes
    only the smallest block scales."""
    step = nvfp4_step(float(np.abs(rows).max()))
    codes, scales = round_nvfp4(rows, block, step)
    wide: Rows = (codes * (scales.astype(np.float32) * step)[:, :, None]).reshape(rows.shape)
    return wide
