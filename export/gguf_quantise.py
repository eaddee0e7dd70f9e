"""Quantises blocks of rows with llama.cpp's own kernels, through llama-cpp-python's ggml library.

The kernels are called row block by row block instead of llama_model_quantize on a whole file: no
16-bit copy of the model on disk, memory of one block, exact progress, and Ctrl-C between blocks.
The bytes are the same (tests compare them). Types are chosen elsewhere (gguf_types).
"""

import ctypes
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ExportError

# (GGML type number, values of one block, bytes of one block); ggml.h and ggml-common.h.
_FORMATS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
    "BF16": (30, 1, 2),
}


def row_bytes(kind: str, row: int) -> int:
    """Bytes of one row of ``row`` values in a GGML type."""
    _, block, size = _FORMATS[kind]
    if row % block:
        raise ValueError(f"rows of {row} values do not fit {kind}, whose block has {block}")
    return row // block * size


class Quantiser:
    """Quantises float32 rows on all cores; ``imatrix`` maps tensor names to input importances.

    Values of ``imatrix`` are mean squared activations per input channel. Use as a context manager.
    """

    def __init__(self, imatrix: Mapping[str, NDArray[np.float32]] | None = None) -> None:
        self._imatrix = dict(imatrix or {})
        self._threads = _usable_cores()
        self._pool = ThreadPoolExecutor(self._threads)
        self._library: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def quantise(self, name: str, kind: str, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows [n, row] of tensor ``name`` as [n, bytes of a row], equal for any thread count."""
        if self._library is None:
            self._library = _load_ggml()
        result = np.empty((rows.shape[0], row_bytes(kind, rows.shape[1])), np.uint8)
        bounds = np.linspace(0, rows.shape[0], self._threads + 1).astype(int)
        spans = [(int(a), int(b)) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
        weights = self._imatrix.get(name)
        list(self._pool.map(lambda span: self._span(kind, rows, result, span, weights), spans))
        return result

    def _span(
        self,
        kind: str,
        rows: NDArray[np.float32],
        result: NDArray[np.uint8],
        span: tuple[int, int],
        weights: NDArray[np.float32] | None,
    ) -> None:
        first, last = span
        number, width = _FORMATS[kind][0], rows.shape[1]
        written = self._library.ggml_quantize_chunk(
            number,
            rows.ctypes.data,
            result.ctypes.data,
            first * width,
            last - first,
            width,
            None if weights is None else weights.ctypes.data,
        )
        part = result[first:last]
        if written != part.nbytes or not self._library.ggml_validate_row_data(
            number, part.ctypes.data, part.nbytes
        ):
            raise ExportError(f"llama.cpp could not quantise to {kind}: its result is not valid")


def _load_ggml() -> Any:
    """The ggml library inside llama-cpp-python, with the signatures we call."""
    try:
        from llama_cpp._ggml import libggml
    except (ImportError, OSError, RuntimeError) as error:
        raise ExportError(
            f"quantised GGUF targets need llama-cpp-python ({error}): "
            "pip install 'medmo-edge[llamacpp]', or export gguf-f16"
        ) from error
    library: Any = libggml
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


def _usable_cores() -> int:
    """Cores this process may run on; fewer than the machine has inside a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
