"""The KV cache of the TensorRT decoder: buffers on the GPU, one per layer for keys and for values.

TensorRT writes its KV cache layers in place, so a buffer is input and output at once. Where an
engine does not say so, two buffers per layer change places after every call. The capacity is fixed
by the engine.

Shapes: [1, K, C, d], K key/value heads, C cells, d values per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.trt_cuda import Block, Gpu
from medmo_edge.runtime.trt_session import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Heads, cells, values per head, and how numpy stores a value."""

    heads: int
    cells: int
    width: int
    storage: Any

    @property
    def cell_bytes(self) -> int:
        """Bytes of one head's values in one cell."""
        return self.width * int(np.dtype(self.storage).itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of one buffer."""
        return self.heads * self.cells * self.cell_bytes


class KvCache:
    """Buffers of all layers; ``pairs`` are names of past inputs and their present outputs."""

    def __init__(
        self, gpu: Gpu, pairs: Sequence[tuple[str, str]], shape: CacheShape, *, in_place: bool
    ) -> None:
        """Errors: OutOfMemory."""
        self._gpu, self._pairs, self._shape = gpu, tuple(pairs), shape
        purpose = f"a KV cache of {shape.cells} tokens"
        self._past = [self._allocate(purpose) for _ in pairs]
        self._present = self._past if in_place else [self._allocate(purpose) for _ in pairs]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one buffer."""
        return (1, self._shape.heads, self._shape.cells, self._shape.width)

    def _allocate(self, purpose: str) -> Block:
        block = self._gpu.allocate(self._shape.nbytes, purpose)
        # Masked cells are multiplied by zero: they must hold numbers, not what was there before.
        self._gpu.clear(block)
        return block

    def bind(self, context: Context) -> None:
        """Bind past and present for the next launch."""
        names = zip(self._pairs, self._past, self._present, strict=True)
        for (past, present), read, written in names:
            context.bind(past, read.address)
            context.bind(present, written.address)

    def advance(self) -> None:
        """After a launch: what was written is the past of the next one."""
        self._past, self._present = self._present, self._past

    def save(self, used: int) -> NDArray[np.uint8]:
        """The first ``used`` cells of all buffers as bytes."""
        shape = self._shape
        pitch, width = shape.cells * shape.cell_bytes, used * shape.cell_bytes
        state = np.empty((len(self._past), shape.heads * width), np.uint8)
        for row, block in zip(state, self._past, strict=True):
            if width:
                self._gpu.rows_to_host(row, block.address, pitch, width, shape.heads)
        self._gpu.wait()
        return state.reshape(-1)

    def restore(self, state: NDArray[np.uint8], used: int) -> None:
        """Put bytes from ``save`` back."""
        shape = self._shape
        pitch, width = shape.cells * shape.cell_bytes, used * shape.cell_bytes
        rows = np.ascontiguousarray(state).reshape(len(self._past), shape.heads * width)
        for row, block in zip(rows, self._past, strict=True):
            if width:
                self._gpu.rows_to_device(block.address, pitch, row, width, shape.heads)
        self._gpu.wait()
