"""Loading a checkpoint to train it, and writing it back: equal weights, files, and readers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import CheckpointError
from medmo_edge.train import base_model
from medmo_edge.train.base_model import Base, load_base, save_checkpoint, set_trainable
from medmo_edge.train.estimates import count_trained
from medmo_edge.train.stages import Module

MODULES: tuple[Module, ...] = ("vision", "merger", "language")


@pytest.fixture(scope="module")
def base(tiny_untied_checkpoint: Path) -> Base:
    return load_base(tiny_untied_checkpoint, precision="float32")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_untied_checkpoint"])
def test_what_is_written_is_what_was_read(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Tied and untied: the same tensors bit by bit, no head twice, every other file unchanged."""
    source: Path = request.getfixturevalue(name)
    loaded = load_base(source)
    save_checkpoint(loaded, tmp_path / "out", {"recipe": "r", "stage": "s"})
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "out") as after:
        assert before.tensors.keys() == after.tensors.keys()
        assert all(np.array_equal(before.raw(one), after.raw(one)) for one in before.tensors)
        assert after.config == before.config
        assert after.card["training"] == {"recipe": "r", "stage": "s"}
        assert after.card["coords"] == before.coords
    kept = [path.name for path in source.iterdir() if path.suffix in (".txt", ".jinja")]
    kept += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "preprocessor_config.json"]
    for one in kept:
        assert (tmp_path / "out" / one).read_bytes() == (source / one).read_bytes(), one
    assert not list(tmp_path.glob(".out*"))


def test_the_written_checkpoint_computes_the_same_in_transformers(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    loaded = load_base(tiny_checkpoint, precision="float32")
    save_checkpoint(loaded, tmp_path / "out", {})
    ids = torch.arange(24)[None] % loaded.config.text.vocab_size
    loader: Any = Qwen3VLForConditionalGeneration
    read = loader.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


@pytest.mark.parametrize("dropped", [["rope_parameters"], ["rope_scaling", "rope_theta"]])
def test_either_form_of_the_rope_becomes_both(
    dropped: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """4.57 reads rope_theta and rope_scaling, 5.x rope_parameters; a base has one or the other."""
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    whole = json.loads((tmp_path / "base" / "config.json").read_text())
    edit(
        tmp_path / "base" / "config.json",
        lambda values: [values["text_config"].pop(name) for name in dropped],
    )
    written = base_model.both_rope_forms(tmp_path / "base")
    text, wanted = written["text_config"], whole["text_config"]
    assert text["rope_theta"] == wanted["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert text["rope_scaling"] == wanted["rope_scaling"]
    assert text["rope_parameters"] == wanted["rope_parameters"]
    assert written["dtype"] == text["dtype"] == written["vision_config"]["dtype"] == "bfloat16"


def test_large_checkpoints_are_written_in_shards(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "SHARD_BYTES", 2_000_000)
    save_checkpoint(base, tmp_path / "out", {})
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "out" / "model.safetensors").exists()
    with open_checkpoint(tmp_path / "out") as opened:
        assert "lm_head.weight" in opened.tensors


def test_writing_replaces_a_whole_folder_and_never_leaves_half_of_one(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(base, tmp_path / "out", {"step": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_model, "_write_weights", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(base, tmp_path / "out", {"step": 2})
    with open_checkpoint(tmp_path / "out") as opened:
        assert opened.card["training"] == {"step": 1}


@pytest.mark.parametrize("modules", [("merger",), ("vision", "merger"), MODULES])
def test_only_what_is_chosen_learns(modules: tuple[Module, ...], tiny_checkpoint: Path) -> None:
    """Counted as the plan counts it; master weights in float32, the rest stays in bfloat16."""
    loaded = load_base(tiny_checkpoint)
    learning = set_trainable(loaded, modules)
    counted = count_trained(loaded.config, modules, 0)
    assert {name: sum(p.numel() for p in found) for name, found in learning.items()} == {
        name: count for name, count in counted.items() if name in modules
    }
    for parameter in loaded.model.parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight


def test_the_linear_patch_embedding_is_the_convolution(base: Base) -> None:
    embed = base.model.model.visual.patch_embed
    patches = torch.randn(12, 3 * 2 * 16 * 16)
    with torch.no_grad():
        theirs = type(embed).forward(embed, patches)
        assert torch.allclose(embed(patches), theirs, atol=1e-5)


def test_bad_folders_are_one_line(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: nothing is downloaded"):
        load_base(tmp_path / "none")
    shutil.copytree(tiny_checkpoint, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="medmo-edge merge"):
        load_base(tmp_path / "adapter")
