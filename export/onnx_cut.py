"""Cuts a graph file down to a few layers: same operators and shapes, a fraction of the bytes.

For checking quickly whether a builder accepts an artifact. The first layers are kept and, of a
decoder, the last one, so that the tail with ``last_index`` stays as it is. The cut graph computes
nothing useful. Only graphs of this exporter in the ``scatter`` form are understood; whole weights
are never in memory.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medmo_edge.errors import ArtifactError, ExportError, UsageError

if TYPE_CHECKING:
    import onnx

_ALIGNMENT = 4096
_COPY_BYTES = 4 << 20
# The norm that a layer begins with: its data input is the hidden state between two layers.
_DECODER_NORM = re.compile(r"^model\.language_model\.layers\.(\d+)\.input_layernorm\.weight$")
_VISION_NORM = re.compile(r"^model\.visual\.blocks\.(\d+)\.norm1\.weight$")
_VISION_END = "model.visual.merger.norm.weight"
_CACHE = re.compile(r"^(past|present)_([kv])_(\d+)$")


def cut_layers(source: Path, target: Path, layers: int) -> None:
    """Write ``target`` and ``target`` + ".data": ``source`` with at most ``layers`` layers.

    Of a decoder the first ``layers`` - 1 and the last are kept, with caches named as if they were
    all (``past_k_0`` .. ); deepstack inputs that no kept layer reads are dropped. Of a vision tower
    the first ``layers`` blocks, and every merger, are kept: inputs and outputs stay the same.
    Errors: ArtifactError for a file that is no such graph, ExportError without the onnx package,
    UsageError for less than one layer.
    """
    if layers < 1:
        raise UsageError(f"a graph cannot be cut to {layers} layers: keep at least 1")
    model = _load(source)
    starts = _layer_inputs(model.graph, _DECODER_NORM)
    if starts:
        _cut_decoder(model.graph, starts, layers)
    else:
        starts = _layer_inputs(model.graph, _VISION_NORM)
        if not starts:
            raise ArtifactError(f"{source} is neither our decoder nor our vision tower")
        _cut_vision(model.graph, starts, layers)
    _prune(model.graph)
    _copy_weights(model.graph, source, target)
    target.write_bytes(model.SerializeToString(deterministic=True))


def _load(source: Path) -> "onnx.ModelProto":
    try:
        import onnx
    except ImportError as error:
        raise ExportError(
            f"cutting a graph needs the onnx package ({error}): pip install 'medmo-edge[export]'"
        ) from error
    try:
        return onnx.load(str(source), load_external_data=False)
    except OSError as error:
        raise ArtifactError(f"{source} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's own error types
        raise ArtifactError(f"{source} is no ONNX graph: export again") from error


def _layer_inputs(graph: "onnx.GraphProto", norm: re.Pattern[str]) -> list[str]:
    """The value that enters each layer, in order."""
    found = {}
    for node in graph.node:
        for name in node.input:
            if match := norm.match(name):
                found[int(match[1])] = node.input[0]
    return [found[layer] for layer in sorted(found)]


def _cut_decoder(graph: "onnx.GraphProto", starts: list[str], layers: int) -> None:
    last = len(starts) - 1
    kept = min(layers, len(starts)) - 1  # the new number of the last layer
    _replace_inputs(graph, {starts[last]: starts[kept]})
    names = {}
    for value in (*graph.input, *graph.output):
        match = _CACHE.match(value.name)
        if match and int(match[3]) == last:
            names[value.name] = f"{match[1]}_{match[2]}_{kept}"
        elif match and int(match[3]) >= kept:
            names[value.name] = ""
    _rename(graph, names)


def _cut_vision(graph: "onnx.GraphProto", starts: list[str], layers: int) -> None:
    end = next(node.input[0] for node in graph.node if _VISION_END in node.input)
    states = [*starts, end]
    if layers < len(starts):
        _replace_inputs(graph, dict.fromkeys(states[layers + 1 :], states[layers]))


def _replace_inputs(graph: "onnx.GraphProto", names: dict[str, str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)


def _rename(graph: "onnx.GraphProto", names: dict[str, str]) -> None:
    """New names of inputs and outputs, their readers and makers included; "" drops one.

    Layers between keep nothing: their nodes go when nobody reads them.
    """
    renamed = {old: new for old, new in names.items() if new}
    dropped = set(names) - set(renamed)
    for node in list(graph.node):
        if dropped.intersection((*node.input, *node.output)):
            graph.node.remove(node)
    for values in (graph.input, graph.output):
        _keep(values, [value for value in values if value.name not in dropped])
        for value in values:
            value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        for names_of in (node.input, node.output):
            for index, name in enumerate(names_of):
                names_of[index] = renamed.get(name, name)


def _prune(graph: "onnx.GraphProto") -> None:
    """Drop nodes, initializers and inputs that no output needs."""
    wanted = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    _keep(graph.node, reversed(nodes))
    _keep(graph.initializer, [each for each in graph.initializer if each.name in wanted])
    _keep(graph.input, [each for each in graph.input if each.name in wanted])


def _keep(field: Any, values: Iterable[Any]) -> None:
    """Replace what a repeated field of a message holds."""
    copies = list(values)
    del field[:]
    field.extend(copies)


def _copy_weights(graph: "onnx.GraphProto", source: Path, target: Path) -> None:
    """The data of what is left, at new places of a new file."""
    offset = 0
    with target.with_name(f"{target.name}.data").open("wb") as written:
        for tensor in graph.initializer:
            where = {entry.key: entry for entry in tensor.external_data}
            if not where:
                continue
            data = source.parent / where["location"].value
            start, size = int(where["offset"].value), int(where["length"].value)
            written.seek(offset)
            _copy(data, start, size, written)
            where["location"].value = f"{target.name}.data"
            where["offset"].value = str(offset)
            offset += size + -size % _ALIGNMENT
        written.truncate(offset)


def _copy(data: Path, start: int, size: int, written: IO[bytes]) -> None:
    for block in _blocks(data, start, size):
        written.write(block)


def _blocks(data: Path, start: int, size: int) -> Iterator[bytes]:
    try:
        with data.open("rb") as file:
            file.seek(start)
            while size:
                block = file.read(min(size, _COPY_BYTES))
                if not block:
                    raise ArtifactError(f"{data} is too short for its graph: copy it again")
                size -= len(block)
                yield block
    except OSError as error:
        raise ArtifactError(f"{data} cannot be read: {error.strerror}") from error
