"""The vision tower of one image as an ONNX graph: pixels in, features for the language model out.

One image (or several of one grid) per call, so nothing is masked. Position tables and rotary angles
come from ``medmo_edge.vision_inputs``. ``gqa`` uses ONNX Runtime's fused operators, ``scatter`` is
plain ONNX (opset 24). Nothing here runs a graph.

Inputs, in this order; n patches in merge order, M = n / merge_size^2 vision tokens, T graph dtype:

    pixel_values    T        [B, n, P]    preprocess.patchify
    pos_idx         int64    [4, n]       vision_inputs.VisionInputs
    pos_weight      float32  [4, n]
    cos, sin        float32  [n, head_dim]

Outputs: image_features T [B, M, D]; deepstack_features T [levels, B, M, D].
"""

from dataclasses import dataclass

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.export.onnx_decoder import OPSETS, Form
from medmo_edge.export.onnx_graph import CONTRIB, Graph
from medmo_edge.export.onnx_linear import ELEMENT, FLOAT, NUMBER, Encoding, GraphDtype, Weights
from medmo_edge.model_config import VisionConfig

_VISION = "model.visual."
_EPSILON = 1e-6  # fixed in the architecture, not in config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionPlan:
    """What to build: ``normed`` stores matrices whose input is normalised, ``free`` all others.

    Rows of a free input differ by orders of magnitude (a few patches of a trained tower carry huge
    values), so whatever rounds activations must do it row by row there.
    """

    form: Form = "gqa"
    dtype: GraphDtype = "float32"
    normed: Encoding = FLOAT
    free: Encoding = FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """What every block needs; ``cos`` and ``sin`` are in the form's own shape."""

    graph: Graph
    weights: Weights
    vision: VisionConfig
    plan: VisionPlan
    cos: str
    sin: str

    @property
    def head_dim(self) -> int:
        return self.vision.hidden_size // self.vision.num_heads


def build_vision(checkpoint: Checkpoint, plan: VisionPlan) -> Weights:
    """The graph and its promised weights."""
    graph = Graph(name="vision", opset=OPSETS[plan.form])
    weights = Weights(graph=graph, checkpoint=checkpoint, dtype=plan.dtype)
    vision = checkpoint.config.vision
    _add_inputs(graph, vision, plan)
    cos, sin = _rotary_tables(graph, vision, plan)
    build = _Build(graph=graph, weights=weights, vision=vision, plan=plan, cos=cos, sin=sin)
    x, pending = _embed(build), ""
    levels: list[str] = []
    for index in range(vision.depth):
        x, pending = _block(build, index, x, pending)
        if index in vision.deepstack_indexes:
            x, pending = _settle(build, x, pending), ""
            level = len(levels)
            levels.append(_merge(build, x, f"deepstack_merger_list.{level}", norm_first=False))
    merged = _merge(build, _settle(build, x, pending), "merger", norm_first=True)
    _add_outputs(build, merged, levels)
    return weights


def _add_inputs(graph: Graph, vision: VisionConfig, plan: VisionPlan) -> None:
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    graph.add_input("pixel_values", ELEMENT[plan.dtype], ["B", "n", values])
    graph.add_input("pos_idx", "INT64", [4, "n"])
    graph.add_input("pos_weight", "FLOAT", [4, "n"])
    for name in ("cos", "sin"):
        graph.add_input(name, "FLOAT", ["n", vision.hidden_size // vision.num_heads])


def _add_outputs(build: _Build, merged: str, levels: list[str]) -> None:
    graph, out = build.graph, build.vision.out_hidden_size
    element = ELEMENT[build.plan.dtype]
    graph.add_many("Identity", merged, outputs=["image_features"])
    graph.add_output("image_features", element, ["B", "M", out])
    if levels:
        stacked = [graph.add("Unsqueeze", level, graph.constant([0])) for level in levels]
        graph.add_many("Concat", *stacked, outputs=["deepstack_features"], axis=0)
        graph.add_output("deepstack_features", element, [len(levels), "B", "M", out])


def _rotary_tables(graph: Graph, vision: VisionConfig, plan: VisionPlan) -> tuple[str, str]:
    """The contrib operator wants one half [n, d/2]; the plain one [B, n, d/2]."""
    half = graph.constant([vision.hidden_size // vision.num_heads // 2])
    start, axis = graph.constant([0]), graph.constant([1])
    tables = [graph.add("Slice", name, start, half, axis) for name in ("cos", "sin")]
    if plan.form == "scatter":
        batch = graph.add("Shape", "pixel_values", end=1)
        shape = graph.add("Concat", batch, graph.constant([1, 1]), axis=0)
        tables = [graph.add("Expand", table, shape) for table in tables]
    return tables[0], tables[1]


def _embed(build: _Build) -> str:
    """Patch embedding plus the interpolated position embedding."""
    graph, prefix = build.graph, _VISION
    patches = _linear(build, "pixel_values", f"{prefix}patch_embed.proj", FLOAT)
    corners = graph.add("Gather", build.weights.vector(f"{prefix}pos_embed.weight"), "pos_idx")
    weight = _to_graph_dtype(build, "pos_weight")
    weighted = graph.add("Mul", corners, graph.add("Unsqueeze", weight, graph.constant([-1])))
    position = graph.add("ReduceSum", weighted, graph.constant([0]), keepdims=0)
    return graph.add("Add", patches, position)


def _to_graph_dtype(build: _Build, x: str) -> str:
    if build.plan.dtype == "float32":
        return x
    return build.graph.add("Cast", x, to=NUMBER[build.plan.dtype])


def _block(build: _Build, index: int, x: str, pending: str) -> tuple[str, str]:
    """One block; a hidden state is x + ``pending``, not added yet ("" for nothing)."""
    prefix = f"{_VISION}blocks.{index}."
    normed, x = _add_norm(build, x, pending, f"{prefix}norm1")
    output = _attention(build, normed, f"{prefix}attn.")
    normed, x = _add_norm(build, x, output, f"{prefix}norm2")
    inner = _linear(build, normed, f"{prefix}mlp.linear_fc1", build.plan.normed)
    active = build.graph.add("Gelu", inner, approximate="tanh")
    return x, _linear(build, active, f"{prefix}mlp.linear_fc2", build.plan.free)


def _linear(build: _Build, x: str, name: str, encoding: Encoding) -> str:
    return build.weights.linear(x, f"{name}.weight", encoding, f"{name}.bias")


def _add_norm(build: _Build, x: str, pending: str, name: str) -> tuple[str, str]:
    """(layer norm of x + pending, x + pending).

    Two nodes on purpose: ONNX Runtime's fused SkipLayerNormalization is three times slower on CPU.
    """
    total = _settle(build, x, pending)
    return _layer_norm(build, total, name), total


def _settle(build: _Build, x: str, pending: str) -> str:
    return build.graph.add("Add", x, pending) if pending else x


def _layer_norm(build: _Build, x: str, name: str) -> str:
    vectors = [build.weights.vector(f"{name}.{part}") for part in ("weight", "bias")]
    return build.graph.add("LayerNormalization", x, *vectors, axis=-1, epsilon=_EPSILON)


def _attention(build: _Build, x: str, prefix: str) -> str:
    """All patches of one image see each other; rotary angles in float32."""
    graph = build.graph
    joined = _linear(build, x, f"{prefix}qkv", build.plan.normed)
    parts = graph.add_many("Split", joined, outputs=3, axis=-1, num_outputs=3)
    attend = _fused_attention if build.plan.form == "gqa" else _plain_attention
    attended = attend(build, parts)
    return _linear(build, attended, f"{prefix}proj", build.plan.free)


def _fused_attention(build: _Build, parts: list[str]) -> str:
    graph, heads = build.graph, build.vision.num_heads
    first = graph.constant([0])  # rows of the rotary tables start here
    rotated = []
    for part in parts[:2]:
        turned = graph.add(
            "RotaryEmbedding",
            *(_to_float(build, part), first, build.cos, build.sin),
            domain=CONTRIB,
            num_heads=heads,
            rotary_embedding_dim=build.head_dim,
            interleaved=0,
        )
        rotated.append(_to_graph_dtype(build, turned))
    scale = build.head_dim**-0.5
    inputs = (*rotated, parts[2])
    return graph.add("MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=heads, scale=scale)


def _plain_attention(build: _Build, parts: list[str]) -> str:
    graph, heads = build.graph, build.vision.num_heads
    split = graph.constant([0, 0, heads, build.head_dim])
    query, key, value = (
        graph.add("Transpose", graph.add("Reshape", part, split), perm=[0, 2, 1, 3])
        for part in parts
    )
    query, key = (
        _to_graph_dtype(
            build,
            graph.add("RotaryEmbedding", _to_float(build, x), build.cos, build.sin),
        )
        for x in (query, key)
    )
    attended = graph.add("Attention", query, key, value, scale=build.head_dim**-0.5)
    joined = graph.constant([0, 0, build.vision.hidden_size])
    return graph.add("Reshape", graph.add("Transpose", attended, perm=[0, 2, 1, 3]), joined)


def _to_float(build: _Build, x: str) -> str:
    return x if build.plan.dtype == "float32" else build.graph.add("Cast", x, to=NUMBER["float32"])


def _merge(build: _Build, x: str, name: str, *, norm_first: bool) -> str:
    """The patches of a token side by side; deepstack mergers normalise after joining them."""
    graph, prefix = build.graph, f"{_VISION}{name}."
    width = build.vision.hidden_size * build.vision.merge_size**2
    normed = _layer_norm(build, x, f"{prefix}norm") if norm_first else x
    joined = graph.add("Reshape", normed, graph.constant([0, -1, width]))
    if not norm_first:
        joined = _layer_norm(build, joined, f"{prefix}norm")
    inner = _linear(build, joined, f"{prefix}linear_fc1", build.plan.normed)
    return _linear(build, graph.add("Gelu", inner), f"{prefix}linear_fc2", build.plan.free)
