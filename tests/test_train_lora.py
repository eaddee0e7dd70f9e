"""Adapters: what they are put on, the files that peft reads, and the sum that merging makes."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft", reason="adapters need peft")

import numpy as np
import torch
from click.testing import CliRunner

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.cli import cli
from medmo_edge.errors import CheckpointError, UsageError
from medmo_edge.train.base_model import Base, load_base, set_trainable
from medmo_edge.train.estimates import count_trained
from medmo_edge.train.lora import ADAPTER_WEIGHTS, adapter_config, write_adapter
from medmo_edge.train.merge import merge_adapter
from medmo_edge.train.stages import Module

MODULES: tuple[Module, ...] = ("vision", "merger", "language")
RANK = 3


def adapted(checkpoint: Path, modules: tuple[Module, ...] = MODULES) -> Base:
    torch.manual_seed(0)
    base = load_base(checkpoint)
    set_trainable(base, modules, RANK)
    return base


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that says something: its second matrices are not zero."""
    base = adapted(tiny_checkpoint)
    with torch.no_grad():
        for name, weight in base.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("adapter")
    config = adapter_config(MODULES, RANK, str(tiny_checkpoint))
    write_adapter(base.model.state_dict(), config, folder)
    return folder


@pytest.mark.parametrize("modules", [("language",), ("vision", "merger"), MODULES])
def test_adapters_are_where_the_plan_counts_them(
    modules: tuple[Module, ...], tiny_untied_checkpoint: Path
) -> None:
    base = load_base(tiny_untied_checkpoint)
    learning = set_trainable(base, modules, RANK)
    counted = count_trained(base.config, modules, RANK)
    assert {name: sum(p.numel() for p in found) for name, found in learning.items()} == {
        name: counted[name] for name in modules
    }
    assert {p.dtype for found in learning.values() for p in found} == {torch.float32}


def test_adapters_change_nothing_at_first(tiny_checkpoint: Path) -> None:
    ids = torch.arange(16)[None]
    with torch.no_grad():
        plain = load_base(tiny_checkpoint).model(input_ids=ids).logits
        assert torch.equal(adapted(tiny_checkpoint).model(input_ids=ids).logits, plain)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_reads_the_files(adapter: Path, tiny_checkpoint: Path) -> None:
    """Through PeftModel alone, without our code: the same logits as merged."""
    from peft import PeftModel

    merged = load_base(tiny_checkpoint, precision="float32").model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain = merged(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(merged, str(adapter))(input_ids=ids).logits
    assert not torch.allclose(plain, theirs, atol=1e-2)
    folder = adapter.parent / "read-by-peft"
    merge_adapter(adapter, folder)
    with torch.no_grad():
        ours = load_base(folder, precision="float32").model(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=0.1)  # one rounding to bfloat16


def test_merging_adds_twice_b_a_and_rounds_once(adapter: Path, tiny_checkpoint: Path) -> None:
    from safetensors.torch import load_file

    runner = CliRunner()
    folder = adapter.parent / "merged"
    done = runner.invoke(cli, ["merge", str(adapter), "-o", str(folder)])
    assert done.exit_code == 0 and str(folder) in done.output, done.exception
    parts = load_file(adapter / ADAPTER_WEIGHTS)
    changed = {name.rsplit(".lora_", 1)[0] for name in parts}
    with open_checkpoint(tiny_checkpoint) as before, open_checkpoint(folder) as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name in before.tensors:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            wanted = torch.from_numpy(before.read(name).copy())
            if key in changed:
                product = parts[f"{key}.lora_B.weight"] @ parts[f"{key}.lora_A.weight"]
                wanted = wanted + 2 * product
            assert np.array_equal(after.read(name), wanted.bfloat16().float().numpy()), name
    assert len(changed) == 4 * 7 + 4 * 4 + 2 * 2


def test_mistakes_are_one_line(
    adapter: Path, tiny_checkpoint: Path, tiny_untied_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is no LoRA adapter: it has no adapter_config"):
        merge_adapter(tiny_checkpoint, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match="does not fit its base checkpoint: the adapter lacks base_mod"
    ):
        merge_adapter(adapter, tmp_path / "out", base=tiny_untied_checkpoint)
    with pytest.raises(UsageError, match="is no folder here: name it with --base"):
        merge_adapter(adapter, tmp_path / "out", base="somebody/model")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UsageError, match="is in use: give a new folder"):
        merge_adapter(adapter, tmp_path / "used")
    assert not (tmp_path / "out").exists()
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    values = json.loads((adapter / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = None
    (nameless / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="does not name its base checkpoint: give it with"):
        merge_adapter(nameless, tmp_path / "out")
