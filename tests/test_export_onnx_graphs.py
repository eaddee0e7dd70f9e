"""What the graphs are made of, fp8 against fake quantisation, and files on disk."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_host import CAPACITY, Floats, Host, Reference, make_prompt, open_session, save

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.export.onnx_decoder import DecoderPlan, Form, build_decoder
from medmo_edge.export.onnx_files import GraphOptions, find_recipe, plan_onnx
from medmo_edge.export.onnx_graph import ALIGNMENT, Graph, Weight, save_graph
from medmo_edge.export.onnx_linear import Encoding
from medmo_edge.export.onnx_vision import VisionPlan, build_vision
from medmo_edge.model_config import expected_tensors

LAYERS = 4  # of both tiny checkpoints, language and vision
FP8 = Encoding(kind="fp8")


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph.nodes)


def test_the_gqa_form_is_fused_operators(tiny_untied_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    census = ops(build_decoder(checkpoint, DecoderPlan()).graph)
    assert census["GroupQueryAttention"] == LAYERS
    assert census["RotaryEmbedding"] == 2 * LAYERS
    assert census["MatMul"] == 7 * LAYERS + 1
    # The first norm of layer 0 and the two head norms of every layer have nothing to add.
    assert census["SimplifiedLayerNormalization"] == 1 + 2 * LAYERS
    assert census["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    vision = ops(build_vision(checkpoint, VisionPlan()).graph)
    assert vision["MultiHeadAttention"] == LAYERS and vision["RotaryEmbedding"] == 2 * LAYERS
    assert vision["LayerNormalization"] == 2 * LAYERS + 4 and vision["Gelu"] == LAYERS + 4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_scatter_form_is_plain_onnx(
    tiny_untied_checkpoint: Path, tmp_path: Path, dtype: Any
) -> None:
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    decoder = build_decoder(checkpoint, DecoderPlan(form="scatter", dtype=dtype))
    census = ops(decoder.graph)
    assert census["TensorScatter"] == 2 * LAYERS and census["Attention"] == LAYERS
    assert census["RotaryEmbedding"] == 2 * LAYERS and census["RMSNormalization"] == 4 * LAYERS + 1
    vision = build_vision(checkpoint, VisionPlan(form="scatter", dtype=dtype))
    for weights in (decoder, vision):
        assert {node.domain for node in weights.graph.nodes} == {""}
        onnx.checker.check_model(str(save(weights, tmp_path / "g.onnx")), full_check=True)


def test_the_inputs_come_in_the_documented_order(tiny_untied_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    deepstack = [f"deepstack_{level}" for level in range(3)]
    first = ["inputs_embeds", "rope_cos", "rope_sin"]
    graph = build_decoder(checkpoint, DecoderPlan()).graph
    assert [each.name for each in graph.inputs] == [
        *(*first, "seqlens_k", "total_sequence_length", "last_index", *deepstack),
        *(f"past_key_values.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")),
    ]
    presents = [f"present.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    assert [each.name for each in graph.outputs] == ["logits", *presents]
    graph = build_decoder(checkpoint, DecoderPlan(form="scatter")).graph
    caches = [f"{part}_{i}" for i in range(LAYERS) for part in "kv"]
    assert [each.name for each in graph.inputs] == [
        *(*first, "write_indices", "last_index", *deepstack),
        *(f"past_{name}" for name in caches),
    ]
    assert [each.name for each in graph.outputs] == [
        "logits",
        *(f"present_{name}" for name in caches),
    ]


@pytest.mark.parametrize("form", ["gqa", "scatter"])
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_every_tensor_is_stored_once(
    tiny_untied_checkpoint: Path, form: Form, weights: str
) -> None:
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    plan = plan_onnx(checkpoint, find_recipe(weights), GraphOptions(form=form))
    stored = [*plan.decoder.stored, *plan.vision.stored]
    embeddings = "model.language_model.embed_tokens.weight"
    assert sorted([*stored, embeddings]) == sorted(expected_tensors(checkpoint.config))
    fallbacks = {**plan.decoder.fallbacks, **plan.vision.fallbacks}
    assert fallbacks == {}


def test_fp8_scatter_is_fake_quantisation(tiny_untied_checkpoint: Path, tmp_path: Path) -> None:
    """Per-tensor activations and per-channel weights, every node as written."""
    reference = Reference(tiny_untied_checkpoint)
    prompt = make_prompt(reference.checkpoint, (3, (64, 96), 4))
    scales = calibrate(reference, prompt)
    plan = DecoderPlan(
        form="scatter",
        matrix=FP8,
        capacity=CAPACITY,
        all_logits=True,
        activation_scales=scales,
    )
    host = Host(reference.checkpoint, tmp_path, plan, optimise=False)
    assert ops(build_decoder(reference.checkpoint, plan).graph)["QuantizeLinear"] == 4 * LAYERS
    plain = reference.logits(prompt)
    fake_quantise(reference, scales)
    expected = reference.logits(prompt)
    _, logits = host.prefill(prompt)
    # A value on the edge between two codes may fall to either side; most logits are equal.
    difference = np.abs(logits[0] - expected)
    assert np.abs(expected - plain).max() > 0.05 > 10 * np.median(difference)
    assert np.median(difference) < 1e-4 and difference.max() < np.abs(expected - plain).max()


def text_linears(reference: Reference) -> dict[str, Any]:
    found = reference.model.model.language_model.named_modules()
    layers = {f"model.language_model.{name}": each for name, each in found}
    return {name: each for name, each in layers.items() if hasattr(each, "in_features")}


def calibrate(reference: Reference, prompt: Any) -> dict[str, float]:
    """amax / 448 of every input, one for q, k, v and one for gate and up."""
    amax: dict[str, float] = {}

    def observe(name: str) -> Any:
        return lambda module, args: amax.update({name: float(args[0].abs().max())})

    hooks = [
        each.register_forward_pre_hook(observe(name))
        for name, each in text_linears(reference).items()
    ]
    reference.logits(prompt)
    for hook in hooks:
        hook.remove()
    return {name: value / 448 for name, value in amax.items()}


def fake_quantise(reference: Reference, scales: dict[str, float]) -> None:
    torch = reference.torch

    def fp8(values: Any, step: Any) -> Any:
        clipped = torch.clamp(values / step, -448, 448)
        return clipped.to(torch.float8_e4m3fn).float() * step

    def rounding(step: Any) -> Any:
        return lambda module, args: (fp8(args[0], step),)

    for name, each in text_linears(reference).items():
        weight = each.weight.data
        each.weight.data = fp8(weight, weight.abs().amax(dim=1, keepdim=True) / 448)
        each.register_forward_pre_hook(rounding(torch.tensor(scales[name])))


def test_weights_lie_on_pages_and_the_same_export_is_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plan = DecoderPlan(matrix=Encoding(kind="nbits", bits=4, block=32))
        path = save(build_decoder(checkpoint, plan), tmp_path / name / "decoder.onnx")
        data = path.with_name("decoder.onnx.data")
        contents.append((path.read_bytes(), data.read_bytes()))
    assert contents[0] == contents[1]
    model = onnx.load(str(path), load_external_data=False)
    places = []
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == "decoder.onnx.data"
            places.append((int(entries["offset"]), int(entries["length"])))
    assert len(places) > 30 and all(offset % ALIGNMENT == 0 for offset, _ in places)
    ends = [offset + length for offset, length in sorted(places)]
    starts = [offset for offset, _ in sorted(places)]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert data.stat().st_size == len(contents[0][1]) >= ends[-1]


def test_half_a_weight_is_noticed(tmp_path: Path) -> None:
    graph = Graph(name="g", opset=21)
    weight = Weight(name="w", dtype="FLOAT", shape=(2, 2))
    graph.add_weight(weight, lambda region: region.append(np.zeros(3, np.float32)))
    with pytest.raises(RuntimeError, match="12 of 16 bytes"):
        save_graph(graph, tmp_path / "g.onnx", lambda size: None)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_narrow_recipes_stay_near_the_checkpoint(
    weights: str, tiny_untied_checkpoint: Path, tmp_path: Path
) -> None:
    """Random weights: only that nothing is grossly wrong. Encodings are tested one by one."""
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    exact, narrow = (
        logits_of(checkpoint, find_recipe(each), tmp_path) for each in ("fp32", weights)
    )
    error = float(np.sqrt(np.mean((narrow - exact) ** 2) / np.mean(exact**2)))
    assert 0 < error < {"fp16": 5e-3, "int8": 0.06, "int4": 0.6}[weights]


def logits_of(checkpoint: Any, recipe: Any, folder: Path) -> Floats:
    plan = DecoderPlan(dtype=recipe.dtype, matrix=recipe.matrix, head=recipe.head)
    vision = VisionPlan(dtype=recipe.dtype, normed=recipe.vision_normed, free=recipe.vision_free)
    host = Host(checkpoint, folder / f"{recipe.dtype}", plan, vision)
    _, logits = host.prefill(make_prompt(checkpoint, (3, (64, 96), 4)))
    return logits


def test_external_data_cut_short_does_not_load(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    path = save(build_vision(checkpoint, VisionPlan()), tmp_path / "vision.onnx")
    data = path.with_name("vision.onnx.data")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(Exception, match="vision.onnx.data|out of bounds|external"):
        open_session(path)
