"""Our loop against TRL's GRPOTrainer, and the same stage run in it."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("trl", reason="the reference is TRL's GRPOTrainer")
pytest.importorskip("datasets", reason="TRL's data sets are Hugging Face's")

import torch
from rl_samples import SEED, rl_mixture, tiny_rl_stage, write_rl_samples

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import SampleError
from medmo_edge.train.base_model import Base, load_base
from medmo_edge.train.grpo_learner import Experience, Learner, Question
from medmo_edge.train.grpo_loss import advantages
from medmo_edge.train.grpo_trl import engine_of, make_row, make_trainer, run_trl
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.packing import Chat, encode_sample
from medmo_edge.train.rewards import case_of
from medmo_edge.train.rollouts import Answer, Decoding
from medmo_edge.train.stages import RlStage

LENGTHS = ((3, 8, 5, 1), (8, 2, 4, 8))  # of the answers; 8 are all that fit, and have no end
END = 7
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@dataclass(frozen=True)
class Setting:
    """One trainer of TRL with what our loop gets beside it."""

    base: Base
    stage: RlStage
    mixture: Mixture
    trainer: Any
    experience: Experience


@pytest.fixture(scope="module")
def setting(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("trl")
    write_rl_samples(folder)
    base = load_base(tiny_checkpoint, precision="float32")
    stage = tiny_rl_stage()
    mixture = rl_mixture(base, stage, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(base, stage, mixture, folder / "out", seed=SEED, steps=2)
    trainer.current_gradient_accumulation_steps = 1
    yield Setting(base, stage, mixture, trainer, _experience(base, mixture))


def _experience(base: Base, mixture: Mixture) -> Experience:
    """Answers of given lengths to the two questions of step 0, with rewards of our choice."""
    chat = Chat(tokenizer=base.tokenizer, template=base.template)
    questions = []
    for sample in mixture.samples(0, 0, 1):
        prompt = encode_sample(sample, chat, mixture.limits, base.coords, answered=False)
        questions.append(Question(prompt=prompt, case=case_of(sample, prompt.geometries)))
    random = np.random.default_rng(5)
    answers = [[_answer(random, length) for length in lengths] for lengths in LENGTHS]
    rewards = np.array([[0.9, 0.1, 0.4, 0.0], [1.0, 1.0, 0.3, 0.2]])
    return Experience(
        questions=questions,
        answers=answers,
        values={"iou": rewards},
        rewards_PG=rewards,
        advantages_PG=advantages(rewards, "group"),
    )


def _answer(random: np.random.Generator, length: int) -> Answer:
    """Any tokens; ``truncated`` where no end stands last."""
    truncated = length == max(max(LENGTHS))
    ids = [*random.integers(10, 300, length - 1).tolist(), 301 if truncated else END]
    return Answer(
        ids=tuple(ids), log_probs=np.zeros(length, np.float32), entropy=0.0, truncated=truncated
    )


def learner(setting: Setting, stage: RlStage, reference: Any = None) -> Learner:
    return Learner(
        model=setting.base.model,
        objective=stage.objective,
        rewards=stage.rewards,
        decoding=Decoding(
            num_generations=4,
            max_new_tokens=stage.rollouts.max_completion_tokens,
            temperature=stage.rollouts.temperature,
            ends=(END,),
        ),
        decode=setting.base.tokenizer.decode,
        seed=SEED,
        row_tokens=48,  # so that a group needs several rows
        batch_tokens=96,
        reference=reference,
    )


def trl_inputs(setting: Setting, masked: bool) -> dict[str, Any]:
    """The same answers as TRL has them: prompts padded on the left, answers on the right."""
    rows = [
        make_row(s, setting.base, setting.mixture.limits) for s in setting.mixture.samples(0, 0, 1)
    ]
    processor = setting.trainer.processing_class
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": row["images"][0]}, *_text(row)]}]
        for row in rows
        for _ in range(4)
    ]
    images = [row["images"] for row in rows for _ in range(4)]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in prompts]
    values = processor(images=images, text=texts, padding=True, return_tensors="pt")
    answers = [answer for group in setting.experience.answers for answer in group]
    width = max(len(answer.ids) for answer in answers)
    ids = torch.zeros(len(answers), width, dtype=torch.long)
    mask = torch.zeros(len(answers), width, dtype=torch.long)
    for index, answer in enumerate(answers):
        ids[index, : len(answer.ids)] = torch.tensor(answer.ids)
        mask[index, : len(answer.ids)] = int(not (masked and answer.truncated))
    types = values["mm_token_type_ids"]
    return {
        "prompt_ids": values["input_ids"],
        "prompt_mask": values["attention_mask"],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.from_numpy(setting.experience.advantages_PG.reshape(-1)).float(),
        "num_items_in_batch": mask.sum(),
        "pixel_values": values["pixel_values"],
        "image_grid_thw": values["image_grid_thw"],
        "num_images": [1] * len(answers),
        "mm_token_type_ids": torch.cat([types, torch.zeros_like(ids)], dim=1),
    }


def _text(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The text of a row's only message."""
    return [part for part in row["prompt"][0]["content"] if part["type"] == "text"]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def trl_loss(setting: Setting, stage: RlStage, inputs: dict[str, Any]) -> float:
    """TRL's loss of the inputs, its gradients left in the model."""
    trainer, objective = setting.trainer, stage.objective
    trainer.loss_type, trainer.beta = objective.loss_type, objective.beta
    trainer.args.steps_per_generation = 1
    trainer.model.train()
    with contextlib.redirect_stdout(None):
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_loss_and_gradients_are_trls(setting: Setting, kind: Any, masked: bool) -> None:
    """Ours on rows of branches, TRL's on padded sequences; the model is the same object."""
    objective = replace(setting.stage.objective, loss_type=kind, mask_truncated_completions=masked)
    stage = replace(setting.stage, objective=objective)
    expected = trl_loss(setting, stage, trl_inputs(setting, masked))
    reference = gradients(setting.base.model)
    found: dict[str, torch.Tensor] = {}

    def update() -> float:
        found.update(gradients(setting.base.model))
        return 0.0

    figures = learner(setting, stage).learn(setting.experience, update)
    assert figures["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.keys() == reference.keys()
    largest = max(float(value.abs().max()) for value in reference.values())
    for name, value in reference.items():
        np.testing.assert_allclose(found[name], value, atol=2e-4 * largest, err_msg=name)


def test_old_probabilities_and_the_reference_are_trls(
    setting: Setting, tiny_checkpoint: Path
) -> None:
    """A second update on the same answers (clipped ratios), held to a frozen model (beta)."""
    objective = replace(setting.stage.objective, num_iterations=2, beta=0.3)
    stage = replace(setting.stage, objective=objective)
    model = setting.base.model
    frozen = load_base(tiny_checkpoint, precision="float32").model
    with torch.no_grad():  # another policy than the reference
        model.lm_head.weight.mul_(1.02)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = trl_inputs(setting, False)
    log_probs = setting.trainer._get_per_token_logps_and_entropies
    same = {
        name: inputs[name]
        for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        inputs["old_per_token_logps"] = log_probs(model, ids, seen, 8, **same)[0]
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(frozen, temperature=stage.rollouts.temperature)
        inputs["ref_per_token_logps"] = log_probs(frozen, ids, seen, 8, **same)[0]
    losses: list[float] = []

    def update() -> float:
        """After each update of ours: TRL's loss at the weights before it; then a large step."""
        ours = gradients(model)
        losses.append(trl_loss(setting, stage, inputs))
        reference = gradients(model)
        largest = max(float(value.abs().max()) for value in reference.values())
        for name, value in reference.items():
            np.testing.assert_allclose(ours[name], value, atol=5e-4 * largest, err_msg=name)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(0.05 * reference[name] / largest)
        return 0.0

    clean = load_base(tiny_checkpoint, precision="float32").model  # without TRL's patched forward
    try:
        figures = learner(setting, stage, clean).learn(setting.experience, update)
    finally:
        model.load_state_dict(before)
        with torch.no_grad():
            model.lm_head.weight.div_(1.02)
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)
    assert figures["clip_ratio/region_mean"] > 0
    assert figures["kl"] > 0
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_the_processor_encodes_as_our_loop_does(setting: Setting) -> None:
    sample = setting.mixture.samples(0, 0, 1)[0]
    row = make_row(sample, setting.base, setting.mixture.limits)
    part = {"type": "image", "image": row["images"][0]}
    chat = [[{"role": "user", "content": [part, *_text(row)]}]]
    found = setting.trainer.processing_class.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    prompt = setting.experience.questions[0].prompt
    assert found["input_ids"] == [prompt.ids.tolist()]
    np.testing.assert_array_equal(found["pixel_values"], prompt.patches)
    assert [tuple(grid) for grid in found["image_grid_thw"].tolist()] == list(prompt.grids)


def test_a_prompt_too_long_is_one_line(setting: Setting, tmp_path: Path) -> None:
    write_rl_samples(tmp_path)
    rollouts = replace(setting.stage.rollouts, max_prompt_tokens=12)
    stage = replace(setting.stage, rollouts=rollouts)
    mixture = rl_mixture(setting.base, stage, tmp_path)
    with pytest.raises(SampleError, match=r"needs \d+ tokens, max_prompt_tokens is 12: raise it"):
        run_trl(setting.base, stage, mixture, tmp_path / "out", seed=SEED, notes={}, steps=1)


def test_without_vllm_answers_come_from_transformers(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = replace(setting.stage.rollouts, engine="vllm-colocate")
    stage = replace(setting.stage, rollouts=rollouts)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine_of(stage) == "generate"
    assert "vllm is not installed" in capsys.readouterr().err


def test_two_steps_in_trl_write_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rewards are logged by name, and the checkpoint opens and differs from its start."""
    write_rl_samples(tmp_path)
    base = load_base(tiny_checkpoint, precision="float32")
    before = base.model.lm_head.weight.detach().clone()
    stage = tiny_rl_stage(beta=0.1, scale_rewards="none")
    mixture = rl_mixture(base, stage, tmp_path)
    folder = run_trl(
        base, stage, mixture, tmp_path / "out", seed=SEED, notes={"stage": "rl"}, steps=2
    )
    with open_checkpoint(folder) as opened:
        assert opened.card["training"] == {"stage": "rl"}
    assert base.model.lm_head.weight.shape == before.shape
    state = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    logged = state["log_history"][0]
    assert {"rewards/iou/mean", "rewards/format/mean", "rewards/yes_no/mean", "kl"} <= set(logged)
    assert state["global_step"] == 2
