"""The KV cache of the ONNX decoder: one buffer per layer for keys and one for values.

Each buffer is bound as past and as present of the same layer, so attention writes in place and
nothing is copied between steps. It grows only when a conversation needs more cells.

Shapes: [1, K, C, d], K key/value heads, C cells, d values per head.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.ort_fit import Place
from medmo_edge.runtime.ort_native import load_library
from medmo_edge.runtime.ort_values import Number


class KvCache:
    """Buffers of all layers; ``cells`` is how many tokens they hold."""

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        shape: tuple[int, int],
        number: Number,
        place: Place,
        cells: int,
    ) -> None:
        """``pairs``: names of past inputs and their present outputs; ``shape``: (K, d).

        Errors: MemoryError, or the library's own, when the memory does not suffice.
        """
        self._pairs, self._shape, self._number, self._place = pairs, shape, number, place
        self.cells = cells
        self._arrays: list[NDArray[Any]] = []
        self._values = [self._allocate(cells) for _ in pairs]

    def _allocate(self, cells: int) -> Any:
        library = load_library()
        shape = (1, self._shape[0], cells, self._shape[1])
        if self._place == "cuda":
            return library.OrtValue.ortvalue_from_shape_and_type(
                shape, self._number.element_type, "cuda", 0
            )
        # Zeros, which cost nothing until they are used: where attention is masked rather than cut,
        # what lies behind the end is multiplied by 0, and must not be NaN.
        array = np.zeros(shape, self._number.storage)
        self._arrays.append(array)
        return self._number.wrap(array)

    def bind(self, binding: Any) -> None:
        """Bind every buffer as input and output of its layer."""
        for (past, present), value in zip(self._pairs, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

    def save(self, used: int) -> NDArray[np.uint8]:
        """The first ``used`` cells of all buffers as bytes."""
        heads, width = self._shape
        state = np.empty((len(self._pairs), heads, used, width), self._number.storage)
        for index in range(len(self._pairs)):
            state[index] = self._host(index)[0, :, :used]
        return state.reshape(-1).view(np.uint8)

    def restore(self, state: NDArray[np.uint8], used: int) -> None:
        """Put bytes from ``save`` back; there must be room for them."""
        heads, width = self._shape
        shape = (len(self._pairs), heads, used, width)
        kept = np.ascontiguousarray(state).view(self._number.storage).reshape(shape)
        for index in range(len(self._pairs)):
            host = self._host(index)
            host[0, :, :used] = kept[index]
            if self._place == "cuda":
                self._values[index].update_inplace(host)

    def _host(self, index: int) -> NDArray[Any]:
        """The buffer itself on the CPU, a copy of it from a GPU."""
        if self._place == "cuda":
            copy: NDArray[Any] = self._values[index].numpy()
            return copy
        return self._arrays[index]
