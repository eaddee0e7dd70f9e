"""Graphs for TensorRT against the float32 graph: the same nodes, other number types."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.export.onnx_decoder import DecoderPlan, build_decoder
from medmo_edge.export.onnx_graph import Graph
from medmo_edge.export.onnx_linear import Encoding, GraphDtype
from medmo_edge.export.onnx_vision import VisionPlan, build_vision


def plain_nodes(graph: Graph) -> list[tuple[Any, ...]]:
    """Operators with attributes and where their inputs come from, without changes of number type.

    Values are numbered by their making; weights keep their names without suffixes.
    """
    known: dict[str, Any] = {}
    found: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        inputs = [known.get(name, _stem(graph, name)) for name in node.input]
        if node.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
            known[node.output[0]] = inputs[0]
            continue
        if node.op_type == "Transpose" and inputs[0].startswith("model."):
            known[node.output[0]] = inputs[0]  # nvfp4 keeps its rows
            continue
        attributes = sorted(each.SerializeToString() for each in node.attribute)
        found.append((node.op_type, tuple(inputs), tuple(attributes)))
        known |= {name: f"{len(found)}.{index}" for index, name in enumerate(node.output)}
    return found


def _stem(graph: Graph, name: str) -> str:
    constants = {each.name: each.raw_data.hex() for each in graph.constants.values()}
    return constants.get(name, name.removesuffix(".codes"))


ENCODINGS = {
    "fp8": Encoding(kind="fp8"),
    "int4": Encoding(kind="int4", block=128),
    "nvfp4": Encoding(kind="nvfp4", block=16),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["float", *ENCODINGS])
def test_graphs_differ_in_number_types_alone(
    kind: str, dtype: GraphDtype, tiny_untied_checkpoint: Path
) -> None:
    """Node by node the float32 graph, which the parity tests compare with transformers."""
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    scales = dict.fromkeys((name.removesuffix(".weight") for name in checkpoint.tensors), 0.01)
    plan = DecoderPlan(form="scatter", dtype=dtype, activation_scales=scales)
    plan = replace(plan, matrix=ENCODINGS.get(kind, plan.matrix))
    narrow, wide = (
        build_decoder(checkpoint, each).graph for each in (plan, DecoderPlan(form="scatter"))
    )
    assert plain_nodes(narrow) == plain_nodes(wide) and len(wide.nodes) > 100
    assert names(narrow.inputs) == names(wide.inputs)
    assert names(narrow.outputs) == names(wide.outputs)
    if kind == "float":
        narrow, wide = (
            build_vision(checkpoint, VisionPlan(form="scatter", dtype=each)).graph
            for each in (dtype, "float32")
        )
        assert plain_nodes(narrow) == plain_nodes(wide) and len(wide.nodes) > 100


def names(values: Sequence[Any]) -> list[str]:
    return [value.name for value in values]
