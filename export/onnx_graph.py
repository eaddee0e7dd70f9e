"""An ONNX graph under construction, and its weights streamed into one external data file.

Knows nothing of Qwen3-VL and computes nothing: nodes go in, weights are promises that write their
bytes when the graph is saved. Peak memory follows the blocks those promises hold, not the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge import __version__

if TYPE_CHECKING:
    import onnx

# Page size: a runtime may map weights straight from the file.
ALIGNMENT = 4096
_STRIP = 64
CONTRIB = "com.microsoft"
# The first intermediate representation that knows the operator set.
_IR_VERSION = {21: 10, 23: 11, 24: 12}
_BITS = {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT8E4M3FN": 8, "INT8": 8, "UINT8": 8}
_BITS |= {"INT4": 4, "FLOAT4E2M1": 4, "INT32": 32, "INT64": 64}
_BY_NUMPY = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64", "int32": "INT32"}

Count = Callable[[int], None]
Shape = Sequence[int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One initializer in the data file; ``dtype`` is a name of onnx.TensorProto.DataType."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the data file; two 4-bit values share one."""
        return -(-prod(self.shape) * _BITS[self.dtype] // 8)


class Region:
    """The place of one weight in the data file: rows in order, or columns of a matrix."""

    def __init__(self, file: IO[bytes], start: int, nbytes: int, count: Count) -> None:
        self._file, self._start, self._nbytes, self._count = file, start, nbytes, count
        self._written = 0

    def append(self, values: NDArray[Any]) -> None:
        """The next bytes of the weight."""
        self._put(self._written, np.ascontiguousarray(values))
        self._count(values.nbytes)

    def put_columns(self, first_byte: int, columns: NDArray[Any]) -> None:
        """Columns [rows, n] of a matrix that is stored row by row; n > 0.

        ``first_byte`` is where the first of them lies within a row.
        """
        row_bytes = self._nbytes // columns.shape[0]
        for index, row in enumerate(_by_rows(columns)):
            self._put(index * row_bytes + first_byte, row)
        self._count(columns.nbytes)

    def _put(self, offset: int, values: NDArray[Any]) -> None:
        self._file.seek(self._start + offset)
        self._file.write(values.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer itself
        self._written += values.nbytes

    def finish(self) -> None:
        """Raises RuntimeError when the weight is not whole: a bug of whoever wrote it."""
        if self._written != self._nbytes:
            raise RuntimeError(f"wrote {self._written} of {self._nbytes} bytes of a weight")


def _by_rows(columns: NDArray[Any]) -> NDArray[Any]:
    """A contiguous copy; narrow strips keep a transposed matrix in the cache on the way."""
    copy = np.empty(columns.shape, columns.dtype)
    for first in range(0, columns.shape[1], _STRIP):
        copy[:, first : first + _STRIP] = columns[:, first : first + _STRIP]
    return copy


Fill = Callable[[Sequence[Region]], None]


@dataclass(slots=True)
class Graph:
    """Nodes, inputs, outputs and promised weights; values are known by their names."""

    name: str
    opset: int
    nodes: "list[onnx.NodeProto]" = field(default_factory=list)
    inputs: "list[onnx.ValueInfoProto]" = field(default_factory=list)
    outputs: "list[onnx.ValueInfoProto]" = field(default_factory=list)
    constants: "dict[tuple[bytes, tuple[int, ...], str], onnx.TensorProto]" = field(
        default_factory=dict
    )
    fills: list[tuple[tuple[Weight, ...], Fill]] = field(default_factory=list)

    def add_input(self, name: str, dtype: str, shape: Shape) -> str:
        """A graph input; symbolic dimensions are strings."""
        from onnx import TensorProto, helper

        kind = TensorProto.DataType.Value(dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def add_output(self, name: str, dtype: str, shape: Shape) -> None:
        """Make an existing value an output."""
        from onnx import TensorProto, helper

        kind = TensorProto.DataType.Value(dtype)
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def add_weight(self, weight: Weight, fill: Callable[[Region], None]) -> str:
        """A weight written by ``fill`` when the graph is saved; returns its name."""
        self.add_weights((weight,), lambda regions: fill(regions[0]))
        return weight.name

    def add_weights(self, weights: tuple[Weight, ...], fill: Fill) -> None:
        """Weights that one pass over a tensor writes together."""
        self.fills.append((weights, fill))

    def constant(self, values: Any, dtype: type[np.generic] | np.dtype[Any] = np.int64) -> str:
        """A small array inside the graph file; equal ones are shared."""
        from onnx import numpy_helper

        array = np.asarray(values, dtype, order="C")
        key = array.tobytes(), array.shape, array.dtype.name
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            self.constants[key] = numpy_helper.from_array(array, name)
        return self.constants[key].name

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output; returns the value's name."""
        return self.add_many(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def add_many(
        self, op: str, *inputs: str, outputs: int | Sequence[str], domain: str = "", **attrs: Any
    ) -> list[str]:
        """A node with several outputs, made-up names or given ones ("" for one not wanted)."""
        from onnx import helper

        name = f"{op}_{len(self.nodes)}"
        if isinstance(outputs, int):
            outputs = [name if index == 0 else f"{name}.{index}" for index in range(outputs)]
        made = helper.make_node(op, inputs, outputs, name=name, domain=domain, **attrs)
        self.nodes.append(made)
        return list(outputs)

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        weights = [weight for group, _ in self.fills for weight in group]
        return sum(_padded(weight.nbytes) for weight in weights)


def save_graph(graph: Graph, path: Path, count: Count) -> None:
    """Write the weights to ``path`` + ".data", then the graph to ``path``.

    ``count`` receives the bytes of every block as it is written.
    """
    data_path = path.with_name(f"{path.name}.data")
    initializers = list(graph.constants.values())
    offset = 0
    with data_path.open("wb") as file:
        for weights, fill in graph.fills:
            regions = []
            for weight in weights:
                regions.append(Region(file, offset, weight.nbytes, count))
                initializers.append(_external(weight, data_path.name, offset))
                offset += _padded(weight.nbytes)
            fill(regions)
            for region in regions:
                region.finish()
        file.truncate(offset)
    path.write_bytes(_model(graph, initializers).SerializeToString(deterministic=True))


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT


def _external(weight: Weight, location: str, offset: int) -> "onnx.TensorProto":
    import onnx

    tensor = onnx.TensorProto(
        name=weight.name,
        data_type=onnx.TensorProto.DataType.Value(weight.dtype),
        dims=weight.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    entries = {"location": location, "offset": str(offset), "length": str(weight.nbytes)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _model(graph: Graph, initializers: "list[onnx.TensorProto]") -> "onnx.ModelProto":
    from onnx import helper

    domains = {node.domain for node in graph.nodes}
    opsets = [helper.make_opsetid("", graph.opset)]
    if CONTRIB in domains:
        opsets.append(helper.make_opsetid(CONTRIB, 1))
    content = helper.make_graph(
        graph.nodes, graph.name, graph.inputs, graph.outputs, initializer=initializers
    )
    return helper.make_model(
        content,
        opset_imports=opsets,
        ir_version=_IR_VERSION[graph.opset],
        producer_name="medmo-edge",
        producer_version=__version__,
    )
