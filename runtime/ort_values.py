"""Number formats of the graphs, and numpy buffers that ONNX Runtime reads and writes in place.

numpy has no bfloat16: its values are kept as uint16 bits here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.ort_native import load_library

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One format: how numpy stores it, and what ONNX Runtime calls it."""

    name: str
    storage: Any
    element_type: Any

    def encode(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """float32 values in this format, rounded to the nearest, ties to even."""
        if self.name != "bfloat16":
            return values.astype(self.storage, copy=False)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
        return (rounded >> 16).astype(np.uint16)

    def wrap(self, array: NDArray[Any]) -> Any:
        """An OrtValue over the array's own memory; the array must stay alive."""
        library = load_library()
        if self.name == "bfloat16":
            return library.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return library.OrtValue.ortvalue_from_numpy(array)


NUMBERS: dict[str, Number] = {
    "float32": Number(name="float32", storage=np.float32, element_type=np.float32),
    "float16": Number(name="float16", storage=np.float16, element_type=np.float16),
    "bfloat16": Number(name="bfloat16", storage=np.uint16, element_type=_BFLOAT16),
}


_NAMES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}


def decode_rows(rows: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Rows of the embedding table as float32."""
    if dtype == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def number_of(session: Any, name: str) -> Number:
    """The format of one input of a graph, e.g. ``tensor(float16)``."""
    types = {each.name: each.type for each in session.get_inputs()}
    return NUMBERS[_NAMES.get(types.get(name, ""), "float32")]


def bind(binding: Any, name: str, array: NDArray[Any], element_type: Any) -> None:
    """Bind an input to an array's own memory; a session on a GPU copies it now."""
    binding.bind_input(name, "cpu", 0, element_type, list(array.shape), array.ctypes.data)
