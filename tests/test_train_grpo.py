"""The reinforcement step: rewards, what is learned from, figures, and that it learns."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from rl_samples import SEED, rl_mixture, tiny_rl_stage, write_rl_samples

from medmo_edge.boxes import Geometry
from medmo_edge.errors import SampleError
from medmo_edge.train.base_model import Base, load_base
from medmo_edge.train.grpo_learner import (
    Experience,
    Learner,
    Question,
    guided_question,
    score,
    weighted_mean,
)
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.packing import Chat, encode_sample
from medmo_edge.train.reinforcement import Curriculum
from medmo_edge.train.rewards import REWARDS, Case, case_of, columns, combine, trl_reward
from medmo_edge.train.rollouts import Answer, Decoding

MakeLearner = Callable[..., Learner]


@pytest.fixture(scope="module")
def mixture(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("grpo")
    write_rl_samples(folder)
    return rl_mixture(load_base(tiny_checkpoint, precision="float32"), tiny_rl_stage(), folder)


@pytest.fixture
def base(tiny_checkpoint: Path) -> Base:
    """A model of its own for every test: they train it."""
    return load_base(tiny_checkpoint, precision="float32")


@pytest.fixture
def questions(base: Base, mixture: Mixture) -> list[Question]:
    chat = Chat(tokenizer=base.tokenizer, template=base.template)
    found = []
    for sample in mixture.samples(0, 0, 1):
        prompt = encode_sample(sample, chat, mixture.limits, base.coords, answered=False)
        found.append(Question(prompt=prompt, case=case_of(sample, prompt.geometries)))
    return found


@pytest.fixture
def make_learner(base: Base) -> MakeLearner:
    """A learner of the tiny stage; ``objective`` and the rest can be changed."""

    def make(objective: dict[str, Any] | None = None, **changes: Any) -> Learner:
        stage = tiny_rl_stage(**(objective or {}))
        values: dict[str, Any] = {
            "model": base.model,
            "objective": stage.objective,
            "rewards": stage.rewards,
            "decoding": Decoding(
                num_generations=4,
                max_new_tokens=8,
                temperature=1.0,
                ends=tuple(base.config.eos_token_ids),
                suppressed=(base.config.image_token_id,),
            ),
            "decode": base.tokenizer.decode,
            "seed": SEED,
            "row_tokens": 512,
            "batch_tokens": 1024,
            "precision": nullcontext,
        }
        return Learner(**(values | changes))

    return make


@pytest.fixture
def reward_for_e(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The part of an answer's characters that is an e, in place of the reward ``format``."""
    monkeypatch.setitem(
        REWARDS, "format", lambda case: case.text.count("e") / max(1, len(case.text))
    )
    yield


def answer(ids: tuple[int, ...], truncated: bool = False) -> Answer:
    return Answer(
        ids=ids,
        log_probs=np.zeros(len(ids), np.float32),
        entropy=0.0,
        truncated=truncated,
    )


def test_rewards_are_weighted_as_everywhere_else(base: Base, questions: list[Question]) -> None:
    """The weighted mean of those that apply: what ``combine`` gives for each completion."""
    located = next(q for q in questions if q.case.boxes is not None)
    asked = next(q for q in questions if q.case.boxes is None)
    texts = ["nodule <box>[[50, 120, 600, 700]]</box>", "Yes.", "No.", "nodule"]
    groups = [[answer(tuple(base.tokenizer.encode(text))) for text in texts]] * 2
    weights = {"iou": 0.5, "format": 0.3, "yes_no": 2.0, "count": 0.0}
    values = score([located, asked], groups, base.tokenizer.decode, weights)
    assert list(values) == ["iou", "format", "yes_no"]
    found = weighted_mean(values, weights)
    for place, question in enumerate((located, asked)):
        cases = [dataclasses.replace(question.case, text=text) for text in texts]
        expected = np.array([combine(case, weights) for case in cases], np.float64)
        np.testing.assert_allclose(found[place], expected)
    assert np.isnan(values["yes_no"][0]).all() and np.isnan(values["iou"][1]).all()
    assert found[1].tolist() == [0, 1, 0, 0]


def test_a_stricter_overlap_pays_only_better_boxes(base: Base, questions: list[Question]) -> None:
    located = next(q for q in questions if q.case.boxes is not None)
    (truth,) = located.case.boxes or ()
    near = dataclasses.replace(truth, x2=truth.x2 + 12)  # 36 of 48 columns: an overlap of 0.75
    assert truth.x2 - truth.x1 == 36
    case = dataclasses.replace(located.case, text="unused")
    case.__dict__["parsed"] = dataclasses.replace(case.parsed, boxes=(near,), rejected=())
    assert REWARDS["iou"](case) == pytest.approx(0.75)
    strict = dataclasses.replace(case, iou_threshold=0.76)
    strict.__dict__["parsed"] = case.parsed
    assert REWARDS["iou"](strict) == 0


def test_a_curriculum_goes_from_loose_to_strict() -> None:
    curriculum = Curriculum(iou_from=0.2, iou_to=0.6, until=0.5)
    found = [curriculum.threshold(done) for done in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.6])


def test_trls_trainer_follows_the_curriculum(base: Base, mixture: Mixture) -> None:
    """The same box, an overlap of 0.75, before and after the threshold passes it."""
    sample = next(s for s in mixture.samples(0, 0, 1) if s.task == "locate")
    (truth,) = sample.boxes
    size = Geometry(
        width=1000,
        height=1000,
        frame_width=1000,
        frame_height=1000,
        resized_width=1000,
        resized_height=1000,
    )
    row = {name: [value] for name, value in columns(sample, [size]).items()}
    near = [int(truth.x1), int(truth.y1), int(truth.x2) + 12, int(truth.y2)]
    said = [f"nodule <box>[{near}]</box>"]
    reward = trl_reward({"iou": 1.0}, iou_threshold=lambda done: 0.9 * done)
    found = [
        reward([], said, trainer_state=SimpleNamespace(global_step=step, max_steps=10), **row)
        for step in (0, 8, 9)
    ]
    assert found == [[pytest.approx(0.75)], [pytest.approx(0.75)], [0.0]]


def test_the_same_step_collects_the_same(
    make_learner: MakeLearner, questions: list[Question]
) -> None:
    first = make_learner().collect(5, questions, 0.0)
    again = make_learner().collect(5, questions, 0.0)
    other = make_learner(rank=1).collect(5, questions, 0.0)
    said = [[one.ids for one in group] for group in first.answers]
    assert said == [[one.ids for one in group] for group in again.answers]
    assert said != [[one.ids for one in group] for group in other.answers]


def test_a_reward_that_raises_names_itself_and_the_sample(
    make_learner: MakeLearner, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Case) -> float:
        raise ValueError("no\nsuch\nthing")

    monkeypatch.setitem(REWARDS, "format", broken)
    with pytest.raises(SampleError) as caught:
        make_learner().collect(0, questions, 0.0)
    text = str(caught.value)
    assert "reward 'format' failed on sample 'l" in text and "no such thing" in text
    assert "\n" not in text


def test_groups_that_say_nothing_move_nothing(
    base: Base, make_learner: MakeLearner, questions: list[Question]
) -> None:
    rewards = np.array([[0.5] * 4, [1.0] * 4])
    told = [[answer((5, 6, 7))] * 4, [answer((8, 9))] * 4]
    experience = Experience(
        questions=questions,
        answers=told,
        values={"iou": rewards},
        rewards_PG=rewards,
        advantages_PG=np.zeros((2, 4)),
    )
    updates = []

    def update() -> float:
        updates.append(1)
        return 0.0

    figures = make_learner().learn(experience, update)
    assert figures["frac_reward_zero_std"] == 1 and figures["loss"] == 0 and len(updates) == 1
    assert all(p.grad is None for p in base.model.parameters())
    assert (figures["reward"], figures["completions/mean_length"]) == (0.75, 2.5)


def test_truncated_answers_are_masked_but_judged(
    base: Base, make_learner: MakeLearner, questions: list[Question]
) -> None:
    """What a truncated answer says has no gradient; its reward still shifts its group's mean."""
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
    advantages = np.array([[0.75, -0.25, -0.25, -0.25]])

    def gradient(last: tuple[int, ...], truncated: bool, masked: bool) -> torch.Tensor:
        told = [[answer((5, 6)), answer((7, 8)), answer((9, 10)), answer(last, truncated)]]
        experience = Experience(
            questions=questions[:1],
            answers=told,
            values={"iou": rewards},
            rewards_PG=rewards,
            advantages_PG=advantages,
        )
        found: list[torch.Tensor] = []

        def update() -> float:
            weight = base.model.model.language_model.norm.weight
            assert weight.grad is not None
            found.append(weight.grad.clone())
            base.model.zero_grad(set_to_none=True)
            return 0.0

        make_learner({"mask_truncated_completions": masked}).learn(experience, update)
        return found[0]

    long, other = (11, 12, 13), (14, 15, 16)
    assert torch.equal(gradient(long, True, True), gradient(other, True, True))
    assert not torch.equal(gradient(long, True, False), gradient(other, True, False))


def test_iterations_learn_several_times_from_the_same_answers(
    base: Base, make_learner: MakeLearner, questions: list[Question], reward_for_e: None
) -> None:
    learner = make_learner({"num_iterations": 3}, rewards={"format": 1.0})
    experience = learner.collect(0, questions, 0.0)
    optimizer = torch.optim.SGD(base.model.parameters(), lr=3.0)
    updates = []

    def update() -> float:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updates.append(1)
        return 0.0

    figures = learner.learn(experience, update)
    assert len(updates) == 3
    assert figures["clip_ratio/region_mean"] > 0  # the policy left the one that answered


def test_it_learns_what_is_rewarded(
    base: Base, make_learner: MakeLearner, questions: list[Question], reward_for_e: None
) -> None:
    """A reward anyone can check: after a few steps most characters are an e."""
    learner = make_learner(rewards={"format": 1.0})
    optimizer = torch.optim.AdamW(base.model.parameters(), lr=3e-3)

    def update() -> float:
        norm = torch.nn.utils.clip_grad_norm_(base.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    rewards = []
    for step in range(14):
        experience = learner.collect(step, questions, 0.0)
        rewards.append(learner.learn(experience, update)["reward"])
    assert rewards[0] < 0.15
    assert np.mean(rewards[-3:]) > 0.4


def test_the_wanted_answer_is_one_more_of_its_group(
    base: Base, mixture: Mixture, make_learner: MakeLearner
) -> None:
    """Guided, a group of worthless answers learns the wanted one; alone it learns nothing."""
    chat = Chat(tokenizer=base.tokenizer, template=base.template)
    asked = []
    for sample in mixture.samples(0, 0, 1):
        whole = encode_sample(sample, chat, mixture.limits, base.coords)
        prompt = encode_sample(sample, chat, mixture.limits, base.coords, answered=False)
        asked.append(guided_question(whole, case_of(sample, whole.geometries)))
        np.testing.assert_array_equal(asked[-1].prompt.ids, prompt.ids)
        np.testing.assert_array_equal(asked[-1].prompt.positions, prompt.positions)
        assert asked[-1].truth[-1] in base.config.eos_token_ids
    weights = {"iou": 1.0, "yes_no": 1.0}
    alone = make_learner(rewards=weights).collect(0, asked, 0.0)
    assert alone.rewards_PG.max() == 0  # a random model finds nothing
    learner = make_learner(rewards=weights, guided=True)
    experience = learner.collect(0, asked, 0.0)
    assert [guide.ids for guide in experience.guides] == [one.truth for one in asked]
    # Four worth 0 and one worth 1: mean 0.2, spread sqrt(0.2); the box is rounded to a thousandth.
    np.testing.assert_allclose(experience.guide_advantages_P, 0.8 / 0.2**0.5, rtol=0.01)
    np.testing.assert_allclose(experience.advantages_PG, -0.2 / 0.2**0.5, rtol=0.01)
    optimizer = torch.optim.AdamW(base.model.parameters(), lr=3e-3)

    def update() -> float:
        norm = torch.nn.utils.clip_grad_norm_(base.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    figures = [learner.learn(learner.collect(step, asked, 0.0), update) for step in range(8)]
    assert figures[0]["reward"] == 0 and figures[0]["completions/mean_length"] > 4
    assert figures[-1]["reward"] > 0.3
