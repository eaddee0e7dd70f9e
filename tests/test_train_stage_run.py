"""Whole runs of MedMO's recipe in small: three kinds of stages, resumed, refused, exported."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from click.testing import CliRunner
from stage_data import write_data, write_recipe

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.cli import cli
from medmo_edge.errors import CheckpointError, MedmoError, RecipeError, SampleError, UsageError
from medmo_edge.train import capacity
from medmo_edge.train.base_model import load_base, set_trainable
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.parallel import Group
from medmo_edge.train.stage_run import run_stages
from medmo_edge.train.stages import Module, Stage, load_stages
from medmo_edge.train.step_log import read_metrics
from medmo_edge.train.steps import Diverged
from medmo_edge.train.supervised import Supervised, build_optimizer, rate_factor

STAGES = ["pretrain-768", "pretrain-1280", "instruct", "rl"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("stages") / "data")


@pytest.fixture(scope="module")
def whole(data: Path, tiny_checkpoint: Path) -> Path:
    """All stages from the command line, as a user runs them."""
    recipe = write_recipe(data.parent / "whole.toml", tiny_checkpoint, samples=12)
    output = data.parent / "whole"
    done = CliRunner().invoke(
        cli, ["train", str(recipe), "-o", str(output), "--data", str(data), "--json"]
    )
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout) == {"checkpoint": str(output / "rl" / "checkpoint")}
    return output


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def test_every_stage_leaves_what_it_learned(whole: Path) -> None:
    for name in STAGES:
        found = {path.name for path in (whole / name).iterdir()}
        assert {"checkpoint", "metrics.jsonl", "curves.png"} <= found, name
        assert any(one.startswith("step-") for one in found)
        with open_checkpoint(whole / name / "checkpoint") as opened:
            notes = opened.card["training"]
        assert (notes["recipe"], notes["stage"]) == ("MedMO-4B", name)
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in notes["data"].values())
    first = read_metrics(whole / "pretrain-768")
    assert len(first) == 2 and all(line["samples"] == 6 for line in first)
    assert {"loss", "norm", "learning_rate", "tokens", "answer_tokens"} <= first[0].keys()
    judged = read_metrics(whole / "rl")
    assert all("rewards/iou/mean" in line and "reward" in line for line in judged)


def test_each_stage_starts_from_the_one_before(whole: Path, tiny_checkpoint: Path) -> None:
    folders = [tiny_checkpoint, *(whole / name / "checkpoint" for name in STAGES[:3])]
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weights = []
    for folder in folders:
        with open_checkpoint(folder) as opened:
            weights.append(opened.read(name))
    moved = [float(np.abs(b - a).max()) for a, b in zip(weights, weights[1:], strict=False)]
    # A few steps of 1e-3 each: nobody began again at the base.
    assert all(1e-5 < one < 4e-3 for one in moved)
    assert np.abs(weights[3] - weights[0]).max() > max(moved)


def test_a_finished_run_is_resumed_without_work(whole: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    last = run_stages(whole.parent / "whole.toml", whole, data=data, resume=True)
    assert last == whole / "rl" / "checkpoint"
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_the_result_exports(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="exporting needs the export extra")
    from medmo_edge.export.export import export_checkpoint

    manifest = export_checkpoint(
        whole / "instruct" / "checkpoint", "gguf-f16", tmp_path / "artifact", golden=False
    )
    assert manifest.target == "gguf-f16"


def test_adapters_lie_beside_the_merged_checkpoint(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """LoRA on the language model: everything else is the base's, and features are kept."""
    pytest.importorskip("peft", reason="adapters need peft")
    recipe = write_recipe(
        tmp_path / "r.toml",
        tiny_checkpoint,
        lora_rank=2,
        trainable=["language"],
        samples=24,
        augment="none",
    )
    folder = tmp_path / "out" / "instruct"
    run_stages(recipe, tmp_path / "out", data=data, stage="instruct", base=tiny_checkpoint)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000
    assert any((tmp_path / "out" / "vision-cache").iterdir())
    changed = []
    with open_checkpoint(tiny_checkpoint) as a, open_checkpoint(folder / "checkpoint") as b:
        for name in a.tensors:
            if not np.array_equal(a.raw(name), b.raw(name)):
                changed.append(name)
        notes = b.card["training"]
    assert notes["stage"] == "instruct"
    assert changed and all(".layers." in one and "_proj" in one for one in changed)


def one_step(checkpoint: Path, data: Path, stage: Stage) -> tuple[float, list[torch.Tensor]]:
    """The loss of a step, and the gradients that it leaves."""
    base = load_base(checkpoint, precision="float32")
    set_trainable(base, stage.trainable)
    mixture = Mixture(stage, 7, base.chat, base.limits, base.coords, folder=data, devices=1)
    optimizer = build_optimizer(base.model, stage.tuning)
    learner = Supervised(
        call=base.model,
        optimizer=optimizer,
        tuning=stage.tuning,
        total=4,
        group=Group(),
        precision="float32",
        rows=iter([mixture.rows(0, 0, 1)]),
    )
    found: list[torch.Tensor] = []
    step = optimizer.step
    parameters = [one for one in base.model.parameters() if one.requires_grad]

    def keep(*_: Any) -> None:
        found.extend(one.grad.clone() for one in parameters if one.grad is not None)
        step()

    optimizer.step = keep  # type: ignore[method-assign,assignment]
    return learner.learn(0)["loss"], found


def test_micro_batches_are_one_big_batch(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weighted by answer tokens: one row of everything, or many rows of unlike answers."""
    recipe = load_stages(write_recipe(tmp_path / "r.toml", tiny_checkpoint))
    stage = recipe.stages[2]
    big = one_step(tiny_checkpoint, data, dataclasses.replace(stage, row_tokens=4096))
    small = one_step(tiny_checkpoint, data, dataclasses.replace(stage, row_tokens=160))
    assert big[0] == pytest.approx(small[0], rel=1e-6)
    assert len(big[1]) == len(small[1]) > 50
    for a, b in zip(big[1], small[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(a.abs().max()))


def test_checkpointed_activations_give_the_same_loss(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = []
    for wanted in (False, True):
        name = f"{wanted}"
        recipe = write_recipe(
            tmp_path / f"{name}.toml",
            tiny_checkpoint,
            gradient_checkpointing=wanted,
            samples=12,
        )
        run_stages(recipe, tmp_path / name, data=data, stage="instruct", base=tiny_checkpoint)
        found.append(losses(tmp_path / name / "instruct"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_frozen_parts_have_no_optimiser_state_and_modules_their_own_rate(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = load_stages(write_recipe(tmp_path / "r.toml", tiny_checkpoint))
    tuning = dataclasses.replace(
        recipe.stages[0].tuning, module_rates={"merger": 5e-5}, weight_decay=0.1
    )
    base = load_base(tiny_checkpoint)
    chosen: tuple[Module, ...] = ("merger", "language")
    set_trainable(base, chosen)
    optimizer = build_optimizer(base.model, tuning)
    names = {id(p): name for name, p in base.model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["peak"], group["weight_decay"])
    assert seen["model.visual.merger.linear_fc1.weight"] == (5e-5, 0.1)
    assert seen["model.visual.merger.linear_fc1.bias"] == (5e-5, 0.0)
    assert seen["model.language_model.norm.weight"] == (1e-3, 0.0)
    assert not any("blocks" in name for name in seen)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_rate_of_every_step(schedule: Any, wanted: list[float], tmp_path: Path) -> None:
    """Two steps of warm-up in six; computed by hand."""
    tuning = dataclasses.replace(
        load_stages("medmo-8b").stages[0].tuning, schedule=schedule, warmup_ratio=1 / 3
    )
    assert [rate_factor(step, 6, tuning) for step in range(6)] == pytest.approx(wanted, abs=1e-6)


def test_a_loss_that_is_no_number_moves_nothing(data: Path, tiny_checkpoint: Path) -> None:
    base = load_base(tiny_checkpoint, precision="float32")
    stage = load_stages("medmo-8b").stages[0]
    chosen: tuple[Module, ...] = ("language",)
    set_trainable(base, chosen)
    with torch.no_grad():
        base.model.model.language_model.norm.weight[0] = torch.nan
    before = [one.clone() for one in base.model.parameters() if one.requires_grad]
    small = dataclasses.replace(stage, max_pixels=8192, min_pixels=4096, rows=2, row_tokens=256)
    mixture = Mixture(small, 7, base.chat, base.limits, base.coords, folder=data, devices=1)
    learner = Supervised(
        call=base.model,
        optimizer=build_optimizer(base.model, stage.tuning),
        tuning=stage.tuning,
        total=4,
        group=Group(),
        precision="float32",
        rows=iter([mixture.rows(0, 0, 1)]),
    )
    with pytest.raises(Diverged, match=r"the loss is nan \(samples .*jsonl-\d+"):
        learner.learn(0)
    after = [one for one in base.model.parameters() if one.requires_grad]
    pairs = zip(before, after, strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    assert all(one.grad is None for one in after)


def refused(kind: type[MedmoError], message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        run_stages(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_work_is_refused_before_weights_load(
    data: Path,
    whole: Path,
    tiny_checkpoint: Path,
    tiny_untied_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("medmo_edge.train.stage_run.load_base", never)
    recipe = write_recipe(tmp_path / "r.toml", tiny_checkpoint)
    out = tmp_path / "out"
    refused(UsageError, "has no stage 'sft': it has pretrain-768", recipe, out, stage="sft")
    refused(UsageError, "starts from .*/out/instruct/checkpoint, which", recipe, out, stage="rl")
    refused(UsageError, "starts from Qwen/.* no folder here: nothing", "medmo-4b", out, data=data)
    refused(UsageError, "reads medtrinity.jsonl, .* --data", "medmo-4b", out, base=tiny_checkpoint)
    refused(UsageError, "is not empty: .* or go on with --resume", recipe, whole, data=data)
    other = tiny_untied_checkpoint
    refused(RecipeError, "tie_word_embeddings True, and .* has False", recipe, out, base=other)
    refused(CheckpointError, "does not exist", recipe, out, base=tmp_path / "none")
    refused(SampleError, "medtrinity.jsonl", recipe, out)  # no data beside the recipe
    rewards = write_recipe(tmp_path / "w.toml", tiny_checkpoint, rewards={"number": 1.0})
    refused(RecipeError, "reward 'number' applies to none of", rewards, out, data=data)
    monkeypatch.setattr(capacity, "free_gib", lambda group: 0.5)
    monkeypatch.setattr("medmo_edge.train.stage_plan.free_gib", lambda group: 0.5)
    small = r"'pretrain-768' needs about 1\.\d GiB a device and cpu has 0\.5 GiB free: use a lar"
    refused(RecipeError, small, recipe, out, data=data)
    assert not out.exists()


def test_the_published_recipes_are_planned_for_the_devices_at_hand() -> None:
    """The 4B in full: 72 GiB on one device, which is too much for 23, and 22 on each of eight."""
    recipe = load_stages("medmo-4b")
    with pytest.raises(RecipeError, match=r"cpu has 23\.0 GiB free: set lora_rank or train fewer"):
        capacity.require_fit(recipe, recipe.stages[0], Group(), 23.0)
    eight = Group(world=8, here=8, device="cuda:0")
    needed = capacity.require_fit(recipe, recipe.stages[0], eight, 139.0).memory.device
    assert 15 < needed < 30


def start(recipe: Path, output: Path, data: Path, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "medmo_edge", "train", str(recipe), "-o", str(output)]
    options = ["--data", str(data), "--stage", "instruct", *more]
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, env={**os.environ})


def finish(process: "subprocess.Popen[bytes]") -> int:
    process.communicate()
    return process.returncode


@pytest.mark.slow  # several processes that load torch and transformers
def test_a_killed_stage_goes_on_with_the_same_curve(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """kill -9 from outside, twice, at a moment that nobody chose; data, weights, log and all."""
    recipe = write_recipe(tmp_path / "r.toml", tiny_checkpoint, samples=60)
    base = ("--base", str(tiny_checkpoint))
    assert finish(start(recipe, tmp_path / "whole", data, *base)) == 0
    folder = tmp_path / "killed" / "instruct"
    for number, step in enumerate((3, 6)):
        process = start(recipe, tmp_path / "killed", data, *base, *["--resume"] * bool(number))
        while process.poll() is None and len(read_metrics(folder)) < step:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        finish(process)
    assert finish(start(recipe, tmp_path / "killed", data, *base, "--resume")) == 0
    assert losses(folder) == losses(tmp_path / "whole" / "instruct")
    assert len(losses(folder)) == 10
    name = "checkpoint/model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / "instruct" / name).read_bytes()
