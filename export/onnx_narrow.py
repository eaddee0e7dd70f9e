"""Matrices that DequantizeLinear widens, as float32 rows: fp8, int4 and nvfp4, read slice by slice.

Shares no code with the writer. Sources: ONNX, "Float stored in 8 bits" and "Float stored in 4 bits"
(two values a byte, the first in the low half), DequantizeLinear-24 without zero point. Which file
holds what is ``onnx_read``'s business.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Rows = Callable[[int, int], Array]

#: number types of codes in the data file -> values in a byte
PACKED = {"FLOAT8E4M3FN": 1, "INT4": 2, "FLOAT4E2M1": 2}
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4, -_FP4])
_INT4_VALUES = np.concatenate([np.arange(8), np.arange(-8, 0)]).astype(np.float32)


def fp8_values(codes: Bytes) -> Array:
    """FLOAT8E4M3FN: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    size = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    size = np.where(codes & 0x7F == 0x7F, np.nan, size)
    found: Array = np.where(codes & 0x80, -size, size).astype(np.float32)
    return found


def fp8_rows(codes: Bytes, scales: Array) -> Rows:
    """Codes [in, out], one scale per output channel [out]."""

    def rows(start: int, stop: int) -> Array:
        part = fp8_values(np.ascontiguousarray(codes[:, start:stop].T))
        return np.asarray(part * scales[start:stop, None], np.float32)

    return rows


def int4_rows(codes: Bytes, scales: Array) -> Rows:
    """Codes [in, out / 2] by pairs of output channels, scales [blocks along in, out]."""

    def rows(start: int, stop: int) -> Array:
        first = start // 2
        part = _pairs(np.ascontiguousarray(codes[:, first : -(-stop // 2)]), _INT4_VALUES)
        part = part[:, start - 2 * first :][:, : stop - start].T
        factors = np.repeat(scales[:, start:stop].T, part.shape[1] // len(scales), axis=1)
        return np.asarray(part * factors, np.float32)

    return rows


def nvfp4_rows(codes: Bytes, scales: Bytes, step: float) -> Rows:
    """Codes [out, in / 2], block scales as fp8 [out, blocks along in], and the scale of those."""

    def rows(start: int, stop: int) -> Array:
        part = _pairs(codes[start:stop], _FP4_VALUES)
        factors = fp8_values(scales[start:stop]) * np.float32(step)
        return np.asarray(part * np.repeat(factors, part.shape[1] // factors.shape[1], axis=1))

    return rows


def _pairs(packed: Bytes, values: Array) -> Array:
    """[n, m] bytes as [n, 2 m] values."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return values[codes]
