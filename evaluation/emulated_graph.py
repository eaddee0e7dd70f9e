"""A graph for TensorRT rewritten so that ONNX Runtime computes it on a CPU: for evaluation only.

ONNX Runtime has no bfloat16 matrix products on CPUs and cannot read every narrow weight, so all
16-bit numbers become float32. What costs accuracy stays: weights keep the values that were stored,
rounding of activations to 8 bits stays where it is, and with ``rounded`` the result of every
operator is rounded to the graph's own 16 bits. An engine fuses operators and rounds less often; the
order of its sums is its own. Whole weights are in memory one at a time.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError, BackendUnavailable

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
# Numbers of onnx.TensorProto.DataType.
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
_INLINE_BYTES, _ALIGNMENT = 1024, 4096
_CACHE = re.compile(r"^(past|present)_([kv])_(\d+)$")
# They move values about and round nothing; a cache keeps what was rounded before.
_MOVES = frozenset(
    "Concat DequantizeLinear Expand Gather GatherND Identity Reshape Slice Split Squeeze "
    "TensorScatter Transpose Unsqueeze".split()
)


def emulate_graph(
    source: Path, target: Path, *, rounded: bool = True, form: Literal["gqa", "scatter"] = "gqa"
) -> None:
    """Write ``target`` and ``target`` + ".data": ``source`` in float32.

    A decoder gets a cache of any length and, with ``form`` "gqa", the inputs and outputs that
    ``runtime.ort`` runs, for one sequence. Weights are decoded once instead of in every run.
    Errors: ArtifactError for a file that is no graph of ours, BackendUnavailable without the onnx
    and ml_dtypes packages.
    """
    rewriting = _Rewriting(model=_load(source), folder=source.parent, rounded=rounded)
    rewriting.rewrite_nodes()
    rewriting.rewrite_ends()
    if form == "gqa" and "write_indices" in rewriting.kinds:
        _as_gqa(rewriting.model.graph)
    with target.with_name(f"{target.name}.data").open("wb") as data:
        rewriting.write_weights(data, f"{target.name}.data")
    target.write_bytes(rewriting.model.SerializeToString(deterministic=True))


def dequantised(codes: Array, scales: Array, axis: int, block: int) -> NDArray[np.float32]:
    """ONNX DequantizeLinear without zero point: per tensor, per slice of ``axis``, or in blocks."""
    factors = scales.astype(np.float32)
    if block:
        factors = np.repeat(factors, block, axis=axis)
    elif factors.ndim == 1:
        shape = [1] * codes.ndim
        shape[axis] = -1
        factors = factors.reshape(shape)
    found: NDArray[np.float32] = codes.astype(np.float32) * factors
    return found


def attribute(node: "onnx.NodeProto", name: str, default: int = 0) -> int:
    """An integer attribute of a node."""
    return next((int(each.i) for each in node.attribute if each.name == name), default)


def _load(source: Path) -> "onnx.ModelProto":
    try:
        import ml_dtypes  # noqa: F401
        import onnx
    except ImportError as error:
        raise BackendUnavailable(
            f"emulating TensorRT needs the onnx and ml_dtypes packages ({error}): "
            "pip install 'medmo-edge[export,cpu]'"
        ) from error
    try:
        return onnx.load(str(source), load_external_data=False)
    except Exception as error:  # protobuf's own error types
        raise ArtifactError(f"{source} is no ONNX graph: export again") from error


@dataclass(slots=True, kw_only=True)
class _Rewriting:
    """One graph on its way; ``values`` computes every constant when it is asked for."""

    model: "onnx.ModelProto"
    folder: Path
    rounded: bool
    values: dict[str, Callable[[], Array]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = _kinds(self.model)
        for tensor in self.model.graph.initializer:
            self.values[tensor.name] = self._reader(tensor)

    def _reader(self, tensor: "onnx.TensorProto") -> Callable[[], Array]:
        from onnx import numpy_helper

        return lambda: numpy_helper.to_array(tensor, base_dir=str(self.folder))

    def rewrite_nodes(self) -> None:
        """Decode constants, round results, and let the cache have any length."""
        nodes: list[onnx.NodeProto] = []
        renamed = {} if not self.rounded else self._round_inputs(nodes)
        for node in self.model.graph.node:
            if self._decode(node):
                continue
            if node.op_type == "LessOrEqual":
                node.input[0] = _slots(nodes)
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            nodes.append(node)
            nodes += self._widen(node)
        _keep(self.model.graph.node, nodes)

    def _decode(self, node: "onnx.NodeProto") -> bool:
        """Take a node of constants out of the graph; its result becomes a constant."""
        is_constant = all(name in self.values for name in node.input)
        if node.op_type not in ("DequantizeLinear", "Cast") or not is_constant:
            return False
        inputs = [self.values[name] for name in node.input]
        kind = self.kinds[node.output[0]]
        if node.op_type == "Cast":
            self.values[node.output[0]] = lambda: _narrowed(inputs[0](), kind)
            return True
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size")
        narrow = kind if self.rounded else _FLOAT
        self.values[node.output[0]] = lambda: _narrowed(
            dequantised(inputs[0](), inputs[1](), axis, block), narrow
        )
        return True

    def _round_inputs(self, nodes: "list[onnx.NodeProto]") -> dict[str, str]:
        """Nodes that round what the host gives; the cache holds what was rounded before."""
        renamed = {}
        for value in self.model.graph.input:
            kind = self.kinds[value.name]
            if kind in (_FLOAT16, _BFLOAT16) and not value.name.startswith("past_"):
                renamed[value.name] = f"{value.name}.rounded"
                nodes += _round(value.name, renamed[value.name], kind)
        return renamed

    def _widen(self, node: "onnx.NodeProto") -> "list[onnx.NodeProto]":
        """Make ``node`` give float32; returns the nodes that round its results."""
        for each in node.attribute:
            if node.op_type == "Cast" and each.name == "to" and each.i in (_FLOAT16, _BFLOAT16):
                each.i = _FLOAT
        if not self.rounded or node.op_type in _MOVES:
            return []
        added: list[onnx.NodeProto] = []
        for index, name in enumerate(node.output):
            if self.kinds[name] in (_FLOAT16, _BFLOAT16):
                node.output[index] = f"{name}.wide"
                added += _round(f"{name}.wide", name, self.kinds[name])
        return added

    def rewrite_ends(self) -> None:
        """Inputs and outputs in float32."""
        for value in (*self.model.graph.input, *self.model.graph.output):
            tensor = value.type.tensor_type
            if tensor.elem_type in (_FLOAT16, _BFLOAT16):
                tensor.elem_type = _FLOAT
            if _CACHE.match(value.name):
                tensor.shape.dim[2].dim_param = "C"
        del self.model.graph.value_info[:]

    def write_weights(self, data: IO[bytes], location: str) -> None:
        """The constants that are still read, large ones into ``data``."""
        from onnx import numpy_helper

        wanted = {name for node in self.model.graph.node for name in node.input}
        tensors = []
        for name in sorted(wanted & set(self.values)):
            array = self.values[name]()
            if array.dtype.name in ("float16", "bfloat16"):
                array = array.astype(np.float32)
            if array.nbytes < _INLINE_BYTES:
                tensors.append(numpy_helper.from_array(array, name))
            else:
                tensors.append(_external(name, array, data, location))
        _keep(self.model.graph.initializer, tensors)


def _kinds(model: "onnx.ModelProto") -> dict[str, int]:
    """Number type of every value."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model).graph
    typed = (*graph.input, *graph.output, *graph.value_info)
    kinds = {value.name: int(value.type.tensor_type.elem_type) for value in typed}
    return kinds | {tensor.name: int(tensor.data_type) for tensor in graph.initializer}


def _narrowed(values: Array, kind: int) -> Array:
    """``values`` rounded to a number type of ONNX."""
    import onnx

    narrow = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return values.astype(narrow)


def _round(source: str, target: str, kind: int) -> "list[onnx.NodeProto]":
    from onnx import helper

    narrow = f"{target}.narrow"
    return [
        helper.make_node("Cast", [source], [narrow], to=kind),
        helper.make_node("Cast", [narrow], [target], to=_FLOAT),
    ]


def _slots(nodes: "list[onnx.NodeProto]") -> str:
    """Add what numbers the cells of a cache of any length, int64 [1, 1, 1, C]."""
    from onnx import helper

    def constant(name: str, value: Any) -> str:
        array = np.asarray(value, np.int64)
        tensor = helper.make_tensor(name, 7, array.shape, array.reshape(-1))
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    zero, one = constant("cells.zero", 0), constant("cells.one", 1)
    shape = constant("cells.shape", [1, 1, 1, -1])
    nodes += [
        helper.make_node("Shape", ["past_k_0"], ["cells.sizes"], start=2, end=3),
        helper.make_node("Squeeze", ["cells.sizes"], ["cells.count"]),
        helper.make_node("Range", [zero, "cells.count", one], ["cells.flat"]),
        helper.make_node("Reshape", ["cells.flat", shape], ["cells"]),
    ]
    return "cells"


def _as_gqa(graph: "onnx.GraphProto") -> None:
    """Names of the ``gqa`` form; the cell of the first token follows from the cells in use."""
    from onnx import TensorProto, helper

    names = {}
    for value in (*graph.input, *graph.output):
        if match := _CACHE.match(value.name):
            part = {"k": "key", "v": "value"}[match[2]]
            past = "past_key_values" if match[1] == "past" else "present"
            names[value.name] = value.name = f"{past}.{match[3]}.{part}"
    for node in graph.node:
        for ends in (node.input, node.output):
            for index, name in enumerate(ends):
                ends[index] = names.get(name, name)
    inputs = [each for each in graph.input if each.name != "write_indices"]
    inputs.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]))
    inputs.append(helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []))
    _keep(graph.input, inputs)
    first = [
        helper.make_node("Cast", ["seqlens_k"], ["cells.last"], to=TensorProto.INT64),
        helper.make_node("Shape", ["inputs_embeds"], ["cells.rows"], start=1, end=2),
        helper.make_node("Sub", ["cells.last", "cells.rows"], ["cells.before"]),
        helper.make_node("Constant", [], ["cells.next"], value_ints=[1]),
        helper.make_node("Add", ["cells.before", "cells.next"], ["write_indices"]),
    ]
    _keep(graph.node, [*first, *graph.node])


def _external(name: str, array: Array, data: IO[bytes], location: str) -> "onnx.TensorProto":
    import onnx

    data.write(bytes(-data.tell() % _ALIGNMENT))
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    entries = {"location": location, "offset": data.tell(), "length": array.nbytes}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    data.write(np.ascontiguousarray(array).data)
    return tensor


def _keep(field: Any, values: Iterable[Any]) -> None:
    """Replace what a repeated field of a message holds."""
    copies = list(values)
    del field[:]
    field.extend(copies)
