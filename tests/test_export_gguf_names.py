"""Tensor names: every tensor of the checkpoint has exactly one place in the two GGUF files."""

from dataclasses import replace
from pathlib import Path

import pytest

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import ExportError
from medmo_edge.export.gguf_names import plan_tensors
from medmo_edge.tensors import TensorInfo

gguf = pytest.importorskip("gguf")


def renamed(checkpoint: Checkpoint, old: str, new: str | None) -> Checkpoint:
    tensors = dict(checkpoint.tensors)
    info = tensors.pop(old)
    if new:
        tensors[new] = info
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_untied_checkpoint"])
def test_the_names_are_those_of_the_gguf_package(name: str, request: pytest.FixtureRequest) -> None:
    """Independent reference: the name tables that llama.cpp publishes for both architectures."""
    checkpoint = open_checkpoint(request.getfixturevalue(name))
    language, vision = plan_tensors(checkpoint)
    text = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3VL, checkpoint.config.text.num_layers)
    tower = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, checkpoint.config.vision.depth)
    for each in language:
        source = each.source.replace("model.language_model.", "model.")
        assert each.name == text.get_name(source, try_suffixes=(".weight",)), each.source
    for each in vision:
        if each.source.startswith(("model.visual.blocks.", "model.visual.pos_embed")):
            source = each.source.removeprefix("model.")
            assert each.name == tower.get_name(source, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_untied_checkpoint"])
def test_every_tensor_is_used_once(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(name))
    language, vision = plan_tensors(checkpoint)
    sources = [each.source for each in [*language, *vision] if each.frame != 1]
    assert sorted(sources) == sorted(checkpoint.tensors)
    names = [each.name for each in [*language, *vision]]
    assert len(set(names)) == len(names) == len(checkpoint.tensors) + 1


def test_deepstack_mergers_are_named_by_their_vision_layer(tiny_checkpoint: Path) -> None:
    _, vision = plan_tensors(open_checkpoint(tiny_checkpoint))  # its one merger reads layer 1
    places = {each.source: each.name for each in vision}
    merger = "model.visual.deepstack_merger_list.0"
    assert places[f"{merger}.norm.weight"] == "v.deepstack.1.norm.weight"
    assert places[f"{merger}.linear_fc2.bias"] == "v.deepstack.1.fc2.bias"


def test_the_patch_convolution_becomes_one_tensor_per_frame(tiny_checkpoint: Path) -> None:
    _, vision = plan_tensors(open_checkpoint(tiny_checkpoint))
    frames = [each for each in vision if each.frame is not None]
    assert [(each.name, each.frame, each.shape) for each in frames] == [
        ("v.patch_embd.weight", 0, (128, 3, 16, 16)),
        ("v.patch_embd.weight.1", 1, (128, 3, 16, 16)),
    ]


def test_a_tied_copy_of_the_embedding_is_left_out(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    copy = checkpoint.tensors["model.language_model.embed_tokens.weight"]
    tensors: dict[str, TensorInfo] = {**checkpoint.tensors, "lm_head.weight": copy}
    language, _ = plan_tensors(replace(checkpoint, tensors=tensors))
    assert "output.weight" not in {each.name for each in language}


@pytest.mark.parametrize(
    "new",
    [
        "model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.language_model.layers.x.self_attn.q_proj.weight",
        "model.visual.blocks.0.attn.rotary.weight",
        "model.visual.unheard_of.weight",
        "model.language_model.layers.0",
        "value_head",
        "",
    ],
)
def test_an_unknown_tensor_is_named(tiny_checkpoint: Path, new: str) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    extra = {**checkpoint.tensors, new: checkpoint.tensors["model.language_model.norm.weight"]}
    with pytest.raises(ExportError, match="belongs to no part") as caught:
        plan_tensors(replace(checkpoint, tensors=extra))
    assert new in str(caught.value)


def test_a_missing_tensor_is_named(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    for source in checkpoint.tensors:
        with pytest.raises(ExportError, match="is missing") as caught:
            plan_tensors(renamed(checkpoint, source, None))
        assert source in str(caught.value)
