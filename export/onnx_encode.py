"""Rows of weights as the numbers that graphs store: blocks of 8 or 4 bit, fp8 and nvfp4.

Pure numpy on one block of rows [n, in] float32 at a time; every row is independent of the others.
Which matrix gets which encoding is decided elsewhere. Scales are rounded to the type they are
stored in before the codes are computed with them.
Sources: ONNX Runtime, docs/ContribOperators.md (MatMulNBits); ONNX operators DequantizeLinear-21
and QuantizeLinear-21; FLOAT8E4M3FN and FLOAT4E2M1 in the ONNX documentation, "Float stored in 8
bits" and "Float stored in 4 bits"; two-level scales: NVIDIA, TensorRT documentation, NVFP4.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FP8_MAX = 448.0
FP4_MAX = 6.0
_INT4_MAX = 7.0
# Which part of a block's largest value becomes the largest code, and which code that is.
_INT4_PARTS = (1.0, 0.9, 0.8)
_FP4_TOPS = (6.0, 4.0)
# Bits of FLOAT4E2M1 by twice the size of its value.
_FP4_BITS = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], np.uint8)
_INT8_MAX = 127.0

Rows = NDArray[np.float32]


def encode_nbits(
    rows: Rows, bits: int, block: int, dtype: np.dtype[Any]
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """MatMulNBits without zero points: codes [n, in / block, block * bits / 8] and scales.

    Scales are [n, in / block]. The entry of largest magnitude in a block becomes code 0, which
    stands for -2^(bits - 1).
    """
    half = 1 << (bits - 1)
    groups = rows.reshape(rows.shape[0], -1, block)
    highest, lowest = _reduce(np.maximum, groups), _reduce(np.minimum, groups)
    extreme = np.where(highest > -lowest, highest, lowest)
    scales = (extreme / np.float32(-half)).astype(dtype)
    codes = np.rint(groups / _divisor(scales)[:, :, None])
    codes += half
    packed = np.clip(codes, 0, 2 * half - 1, out=codes).astype(np.uint8)
    return (packed if bits == 8 else _pack_nibbles(packed)), scales


def encode_int4(
    rows: Rows, block: int, dtype: np.dtype[Any]
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """DequantizeLinear: codes -8..7 as int8 [n, in], scales [n, in / block].

    A smaller scale cuts off a block's largest value and rounds the others less: of three, the one
    with the smallest squared error is taken.
    """
    groups = rows.reshape(rows.shape[0], -1, block)
    largest = _reduce(np.maximum, np.abs(groups))
    tries = [(largest * np.float32(part / _INT4_MAX)).astype(dtype) for part in _INT4_PARTS]
    codes, scales = _least_lost(
        groups, tries, np.float32(1), lambda values: np.clip(np.rint(values), -8, 7)
    )
    return codes.astype(np.int8).reshape(rows.shape), scales


def encode_int8(rows: Rows) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric per row: codes -127..127 [n, in], scales [n]."""
    scales = np.abs(rows).max(axis=1) / np.float32(_INT8_MAX)
    codes = np.rint(rows / _divisor(scales)[:, None])
    return np.clip(codes, -_INT8_MAX, _INT8_MAX).astype(np.int8), scales


def encode_fp8(rows: Rows, dtype: np.dtype[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Symmetric per row, saturated: bits of FLOAT8E4M3FN [n, in], scales [n]."""
    import ml_dtypes

    scales = (np.abs(rows).max(axis=1) / np.float32(FP8_MAX)).astype(dtype)
    codes = np.clip(rows / _divisor(scales)[:, None], -FP8_MAX, FP8_MAX)
    return codes.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scales


def nvfp4_step(largest: float) -> NDArray[np.float32]:
    """The scale [] of a matrix's block scales, by its largest magnitude: a power of two.

    So that block scale times step is exact in 16 bits and every builder reads the same weights.
    """
    exponent = np.ceil(np.log2(largest / (FP4_MAX * FP8_MAX))) if largest > 0 else 0
    return np.asarray(2.0**exponent, np.float32)


def encode_nvfp4(
    rows: Rows, block: int, step: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bits of FLOAT4E2M1, packed by two [n, in / 2], and of the block scales in FLOAT8E4M3FN
    [n, in / block]; value = code * block scale * ``step``.
    """
    codes, scales = round_nvfp4(rows, block, step)
    flat = codes.reshape(rows.shape)
    bits = _FP4_BITS[np.abs(2 * flat).astype(np.uint8)] | (np.signbit(flat) * np.uint8(8))
    return _pack_nibbles(bits), scales.view(np.uint8)


def round_nvfp4(rows: Rows, block: int, step: NDArray[np.float32]) -> tuple[Rows, NDArray[Any]]:
    """Codes as numbers [n, in / block, block], and block scales in float8_e4m3fn.

    A block's largest value becomes 6 or 4, whichever has the smaller squared error: codes are wide
    apart at the top. Source: Cook et al., Four Over Six, arXiv 2512.02010.
    """
    import ml_dtypes

    groups = rows.reshape(rows.shape[0], -1, block)
    largest = _reduce(np.maximum, np.abs(groups))
    tries = [
        np.minimum(largest / np.float32(top) / step, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
        for top in _FP4_TOPS
    ]
    return _least_lost(groups, tries, step, _nearest_fp4)


def _nearest_fp4(values: Rows) -> Rows:
    """To 0, 0.5, 1, 1.5, 2, 3, 4 or 6, ties to even, saturated."""
    size = np.abs(values)
    gap = np.where(size < 2, np.float32(0.5), np.where(size < 4, np.float32(1), np.float32(2)))
    found: Rows = np.clip(np.rint(values / gap) * gap, -FP4_MAX, FP4_MAX)
    return found


def _least_lost(
    groups: Rows,
    tries: Sequence[NDArray[Any]],
    step: NDArray[np.float32] | np.float32,
    rounded: Callable[[Rows], Rows],
) -> tuple[Rows, NDArray[Any]]:
    """Codes [n, blocks, block] and scales [n, blocks]: per block the try that loses least.

    A scale times ``step`` is the width of a code; ``rounded`` makes codes of values in that width.
    """
    codes, scales = np.zeros_like(groups), tries[0].copy()
    least = np.full(scales.shape, np.inf, np.float32)
    for each in tries:
        width = _divisor(each)[:, :, None] * step
        found = rounded(groups / width)
        lost = found * width - groups
        error = np.einsum("nbk,nbk->nb", lost, lost)
        better = error < least
        codes[better], scales[better], least[better] = found[better], each[better], error[better]
    return codes, scales


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """ONNX INT4: two values a byte along the last axis, the first in the low half."""
    return _pack_nibbles((codes & 0xF).astype(np.uint8))


def _reduce(op: np.ufunc, groups: Rows) -> Rows:
    """``op`` over the last axis, a power of two long: pairs first, four times as fast as reduce."""
    flat = groups.reshape(-1)
    for _ in range(groups.shape[2].bit_length() - 1):
        flat = op(flat[0::2], flat[1::2])
    return flat.reshape(groups.shape[:2])


def _pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low, high = codes[..., 0::2], codes[..., 1::2] << np.uint8(4)
    packed: NDArray[np.uint8] = np.bitwise_or(low, high)
    return packed


def _divisor(scales: NDArray[Any]) -> NDArray[np.float32]:
    """The scales, 1 where a block is all zero (or too small for its scale's type)."""
    wide = scales.astype(np.float32)
    return np.where(wide != 0, wide, np.float32(1))
