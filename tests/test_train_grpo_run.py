"""The reinforcement stage in the stages' loop: figures, resuming, the reference, refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from rl_samples import SEED, rl_mixture, tiny_rl_stage, write_rl_samples

from medmo_edge.errors import SampleError
from medmo_edge.train import grpo
from medmo_edge.train.base_model import load_base, set_trainable
from medmo_edge.train.grpo import Reinforced, run_rl
from medmo_edge.train.grpo_learner import decoding_of
from medmo_edge.train.parallel import Group, joined, spread
from medmo_edge.train.rewards import REWARDS, Case
from medmo_edge.train.stages import RlStage, load_stages
from medmo_edge.train.steps import StepLoop
from medmo_edge.train.supervised import build_optimizer

STEPS = 4


def run(
    checkpoint: Path, data: Path, output: Path, stage: RlStage, group: Group | None = None
) -> dict[str, Any]:
    """What a run of stages does with a reinforcement stage; gives the weights at the end."""
    group = group or Group()
    base = load_base(checkpoint, precision="float32")
    set_trainable(base, stage.trainable, stage.lora_rank)
    call = spread(base.model, stage, group, "float32")
    base.model.train()
    optimizer = build_optimizer(base.model, stage.tuning)
    loop = StepLoop(
        name="tiny rl",
        folder=output,
        group=group,
        model=base.model,
        optimizer=optimizer,
        total=STEPS,
        save_every=2,
        identity="same",
        seed=SEED,
    )
    loop.resume()
    recipe = dataclasses.replace(load_stages("medmo-8b"), seed=SEED, precision="bfloat16")
    object.__setattr__(recipe, "precision", "float32")
    run_rl(
        base,
        stage,
        rl_mixture(base, stage, data),
        output,
        recipe=recipe,
        call=call,
        optimizer=optimizer,
        loop=loop,
        group=group,
    )
    return dict(base.model.state_dict())


def figures(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def part_of_e(case: Case) -> float:
    """The part of an answer's characters that is an e: noise is worth different things by it."""
    return case.text.count("e") / max(1, len(case.text))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(REWARDS, "format", part_of_e)
    monkeypatch.setattr("medmo_edge.train.step_log.draw_curves", lambda *_: None)  # seconds each
    write_rl_samples(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tiny_checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tiny_rl_stage(scale_rewards="batch")
    expected = run(tiny_checkpoint, data, data / "whole", stage)
    learn = Reinforced.learn

    def killed(self: Reinforced, step: int) -> dict[str, float]:
        if step == 3:  # step 2 was done but not saved: it is done again
            raise SystemExit("killed")
        return learn(self, step)

    monkeypatch.setattr(grpo.Reinforced, "learn", killed)
    with pytest.raises(SystemExit):
        run(tiny_checkpoint, data, data / "cut", stage)
    monkeypatch.setattr(grpo.Reinforced, "learn", learn)
    found = run(tiny_checkpoint, data, data / "cut", stage)
    assert figures(data / "cut") == figures(data / "whole")
    assert len(figures(data / "cut")) == STEPS
    start = load_base(tiny_checkpoint, precision="float32").model.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_every_figure_is_logged_by_trls_names(tiny_checkpoint: Path, data: Path) -> None:
    """With a reference: at first the policy is it, and the divergence is 0."""
    run(tiny_checkpoint, data, data / "out", tiny_rl_stage(beta=0.5, num_iterations=2))
    first, *rest = figures(data / "out")
    assert {
        "loss",
        "reward",
        "reward_std",
        "rewards/iou/mean",
        "rewards/yes_no/std",
        "frac_reward_zero_std",
        "entropy",
        "kl",
        "clip_ratio/region_mean",
        "completions/clipped_ratio",
        "learning_rate",
        "norm",
        "answer_tokens",
    } <= first.keys()
    assert first["completions/mean_length"] > 1
    assert rest[-1]["kl"] > first["kl"] >= 0


def test_a_prompt_too_long_is_one_line(tiny_checkpoint: Path, data: Path) -> None:
    stage = tiny_rl_stage()
    rollouts = dataclasses.replace(stage.rollouts, max_prompt_tokens=12)
    with pytest.raises(SampleError, match=r"needs \d+ prompt tokens, max_prompt_tokens is 12"):
        run(tiny_checkpoint, data, data / "out", dataclasses.replace(stage, rollouts=rollouts))


def test_pictures_and_unused_ids_are_never_said(tiny_checkpoint: Path) -> None:
    base = load_base(tiny_checkpoint, precision="float32")
    groups = tiny_rl_stage().rollouts
    suppressed = decoding_of(base.config, base.tokenizer.length, groups).suppressed
    special = base.tokenizer.special_ids
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
        assert special[token] in suppressed
    assert base.config.text.vocab_size - 1 in suppressed  # the table is longer than the tokenizer
    assert not set(suppressed) & set(base.config.eos_token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_learn_as_one(tiny_checkpoint: Path, data: Path, sharding: str) -> None:
    """Each asks its own question; afterwards both have the same weights, which have moved."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "29631", __file__, str(tiny_checkpoint), str(data), sharding]
    tests = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(data / f"rank-{rank}.pt") for rank in range(2)]
    start = load_base(tiny_checkpoint, precision="float32").model.state_dict()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
    assert any(not torch.equal(value, start[name]) for name, value in found[0].items())
    assert len(figures(data / "out")) == STEPS


def _one_of_two(checkpoint: str, data: str, sharding: Any) -> None:
    """What each process of the test above does."""
    stage = dataclasses.replace(tiny_rl_stage(beta=0.1), sharding=sharding)
    REWARDS["format"] = part_of_e
    with joined("cpu") as group:
        weights = run(Path(checkpoint), Path(data), Path(data) / "out", stage, group)
        whole = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in weights.items()
        }
        torch.save(whole, Path(data) / f"rank-{group.rank}.pt")


if __name__ == "__main__":
    _one_of_two(*sys.argv[1:])
