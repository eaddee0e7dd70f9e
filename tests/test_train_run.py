"""Whole runs of the smoke recipe: the loss falls, a kill loses nothing, the checkpoint loads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from medmo_edge.boxes import Box
from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import CheckpointError, MedmoError, RecipeError, UsageError
from medmo_edge.train.architecture import build_model
from medmo_edge.train.loop import Sampler, Trainer, learning_rate
from medmo_edge.train.recipe import load_recipe
from medmo_edge.train.run import corpus, train
from medmo_edge.train.scenes import Scene
from medmo_edge.train.state import complete_steps, newest_step
from medmo_edge.train.step_log import read_metrics
from medmo_edge.train.vocabulary import special_ids, train_tokenizer

RECIPE = load_recipe("smoke").only("pretrain")
BPE = RECIPE.tokenizer.bpe_size
RUN = "import sys; from pathlib import Path; from medmo_edge.train.run import train; "


def log(folder: Path) -> dict[int, dict[str, float]]:
    """The figures of a run by step."""
    return {line["step"]: line for line in read_metrics(folder)}


def curve(folder: Path) -> list[dict[str, float]]:
    """All figures but the time they took."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log(folder).values()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model in the newest saved step, in float32."""
    model = build_model(RECIPE, special_ids(train_tokenizer(corpus(RECIPE, []), BPE)))
    state: dict[str, Any] = {"model": {"model." + k: v for k, v in model.state_dict().items()}}
    newest = complete_steps(folder)[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process
        load(state, storage_reader=FileSystemReader(str(newest / "state")), no_dist=True)
    return {name.removeprefix("model."): value for name, value in state["model"].items()}


def start(folder: Path) -> "subprocess.Popen[bytes]":
    """The smoke recipe in a process of its own, which can be killed."""
    command = [sys.executable, "-c", RUN + "train('smoke', Path(sys.argv[1]))", str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ})


def wait_for_step(process: "subprocess.Popen[bytes]", folder: Path, step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if len(log(folder)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(
        f"step {step} was not reached: {process.stderr and process.stderr.read()!r}"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted smoke run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    threads = torch.get_num_threads()
    train("smoke", folder)
    torch.set_num_threads(threads)
    return folder / "pretrain"


def test_the_loss_falls(whole: Path) -> None:
    losses = [line["loss"] for line in log(whole).values()]
    assert len(losses) == RECIPE.num_steps
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    dense = [line["aux"] for line in log(whole).values()]
    assert np.mean(dense[-3:]) < 0.8 * dense[0]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed" / "pretrain"
    process = start(folder.parent)
    wait_for_step(process, folder, 6)
    process.kill()
    process.communicate()
    assert [step.name for step in complete_steps(folder)] == ["step-000004"]
    shutil.copytree(folder / "step-000004", folder / ".step-000008.tmp")  # a kill while saving
    train("smoke", folder.parent, resume=True)
    for stage in ("pretrain", "instruct", "rl"):
        assert curve(folder.parent / stage) == curve(whole.parent / stage)
        told, found = (
            (place / stage / "checkpoint" / "model.safetensors").read_bytes()
            for place in (whole.parent, folder.parent)
        )
        assert told == found
    mine, theirs = weights(folder), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_ctrl_c_saves_the_step_it_interrupts(tmp_path: Path) -> None:
    folder = tmp_path / "stopped" / "pretrain"
    process = start(folder.parent)
    wait_for_step(process, folder, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    done = len(log(folder))
    assert f"stopped at step {done}: go on with --resume".encode() in errors
    assert complete_steps(folder)[-1].name == f"step-{done:06d}"


def test_the_checkpoint_opens_with_our_reader_and_holds_both_rope_forms(whole: Path) -> None:
    with open_checkpoint(whole / "checkpoint") as checkpoint:
        assert checkpoint.coords == "norm1000"
        assert checkpoint.config.text.mrope_section == (6, 5, 5)
        assert checkpoint.preprocessing.max_pixels == RECIPE.phases[-1].max_pixels
        tokenizer = checkpoint.load_tokenizer()
        assert tokenizer.special_ids["<|im_end|>"] in checkpoint.config.eos_token_ids
        trained = weights(whole)["model.language_model.norm.weight"]
        stored = checkpoint.read("model.language_model.norm.weight")
        assert np.array_equal(stored, trained.bfloat16().float().numpy())
    config = json.loads((whole / "checkpoint" / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000.0
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]


def test_the_checkpoint_loads_in_transformers_with_the_same_logits(whole: Path) -> None:
    """The written folder against the weights that were trained, through from_pretrained."""
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

    folder = whole / "checkpoint"
    loader: Any = Qwen3VLForConditionalGeneration
    loaded, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = train_tokenizer(corpus(RECIPE, []), RECIPE.tokenizer.bpe_size)
    trained = build_model(RECIPE, special_ids(tokenizer))
    rounded = {name: value.bfloat16().float() for name, value in weights(whole).items()}
    trained.load_state_dict(rounded)
    ids = AutoTokenizer.from_pretrained(folder)("Is there a nodule?", return_tensors="pt")
    with torch.inference_mode():
        wanted = trained.train(False)(**ids).logits
        found = loaded.train(False)(**ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    limits = AutoImageProcessor.from_pretrained(folder).size  # type: ignore[no-untyped-call]
    assert limits["longest_edge"] == RECIPE.phases[-1].max_pixels


def test_a_stage_starts_from_the_checkpoint_before_it(whole: Path) -> None:
    instruct = load_recipe("smoke").only("instruct")
    lines = log(whole.parent / "instruct")
    assert sorted(lines) == list(range(instruct.num_steps))
    notes = json.loads((whole.parent / "instruct" / "checkpoint" / "medmo_edge.json").read_text())
    assert notes["training"]["stage"] == "instruct"
    # what three careful steps can change, against weights that start anew
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    with (
        open_checkpoint(whole / "checkpoint") as before,
        open_checkpoint(whole.parent / "instruct" / "checkpoint") as after,
    ):
        assert before.tokenizer_path.read_bytes() == after.tokenizer_path.read_bytes()
        gap = np.abs(after.read(name) - before.read(name)).max()
        assert 0 < gap < 0.1 * np.abs(before.read(name)).max()


def test_reinforcement_follows_and_moves_the_weights(whole: Path) -> None:
    """What it learned from is logged; the checkpoint has the limits of the one before it."""
    rl = load_recipe("smoke").only("rl")
    lines = log(whole.parent / "rl")
    assert sorted(lines) == list(range(rl.num_steps))
    assert all(0 <= line["reward"] <= 1 for line in lines.values())
    assert any(line["norm"] > 0 for line in lines.values())
    with (
        open_checkpoint(whole.parent / "instruct" / "checkpoint") as before,
        open_checkpoint(whole.parent / "rl" / "checkpoint") as after,
    ):
        assert after.preprocessing == before.preprocessing
        assert before.tokenizer_path.read_bytes() == after.tokenizer_path.read_bytes()
        name = "model.language_model.layers.0.mlp.gate_proj.weight"
        assert not np.array_equal(before.read(name), after.read(name))
    notes = json.loads((whole.parent / "rl" / "checkpoint" / "medmo_edge.json").read_text())
    assert notes["training"] == {"stage": "rl", "steps": 3, "recipe_sha256": rl.sha256}


def test_beta_holds_reinforcement_to_the_weights_it_starts_from(
    whole: Path, tmp_path: Path
) -> None:
    start = whole.parent / "instruct" / "checkpoint"

    def trained(beta: float) -> Path:
        text = (resources.files("medmo_edge.train") / "smoke.toml").read_text(encoding="utf-8")
        recipe = tmp_path / f"beta-{beta}.toml"
        recipe.write_text(text.replace("beta = 0.0", f"beta = {beta}"), encoding="utf-8")
        return train(recipe, tmp_path / f"run-{beta}", stage="rl", base=start).parent

    def moved(folder: Path) -> float:
        name = "model.language_model.layers.0.mlp.gate_proj.weight"
        with open_checkpoint(start) as before, open_checkpoint(folder / "checkpoint") as after:
            return float(np.abs(after.read(name) - before.read(name)).mean())

    free, held = trained(0.0), trained(50.0)
    divergences = [line["kl"] for line in log(held).values()]
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[-1] > 0
    assert all("kl" not in line for line in log(free).values())
    assert moved(held) != moved(free)


def test_a_finished_stage_is_not_trained_again(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.parent.rglob("*")}
    assert train("smoke", whole.parent, resume=True) == whole.parent / "rl" / "checkpoint"
    assert {path: path.stat().st_mtime_ns for path in whole.parent.rglob("*")} == before


def test_a_loss_that_is_not_finite_ends_the_run_with_its_last_good_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Trainer._forward, []

    def forward(self: Trainer, batch: Any) -> Any:
        loss, vision = real(self, batch)
        calls.append(loss)
        return (loss * float("nan") if len(calls) == 6 else loss), vision

    monkeypatch.setattr(Trainer, "_forward", forward)
    with pytest.raises(RecipeError, match=r"step 5: loss is nan.*--resume goes on from step-0*5"):
        train("smoke", tmp_path)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "pretrain").values())
    assert not (tmp_path / "pretrain" / "checkpoint").exists()


def test_a_stage_alone_needs_what_it_starts_from(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pretrain/checkpoint, which does not exist.*--base"):
        train("smoke", tmp_path, stage="instruct")
    with pytest.raises(UsageError, match="no stage 'sft': it has pretrain, instruct, rl"):
        train("smoke", tmp_path, stage="sft")
    with pytest.raises(CheckpointError, match="next stage"):
        train("smoke", tmp_path, stage="instruct", base=Path("medmo_edge/medmo-nano"))
    found = train("smoke", tmp_path, stage="instruct", base=whole / "checkpoint")
    assert found == tmp_path / "instruct" / "checkpoint"
    with pytest.raises(UsageError, match="instruct is not empty"):
        train("smoke", tmp_path, stage="instruct", base=whole / "checkpoint")


def test_old_steps_are_removed_and_unfinished_ones_ignored(whole: Path, tmp_path: Path) -> None:
    assert [step.name for step in complete_steps(whole)] == ["step-000008", "step-000012"]
    (tmp_path / "step-000004").mkdir()
    assert complete_steps(tmp_path) == []


def test_a_run_of_another_recipe_is_not_continued(whole: Path) -> None:
    with pytest.raises(UsageError, match="was trained with another recipe"):
        newest_step(whole, "0" * 64)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("smoke", UsageError, "is not empty: choose another folder, or go on with --resume"),
        ("nano", UsageError, "is not empty"),
        ("nowhere", RecipeError, "cannot be read"),
    ],
)
def test_what_cannot_start_touches_nothing(
    tmp_path: Path, recipe: str, error: type[MedmoError], message: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(error, match=message):
        train(recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_missing_data_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDMO_EDGE_DATA", raising=False)
    with pytest.raises(UsageError, match="set MEDMO_EDGE_DATA or --data"):
        train("nano", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_warms_up_and_falls_to_its_end() -> None:
    peak = RECIPE.phases[0].learning_rate
    rates = [learning_rate(step, RECIPE) for step in range(RECIPE.num_steps + 1)]
    assert rates[0] == pytest.approx(peak / 2)
    assert max(rates) == rates[2] == pytest.approx(peak)
    assert rates[-1] == pytest.approx(peak * RECIPE.optimizer.final_fraction)
    assert all(later <= earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))


def test_another_rate_in_a_stage_begins_a_schedule_of_its_own() -> None:
    first, second = RECIPE.phases
    last = replace(second, learning_rate=second.learning_rate / 2, steps=20)
    restarted = replace(RECIPE, phases=(first, second, last))
    begin = first.steps + second.steps
    before = [learning_rate(step, RECIPE) for step in range(begin)]
    assert [learning_rate(step, restarted) for step in range(begin)] == before
    after = [learning_rate(step, restarted) for step in range(begin, restarted.num_steps + 1)]
    assert after[0] == pytest.approx(last.learning_rate / 2) and after[0] > before[-1]
    assert max(after) == after[2] == pytest.approx(last.learning_rate)
    assert after[-1] == pytest.approx(last.learning_rate * RECIPE.optimizer.final_fraction)


def test_platelet_share_asks_smears_about_platelets_alone() -> None:
    boxes = (Box("WBC", 10, 10, 60, 50), Box("Platelets", 100, 70, 110, 80))
    smear = Scene(kind="blood", pixels=np.zeros((96, 128, 3), np.uint8), boxes=boxes)
    tokenizer = train_tokenizer(corpus(RECIPE, [smear]), BPE)

    def questions(share: float) -> str:
        phase = replace(RECIPE.phases[0], blood_share=1.0, platelet_share=share)
        sampler = Sampler(
            recipe=replace(RECIPE, phases=(phase,)),
            blood=[smear],
            radiology=[],
            tokenizer=tokenizer,
            ids=special_ids(tokenizer),
        )
        batch, _ = sampler.batch(0)
        return str(tokenizer.decode(batch.inputs["input_ids"].flatten().tolist()))

    assert "WBC" in questions(0.0)
    assert "WBC" not in questions(1.0) and "latelets" in questions(1.0)


def test_held_out_pictures_are_looked_at_in_the_recipes_rhythm(whole: Path) -> None:
    looks = [line for line in log(whole).values() if "nodule_iou" in line]
    assert [line["step"] + 1 for line in looks] == [RECIPE.rhythm.evaluate_every]
    assert all(0 <= looks[0][name] <= 1 for name in ("nodule_iou", "nodule_yes_no"))
    assert max(log(whole.parent / "rl")) == max(
        step for step, line in log(whole.parent / "rl").items() if "nodule_iou" in line
    )


def test_a_checkpoint_is_replaced_whole(whole: Path, tmp_path: Path) -> None:
    from medmo_edge.train.writer import processing, write_checkpoint

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "stale.bin").write_text("old")
    tokenizer = train_tokenizer(corpus(RECIPE, []), RECIPE.tokenizer.bpe_size)
    limits = processing(RECIPE.phases[-1])
    write_checkpoint(weights(whole), RECIPE, tokenizer, limits, folder, {"step": 12})
    names = {path.name for path in (whole / "checkpoint").iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044
