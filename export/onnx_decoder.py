"""The language model as one ONNX graph for prefill and decode, in two attention forms.

``gqa`` is for ONNX Runtime (opset 21 and com.microsoft), ``scatter`` is plain ONNX (opset 24) for
TensorRT and as its parity copy. Embedding lookup, image splicing and rotary angles are the host's
work (``medmo_edge.vision_inputs``); nothing here samples or runs a graph.

Inputs of ``gqa``, in this order. B batch, S tokens of this call, P tokens already cached, C cache
capacity (any, fixed by the buffers), D hidden_size, K key/value heads, d head_dim, T graph dtype:

    inputs_embeds                T      [B, S, D]     image features already spliced in
    rope_cos, rope_sin           T      [B, S, d/2]   vision_inputs.rope_cos_sin
    seqlens_k                    int32  [B]           P + S - 1 of each sequence
    total_sequence_length        int32  []            largest P + S of the batch
    last_index                   int64  [B, 1]        row of this call whose logits are wanted
    deepstack_0 ..               T      [B, S, D]     one per deepstack level, zero off the images
    past_key_values.i.key/.value T      [B, K, C, d]  i = 0 .. layers - 1, key then value

Outputs: logits float32 [B, 1, V]; present.i.key/.value like past_key_values.i.*, which may be the
same buffers. ONNX Runtime on CPU refuses B > 1 when S > 1 and P > 0.

Inputs of ``scatter``: inputs_embeds, rope_cos, rope_sin, write_indices int64 [B] (cache slot of the
first token), last_index, deepstack_0 .., past_k_0, past_v_0, past_k_1 ..; outputs: logits,
present_k_0, present_v_0, ... C is static.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.export.onnx_graph import CONTRIB, Graph
from medmo_edge.export.onnx_linear import (
    ELEMENT,
    FLOAT,
    Encoding,
    Folding,
    GraphDtype,
    Weights,
)
from medmo_edge.model_config import TextConfig

Form = Literal["gqa", "scatter"]
OPSETS: dict[Form, int] = {"gqa": 21, "scatter": 24}
_TEXT = "model.language_model."


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderPlan:
    """What to build. ``capacity`` is the static C of ``scatter``; ``gqa`` ignores it.

    ``matrix`` stores the seven matrices of a layer, ``head`` the output matrix. ``all_logits``
    drops last_index and returns logits [B, S, V]: for parity tests.
    """

    form: Form = "gqa"
    dtype: GraphDtype = "float32"
    matrix: Encoding = FLOAT
    head: Encoding = FLOAT
    capacity: int = 4096
    all_logits: bool = False
    folding: Folding = field(default_factory=Folding)
    activation_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """What every layer needs; ``shared`` are values computed once per call of the graph."""

    graph: Graph
    weights: Weights
    text: TextConfig
    plan: DecoderPlan
    levels: int
    shared: tuple[str, ...]


def build_decoder(checkpoint: Checkpoint, plan: DecoderPlan) -> Weights:
    """The graph and its promised weights. Errors: CalibrationError for a missing fp8 scale."""
    weights = Weights(
        graph=Graph(name="decoder", opset=OPSETS[plan.form]),
        checkpoint=checkpoint,
        dtype=plan.dtype,
        folding=plan.folding,
        activation_scales=plan.activation_scales,
    )
    text, levels = checkpoint.config.text, len(checkpoint.config.vision.deepstack_indexes)
    _add_inputs(weights.graph, text, plan, levels)
    build = _Build(
        graph=weights.graph,
        weights=weights,
        text=text,
        plan=plan,
        levels=levels,
        shared=_gqa_shared(weights.graph, text) if _is_gqa(plan) else _mask(weights.graph, plan),
    )
    x, pending = "inputs_embeds", ""
    for layer in range(text.num_layers):
        x, pending = _layer(build, layer, x, pending)
    _tail(build, x, pending)
    for names in _cache_names(text, plan):
        weights.graph.add_output(names[1], ELEMENT[plan.dtype], _cache_shape(text, plan))
    return weights


def _is_gqa(plan: DecoderPlan) -> bool:
    return plan.form == "gqa"


def _cache_names(text: TextConfig, plan: DecoderPlan) -> list[tuple[str, str]]:
    """(past, present) of every layer, key then value."""
    if _is_gqa(plan):
        parts = [f"{layer}.{part}" for layer in range(text.num_layers) for part in ("key", "value")]
        return [(f"past_key_values.{part}", f"present.{part}") for part in parts]
    parts = [f"{part}_{layer}" for layer in range(text.num_layers) for part in ("k", "v")]
    return [(f"past_{part}", f"present_{part}") for part in parts]


def _cache_shape(text: TextConfig, plan: DecoderPlan) -> list[int | str]:
    return ["B", text.num_kv_heads, "C" if _is_gqa(plan) else plan.capacity, text.head_dim]


def _add_inputs(graph: Graph, text: TextConfig, plan: DecoderPlan, levels: int) -> None:
    element = ELEMENT[plan.dtype]
    graph.add_input("inputs_embeds", element, ["B", "S", text.hidden_size])
    for name in ("rope_cos", "rope_sin"):
        graph.add_input(name, element, ["B", "S", text.head_dim // 2])
    if _is_gqa(plan):
        graph.add_input("seqlens_k", "INT32", ["B"])
        graph.add_input("total_sequence_length", "INT32", [])
    else:
        graph.add_input("write_indices", "INT64", ["B"])
    if not plan.all_logits:
        graph.add_input("last_index", "INT64", ["B", 1])
    for level in range(levels):
        graph.add_input(f"deepstack_{level}", element, ["B", "S", text.hidden_size])
    for past, _ in _cache_names(text, plan):
        graph.add_input(past, element, _cache_shape(text, plan))


def _gqa_shared(graph: Graph, text: TextConfig) -> tuple[str, ...]:
    """Row of each token in flat cos and sin tables: the contrib operator looks angles up."""
    shape = graph.add("Shape", "rope_cos", end=2)
    count = graph.add("ReduceProd", shape, keepdims=0)
    rows = graph.add("Range", graph.constant(0), count, graph.constant(1))
    size = graph.constant([-1, text.head_dim // 2])
    tables = [graph.add("Reshape", name, size) for name in ("rope_cos", "rope_sin")]
    return graph.add("Reshape", rows, shape), *tables


def _mask(graph: Graph, plan: DecoderPlan) -> tuple[str, ...]:
    """bool [B, 1, S, C]: slot c is seen by token s when c <= write_index + s."""
    steps = graph.add("Squeeze", graph.add("Shape", "inputs_embeds", start=1, end=2))
    offsets = graph.add("Range", graph.constant(0), steps, graph.constant(1))
    start = graph.add("Unsqueeze", "write_indices", graph.constant([1]))
    row = graph.add("Add", start, graph.add("Unsqueeze", offsets, graph.constant([0])))
    slots = graph.constant(np.arange(plan.capacity).reshape(1, 1, 1, -1))
    return (graph.add("LessOrEqual", slots, graph.add("Unsqueeze", row, graph.constant([1, 3]))),)


def _layer(build: _Build, layer: int, x: str, pending: str) -> tuple[str, str]:
    """One layer; a hidden state is x + ``pending``, not added yet ("" for nothing)."""
    graph = build.graph
    prefix = f"{_TEXT}layers.{layer}."
    normed, x = _add_norm(build, x, pending, f"{prefix}input_layernorm.weight")
    attend = _gqa if _is_gqa(build.plan) else _scatter
    attended = attend(build, layer, normed)
    extra = f"deepstack_{layer}" if layer < build.levels else ""
    if layer == build.text.num_layers - 1:
        # Nobody attends to this layer's output: what follows is needed for one row only.
        x, attended, extra = (_wanted_row(build, name) for name in (x, attended, extra))
    output = _linear(build, attended, f"{prefix}self_attn.o_proj.weight")
    normed, x = _add_norm(build, x, output, f"{prefix}post_attention_layernorm.weight")
    names = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
    gate, up = build.weights.linears(normed, names, build.plan.matrix)
    active = graph.add("Mul", gate, graph.add("Sigmoid", gate))
    down = _linear(build, graph.add("Mul", active, up), f"{prefix}mlp.down_proj.weight")
    return (graph.add("Add", x, down), extra) if extra else (x, down)


def _linear(build: _Build, x: str, name: str) -> str:
    return build.weights.linear(x, name, build.plan.matrix)


def _add_norm(build: _Build, x: str, pending: str, name: str) -> tuple[str, str]:
    """(RMS norm of x + pending, x + pending)."""
    if pending and _is_gqa(build.plan):
        number = len(build.graph.nodes)
        outputs = [f"norm_{number}", "", "", f"sum_{number}"]
        normed, _, _, total = build.graph.add_many(
            "SkipSimplifiedLayerNormalization",
            *(x, pending, build.weights.vector(name)),
            outputs=outputs,
            domain=CONTRIB,
            epsilon=build.text.rms_norm_eps,
        )
        return normed, total
    total = build.graph.add("Add", x, pending) if pending else x
    return _rms_norm(build, total, name), total


def _rms_norm(build: _Build, x: str, name: str) -> str:
    op = "SimplifiedLayerNormalization" if _is_gqa(build.plan) else "RMSNormalization"
    epsilon = build.text.rms_norm_eps
    weight = build.weights.vector(name)
    return build.graph.add(op, x, weight, axis=-1, epsilon=epsilon, stash_type=1)


def _wanted_row(build: _Build, name: str) -> str:
    """[B, S, n] -> [B, 1, n] by last_index."""
    if build.plan.all_logits or not name:
        return name
    row = build.graph.add("GatherND", name, "last_index", batch_dims=1)
    return build.graph.add("Unsqueeze", row, build.graph.constant([1]))


def _project(build: _Build, layer: int, x: str) -> list[str]:
    """Queries, keys and values of all heads, [B, S, heads * d] each."""
    prefix = f"{_TEXT}layers.{layer}.self_attn."
    names = [f"{prefix}{part}_proj.weight" for part in "qkv"]
    return build.weights.linears(x, names, build.plan.matrix)


def _heads(build: _Build, layer: int, flat: str, part: str, heads: int) -> str:
    """A projection as [B, S, heads, d], normalised per head for q and k."""
    split = build.graph.constant([0, 0, heads, build.text.head_dim])
    shaped = build.graph.add("Reshape", flat, split)
    if part == "v":
        return shaped
    return _rms_norm(build, shaped, f"{_TEXT}layers.{layer}.self_attn.{part}_norm.weight")


def _gqa(build: _Build, layer: int, x: str) -> str:
    graph, text = build.graph, build.text
    query, key, value = _project(build, layer, x)
    turned = []
    for part, flat, heads in (("q", query, text.num_heads), ("k", key, text.num_kv_heads)):
        split = _heads(build, layer, flat, part, heads)
        joined = graph.add("Reshape", split, graph.constant([0, 0, heads * text.head_dim]))
        turned.append(_rotated(build, joined, heads))
    (past_key, present_key), (past_value, present_value) = _cache_names(text, build.plan)[
        2 * layer : 2 * layer + 2
    ]
    return graph.add_many(
        "GroupQueryAttention",
        *(*turned, value, past_key, past_value, "seqlens_k", "total_sequence_length"),
        outputs=[f"attention_{layer}", present_key, present_value],
        domain=CONTRIB,
        num_heads=text.num_heads,
        kv_num_heads=text.num_kv_heads,
        scale=text.head_dim**-0.5,
        do_rotary=0,
    )[0]


def _rotated(build: _Build, flat: str, heads: int) -> str:
    """Queries or keys [B, S, heads * d] turned by the angles of their rows."""
    rows, cos, sin = build.shared
    return build.graph.add(
        "RotaryEmbedding",
        *(flat, rows, cos, sin),
        domain=CONTRIB,
        num_heads=heads,
        rotary_embedding_dim=build.text.head_dim,
        interleaved=0,
    )


def _scatter(build: _Build, layer: int, x: str) -> str:
    graph, text = build.graph, build.text
    sizes = {"q": text.num_heads, "k": text.num_kv_heads, "v": text.num_kv_heads}
    by_head = {
        part: graph.add("Transpose", _heads(build, layer, flat, part, heads), perm=[0, 2, 1, 3])
        for flat, (part, heads) in zip(_project(build, layer, x), sizes.items(), strict=True)
    }
    query, key = (
        graph.add("RotaryEmbedding", by_head[part], "rope_cos", "rope_sin") for part in "qk"
    )
    presents = []
    names = _cache_names(text, build.plan)[2 * layer : 2 * layer + 2]
    for (past, present), new in zip(names, (key, by_head["v"]), strict=True):
        inputs = (past, new, "write_indices")
        presents += graph.add_many(
            "TensorScatter", *inputs, outputs=[present], axis=2, mode="linear"
        )
    scale = text.head_dim**-0.5
    attended = graph.add("Attention", query, *presents, build.shared[0], scale=scale)
    joined = graph.constant([0, 0, text.num_heads * text.head_dim])
    return graph.add("Reshape", graph.add("Transpose", attended, perm=[0, 2, 1, 3]), joined)


def _tail(build: _Build, x: str, pending: str) -> None:
    graph, text = build.graph, build.text
    normed, _ = _add_norm(build, x, pending, f"{_TEXT}norm.weight")
    head = f"{_TEXT}embed_tokens.weight" if text.tie_word_embeddings else "lm_head.weight"
    logits = build.weights.linear(normed, head, build.plan.head)
    graph.add_many("Cast", logits, outputs=["logits"], to=1)
    rows: int | str = "S" if build.plan.all_logits else 1
    graph.add_output("logits", "FLOAT", ["B", rows, text.vocab_size])
