"""The weights of one checkpoint as nodes and initializers of one graph.

Initializers are named after their tensor, quantised parts with a suffix, so the keys of a
calibration record find them. This module streams tensors; how numbers are rounded is in
``onnx_encode`` and which tensor gets which encoding is the caller's choice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import CalibrationError, ExportError
from medmo_edge.export.onnx_encode import (
    encode_fp8,
    encode_int4,
    encode_int8,
    encode_nbits,
    encode_nvfp4,
    nvfp4_step,
    pack_int4,
)
from medmo_edge.export.onnx_graph import CONTRIB, Graph, Region, Weight

GraphDtype = Literal["float32", "float16", "bfloat16"]
Kind = Literal["float", "nbits", "dynamic", "int4", "fp8", "nvfp4"]

ELEMENT: dict[GraphDtype, str] = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
}
#: the same as numbers of onnx.TensorProto.DataType
NUMBER: dict[GraphDtype, int] = {"float32": 1, "float16": 10, "bfloat16": 16}
# Float32 bytes held at once; encoders need a few times as much on top.
_BLOCK_BYTES = 16 << 20
# Columns of 4-bit values share bytes in pairs, so blocks start at even rows.
_EVEN = ~1
# MatMulNBits accuracy_level: activations in 8 bits, the fast kernels of CPUs.
_INT8_ACTIVATIONS = 4

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How a matrix is stored.

    ``float``: in the graph's type. ``nbits``: MatMulNBits, ``bits`` 8 or 4 in blocks. ``dynamic``:
    int8 per output channel, activations to 8 bits at run time, scaled by the largest of the whole
    input or, with ``per_token``, of each row. ``int4``, ``fp8`` and ``nvfp4``: plain ONNX
    (DequantizeLinear); fp8 activations need a scale from calibration.
    """

    kind: Kind
    bits: int = 0
    block: int = 0
    per_token: bool = False

    @property
    def label(self) -> str:
        """The name in the manifest; "float" is replaced by the graph's type there."""
        names = {"nbits": f"int{self.bits}", "dynamic": "int8-dynamic"}
        return names.get(self.kind, self.kind)

    def fits(self, width: int) -> bool:
        """Whether rows of this many values can be stored so."""
        return not self.block or width % self.block == 0


FLOAT = Encoding(kind="float")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """Scales moved between layers (AWQ): same result in exact arithmetic, smaller rounding errors.

    By tensor name: ``columns`` multiplies input channels, ``rows`` divides output channels (or the
    entries of a norm's weight).
    """

    columns: Mapping[str, Rows] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Weights:
    """Adds tensors of ``checkpoint`` to ``graph``; ``stored`` logs (encoding, values) of each.

    ``fallbacks`` names matrices whose rows do not fit the blocks they should have had.

    ``activation_scales`` maps matrices without ".weight" to amax / 448, for fp8 only.
    """

    graph: Graph
    checkpoint: Checkpoint
    dtype: GraphDtype
    folding: Folding = field(default_factory=Folding)
    activation_scales: Mapping[str, float] = field(default_factory=dict)
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    _inputs: dict[tuple[str, float], str] = field(default_factory=dict)
    _coded: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)

    def vector(self, name: str) -> str:
        """A tensor in the graph's type, shape unchanged: norms, biases, position tables."""
        shape = self.checkpoint.tensors[name].shape

        def fill(region: Region) -> None:
            for _, block in self.blocks(name):
                region.append(self.narrow(name, block))

        weight = Weight(name=name, dtype=ELEMENT[self.dtype], shape=shape)
        self.stored[name] = self.dtype, prod(shape)
        return self.graph.add_weight(weight, fill)

    def linear(self, x: str, name: str, encoding: Encoding = FLOAT, bias: str = "") -> str:
        """x @ W^T (+ bias) for matrix ``name`` [out, in]; falls back to the graph's type."""
        width = prod(self.checkpoint.tensors[name].shape[1:])
        if not encoding.fits(width):
            self.fallbacks[name] = f"{encoding.label} -> {self.dtype}"
            encoding = FLOAT
        label = self.dtype if encoding.kind == "float" else encoding.label
        self.stored[name] = label, prod(self.checkpoint.tensors[name].shape)
        return _ENCODERS[encoding.kind](self, x, name, encoding, bias)

    def linears(self, x: str, names: Sequence[str], encoding: Encoding = FLOAT) -> list[str]:
        """x @ W^T for several matrices that read one input.

        MatMulNBits gets their rows as one matrix, whose name is theirs joined by "+": on a CPU a
        step starts its threads fewer times.
        """
        fits = all(encoding.fits(self.matrix_shape(name)[1]) for name in names)
        if encoding.kind != "nbits" or not fits:
            return [self.linear(x, name, encoding) for name in names]
        for name in names:
            self.stored[name] = encoding.label, prod(self.checkpoint.tensors[name].shape)
        joined = _nbits_rows(self, x, names, encoding)
        sizes = self.graph.constant([self.matrix_shape(name)[0] for name in names])
        return self.graph.add_many("Split", joined, sizes, outputs=len(names), axis=-1)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a tensor; a patch convolution is a matrix too."""
        shape = self.checkpoint.tensors[name].shape
        return shape[0], prod(shape[1:])

    def add_bias(self, x: str, bias: str) -> str:
        """x + bias, or x when there is none."""
        return self.graph.add("Add", x, self.vector(bias)) if bias else x

    def blocks(self, name: str) -> Iterator[tuple[int, Rows]]:
        """(first row, rows [n, in]) after folding; vectors come as [n, 1].

        Errors: ExportError for NaN or infinity in the checkpoint.
        """
        out, width = self.matrix_shape(name)
        step = max(2, (_BLOCK_BYTES // (4 * width)) & _EVEN)
        columns, divisor = self.folding.columns.get(name), self.folding.rows.get(name)
        first = 0
        for raw in self.checkpoint.row_blocks(name, step * 4 * width):
            block = np.ascontiguousarray(raw.reshape(-1, width))
            if not np.isfinite(block).all():
                raise ExportError(
                    f"{self.checkpoint.path}: tensor {name} holds NaN or infinity: "
                    "the checkpoint is damaged or its training diverged"
                )
            if columns is not None:
                block = block * columns
            if divisor is not None:
                block = block / divisor[first : first + len(block), None]
            yield first, block
            first += len(block)

    def narrow(self, name: str, block: Rows) -> NDArray[Any]:
        """A block in the graph's type. Errors: ExportError when float16 cannot hold it."""
        with np.errstate(over="ignore"):
            narrowed = block.astype(self.numpy_dtype)
        if self.dtype == "float16" and not np.isfinite(narrowed).all():
            raise ExportError(
                f"{self.checkpoint.path}: tensor {name} exceeds the range of float16: "
                "choose a target with float32"
            )
        return narrowed

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The graph's type in numpy (bfloat16 comes from ml_dtypes)."""
        if self.dtype == "bfloat16":
            import ml_dtypes

            narrow: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return narrow
        return np.dtype(self.dtype)

    def quantised_input(self, x: str, name: str) -> str:
        """x rounded to fp8 by the calibrated scale of matrix ``name``; shared by equal scales."""
        scale = self.activation_scales.get(name.removesuffix(".weight"))
        if scale is None or not (np.isfinite(scale) and scale > 0):
            raise CalibrationError(
                f"the calibration record has {'no' if scale is None else 'an impossible'} "
                f"activation scale for {name}: calibrate again with image and text samples"
            )
        if (x, scale) not in self._inputs:
            import ml_dtypes

            stored = self.graph.constant(scale, self.numpy_dtype)
            zero = self.graph.constant(0, np.dtype(ml_dtypes.float8_e4m3fn))
            codes = self.graph.add("QuantizeLinear", x, stored, zero)
            self._inputs[x, scale] = self.graph.add("DequantizeLinear", codes, stored, zero)
        return self._inputs[x, scale]

    def coded_rows(self, x: str) -> tuple[str, str, str, str]:
        """(uint8 codes of x, largest value of each row [.., 1], step, zero point), made once.

        x = (codes - zero point) * step * largest value. The operators for int8 know one scale of
        their whole input, so the rows are made equally large first; what is left of the range is
        found at run time, as outputs of GELU fill little more than its upper half.
        """
        if x not in self._coded:
            graph = self.graph
            largest = graph.add("ReduceMax", graph.add("Abs", x), graph.constant([-1]), keepdims=1)
            size = graph.add("Max", largest, graph.constant(1e-12, np.float32))
            even = graph.add("Div", x, size)
            codes, step, zero = graph.add_many("DynamicQuantizeLinear", even, outputs=3)
            self._coded[x] = codes, size, step, zero
        return self._coded[x]


def _float(weights: Weights, x: str, name: str, encoding: Encoding, bias: str) -> str:
    out, width = weights.matrix_shape(name)
    weight = Weight(name=name, dtype=ELEMENT[weights.dtype], shape=(width, out))

    def fill(region: Region) -> None:
        for first, block in weights.blocks(name):
            narrowed = weights.narrow(name, block)
            region.put_columns(first * narrowed.itemsize, narrowed.T)

    y = weights.graph.add("MatMul", x, weights.graph.add_weight(weight, fill))
    return weights.add_bias(y, bias)


def _nbits(weights: Weights, x: str, name: str, encoding: Encoding, bias: str) -> str:
    return _nbits_rows(weights, x, [name], encoding, bias)


def _nbits_rows(
    weights: Weights, x: str, names: Sequence[str], encoding: Encoding, bias: str = ""
) -> str:
    """MatMulNBits over the rows of all matrices, one below the other."""
    width = weights.matrix_shape(names[0])[1]
    out = sum(weights.matrix_shape(name)[0] for name in names)
    bits, block, joined = encoding.bits, encoding.block, "+".join(names)
    shape = (out, width // block, block * bits // 8)
    codes = Weight(name=f"{joined}.codes", dtype="UINT8", shape=shape)
    scales = Weight(
        name=f"{joined}.scales", dtype=ELEMENT[weights.dtype], shape=(out * width // block,)
    )

    def fill(regions: Sequence[Region]) -> None:
        for _, rows in chain.from_iterable(weights.blocks(name) for name in names):
            parts = encode_nbits(rows, bits, block, weights.numpy_dtype)
            for region, part in zip(regions, parts, strict=True):
                region.append(part)

    weights.graph.add_weights((codes, scales), fill)
    optional = ["", "", weights.vector(bias)] if bias else []
    return weights.graph.add(
        "MatMulNBits",
        *(x, codes.name, scales.name, *optional),
        domain=CONTRIB,
        K=width,
        N=out,
        bits=bits,
        block_size=block,
        accuracy_level=_INT8_ACTIVATIONS,
    )


def _dynamic(weights: Weights, x: str, name: str, encoding: Encoding, bias: str) -> str:
    codes, scales = _per_channel(weights, name, "INT8", encode_int8)
    if not encoding.per_token:
        optional = ["", weights.vector(bias)] if bias else []
        inputs = (x, codes, scales, *optional)
        return weights.graph.add("DynamicQuantizeMatMul", *inputs, domain=CONTRIB)
    graph, (coded, size, step, zero) = weights.graph, weights.coded_rows(x)
    inputs = (coded, codes, step, scales, zero)
    y = graph.add("MatMulIntegerToFloat", *inputs, domain=CONTRIB)
    return weights.add_bias(graph.add("Mul", y, size), bias)


def _fp8(weights: Weights, x: str, name: str, encoding: Encoding, bias: str) -> str:
    rounded = weights.quantised_input(x, name)
    codes, scales = _per_channel(
        weights, name, "FLOAT8E4M3FN", lambda rows: encode_fp8(rows, weights.numpy_dtype)
    )
    wide = weights.graph.add("DequantizeLinear", codes, scales, axis=1)
    return weights.add_bias(weights.graph.add("MatMul", rounded, wide), bias)


def _per_channel(
    weights: Weights, name: str, dtype: str, encode: Callable[[Rows], Sequence[NDArray[Any]]]
) -> tuple[str, str]:
    """Byte codes [in, out] and one scale per output channel; returns their names."""
    out, width = weights.matrix_shape(name)
    codes = Weight(name=f"{name}.codes", dtype=dtype, shape=(width, out))
    scales = Weight(name=f"{name}.scales", dtype=ELEMENT[weights.dtype], shape=(out,))

    def fill(regions: Sequence[Region]) -> None:
        for first, rows in weights.blocks(name):
            encoded, scale = encode(rows)
            regions[0].put_columns(first, encoded.T)
            regions[1].append(scale)

    weights.graph.add_weights((codes, scales), fill)
    return codes.name, scales.name


def _int4(weights: Weights, x: str, name: str, encoding: Encoding, bias: str) -> str:
    out, width = weights.matrix_shape(name)
    block = encoding.block
    codes = Weight(name=f"{name}.codes", dtype="INT4", shape=(width, out))
    scales = Weight(
        name=f"{name}.scales", dtype=ELEMENT[weights.dtype], shape=(width // block, out)
    )

    def fill(regions: Sequence[Region]) -> None:
        for first, rows in weights.blocks(name):
            encoded, scale = encode_int4(rows, block, weights.numpy_dtype)
            regions[0].put_columns(first // 2, pack_int4(np.ascontiguousarray(encoded.T)))
            regions[1].put_columns(first * scale.itemsize, scale.T)

    weights.graph.add_weights((codes, scales), fill)
    wide = weights.graph.add("DequantizeLinear", codes.name, scales.name, axis=0, block_size=block)
    return weights.add_bias(weights.graph.add("MatMul", x, wide), bias)


def _nvfp4(weights: Weights, x: str, name: str, encoding: Encoding, bias: str) -> str:
    """Blocks of 4-bit floats along the rows [out, in], with scales in two levels."""
    out, width = weights.matrix_shape(name)
    block = encoding.block
    codes = Weight(name=f"{name}.codes", dtype="FLOAT4E2M1", shape=(out, width))
    scales = Weight(name=f"{name}.scales", dtype="FLOAT8E4M3FN", shape=(out, width // block))
    step = Weight(name=f"{name}.step", dtype="FLOAT", shape=())

    def fill(regions: Sequence[Region]) -> None:
        largest = max(float(np.abs(rows).max()) for _, rows in weights.blocks(name))
        found = nvfp4_step(largest)
        for _, rows in weights.blocks(name):
            for region, part in zip(regions[:2], encode_nvfp4(rows, block, found), strict=True):
                region.append(part)
        regions[2].append(found)

    graph = weights.graph
    graph.add_weights((codes, scales, step), fill)
    wide_scales = graph.add("DequantizeLinear", scales.name, step.name)
    if weights.dtype != "float32":
        wide_scales = graph.add("Cast", wide_scales, to=NUMBER[weights.dtype])
    wide = graph.add("DequantizeLinear", codes.name, wide_scales, axis=-1, block_size=block)
    turned = graph.add("Transpose", wide, perm=[1, 0])
    return weights.add_bias(graph.add("MatMul", x, turned), bias)


_ENCODERS: dict[Kind, Callable[[Weights, str, str, Encoding, str], str]] = {
    "float": _float,
    "nbits": _nbits,
    "dynamic": _dynamic,
    "int4": _int4,
    "fp8": _fp8,
    "nvfp4": _nvfp4,
}
