"""The weights of an ONNX artifact as float32 rows, decoded by the operators' own definitions.

Shares no code with the writer. Sources: ONNX Runtime, docs/ContribOperators.md (MatMulNBits,
symmetric: value = (code - 2^(bits - 1)) * scale, low nibble first; DynamicQuantizeMatMul: value =
code * scale of its column); ONNX, external data.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError
from medmo_edge.export.onnx_narrow import PACKED, fp8_rows, int4_rows, nvfp4_rows
from medmo_edge.manifest import Manifest

Array = NDArray[np.float32]
_CODES, _SCALES, _STEP = ".codes", ".scales", ".step"
_DTYPES = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "uint16",
    "INT8": "int8",
    "UINT8": "uint8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxTensor:
    """One weight under its checkpoint's name; ``rows(start, stop)`` in the checkpoint's layout."""

    name: str
    stored_as: str
    rows: Callable[[int, int], Array]


def onnx_tensors(manifest: Manifest) -> Iterator[OnnxTensor]:
    """Every weight of both graphs, and the embedding table.

    Errors: ArtifactError for a graph that is damaged or stores numbers in a way not known here.
    """
    for role in ("vision", "decoder"):
        yield from _graph_tensors(manifest.path_of(role))
    table = np.load(manifest.path_of("embeddings"), mmap_mode="r", allow_pickle=False)
    yield OnnxTensor(
        name="model.language_model.embed_tokens.weight",
        stored_as=str(manifest.weights.get("embeddings_dtype", table.dtype)),
        rows=lambda start, stop: _floats(table[start:stop]),
    )


def _graph_tensors(path: Path) -> Iterator[OnnxTensor]:
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own error types
        raise ArtifactError(f"{path} is no ONNX graph: export again") from error
    users = {name: node for node in graph.node for name in node.input}
    held = {each.name: each for each in graph.initializer if each.external_data}
    for name, tensor in held.items():
        if name.endswith((_SCALES, _STEP)):
            continue
        if name.endswith(_CODES):
            source = name.removesuffix(_CODES)
            if _kind(tensor) in PACKED:
                yield _widened(path, source, held)
                continue
            scales = _mapped(path, held[source + _SCALES])
            codes = _mapped(path, tensor)
            if codes.dtype == np.int8:
                yield _per_channel(source, codes, scales)
            else:
                whole = _blocks(source, users[name], codes, scales)
                yield from _parts(whole, graph, users[users[name].output[0]])
        else:
            yield _plain(name, users.get(name), _mapped(path, tensor))


def _kind(tensor: Any) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(tensor.data_type))


def _mapped(path: Path, tensor: Any) -> NDArray[Any]:
    """The external data of one initializer; codes of a type numpy lacks as bytes."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    kind = _kind(tensor)
    if kind not in _DTYPES and kind not in PACKED:
        raise ArtifactError(f"{path}: {tensor.name} holds {kind}, which cannot be compared")
    *outer, width = tuple(tensor.dims) or (1,)
    return np.memmap(
        path.parent / where["location"],
        dtype=_DTYPES.get(kind, "uint8"),
        mode="r",
        offset=int(where.get("offset", 0)),
        shape=(*outer, width // PACKED.get(kind, 1)),
    )


def _widened(path: Path, name: str, held: dict[str, Any]) -> OnnxTensor:
    """A matrix that DequantizeLinear widens."""
    tensor, scales = held[name + _CODES], _mapped(path, held[name + _SCALES])
    kind, codes = _kind(tensor), _mapped(path, tensor)
    if kind == "FLOAT4E2M1":
        step = float(_mapped(path, held[name + _STEP])[0])
        return OnnxTensor(name=name, stored_as="nvfp4", rows=nvfp4_rows(codes, scales, step))
    if kind == "INT4":
        label = f"4 bits, blocks of {codes.shape[0] // scales.shape[0]}"
        return OnnxTensor(name=name, stored_as=label, rows=int4_rows(codes, _floats(scales)))
    return OnnxTensor(name=name, stored_as="fp8", rows=fp8_rows(codes, _floats(scales)))


def _plain(name: str, user: Any, values: NDArray[Any]) -> OnnxTensor:
    """Matrices that MatMul multiplies from the right lie transposed."""
    turned = (
        values.T if values.ndim == 2 and user is not None and user.op_type == "MatMul" else values
    )
    kind = "bfloat16" if values.dtype == np.uint16 else str(values.dtype)
    return OnnxTensor(
        name=name, stored_as=kind, rows=lambda start, stop: _floats(turned[start:stop])
    )


def _blocks(name: str, user: Any, codes: NDArray[Any], scales: NDArray[Any]) -> OnnxTensor:
    settings = {each.name: each.i for each in user.attribute}
    bits, per_row = settings["bits"], codes.shape[1]

    def rows(start: int, stop: int) -> Array:
        part = codes[start:stop]
        if bits == 4:
            part = np.stack([part & 15, part >> 4], axis=-1).reshape(*part.shape[:2], -1)
        factors = _floats(scales[start * per_row : stop * per_row]).reshape(-1, per_row, 1)
        values = (part.astype(np.float32) - float(1 << (bits - 1))) * factors
        return np.asarray(values.reshape(len(part), -1)[:, : settings["K"]], np.float32)

    return OnnxTensor(
        name=name, stored_as=f"{bits} bits, blocks of {settings['block_size']}", rows=rows
    )


def _parts(whole: OnnxTensor, graph: Any, reader: Any) -> Iterator[OnnxTensor]:
    """The matrices that one product joins, by their joined names and the sizes of the split."""
    from onnx import numpy_helper

    names = whole.name.split("+")
    if len(names) == 1:
        yield whole
        return
    (sizes,) = (each for each in graph.initializer if each.name == reader.input[1])
    first = 0
    for name, size in zip(names, numpy_helper.to_array(sizes).tolist(), strict=True):
        yield OnnxTensor(name=name, stored_as=whole.stored_as, rows=_shifted(whole.rows, first))
        first += size


def _shifted(rows: Callable[[int, int], Array], first: int) -> Callable[[int, int], Array]:
    return lambda start, stop: rows(first + start, first + stop)


def _per_channel(name: str, codes: NDArray[Any], scales: NDArray[Any]) -> OnnxTensor:
    """Codes [in, out] with one scale per output channel."""

    def rows(start: int, stop: int) -> Array:
        part = np.ascontiguousarray(codes[:, start:stop].T, np.float32)
        return np.asarray(part * _floats(scales[start:stop])[:, None], np.float32)

    return OnnxTensor(name=name, stored_as="8 bits per channel", rows=rows)


def _floats(values: NDArray[Any]) -> Array:
    if values.dtype == np.uint16:  # bfloat16: the upper half of a float32
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(values, np.float32)
