"""The stages of a recipe from nothing as things that learn: from answers, or from rewards.

``run`` gives them their steps. Both draw what a step needs from the step's number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from medmo_edge.boxes import Coords
from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.preprocess import Preprocessing
from medmo_edge.train.architecture import build_model, load_weights
from medmo_edge.train.asked import Asked, Shares, draw, with_yes_or_no
from medmo_edge.train.attention import use_products
from medmo_edge.train.auxiliary import Targets, build_head
from medmo_edge.train.collator import Batch
from medmo_edge.train.grpo_learner import Learner, Question, decoding_of, question_of
from medmo_edge.train.loop import Sampler, Trainer, build_optimizer, learning_rate
from medmo_edge.train.packing import Chat
from medmo_edge.train.parallel import Group, arithmetic
from medmo_edge.train.recipe import Recipe
from medmo_edge.train.reinforcement import Reinforcement
from medmo_edge.train.scenes import Scene
from medmo_edge.train.supervised import update
from medmo_edge.train.vocabulary import special_ids
from medmo_edge.train.writer import processing

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


class Learning(Protocol):
    """A stage that learns. ``model`` answers, ``module`` holds all that ``optimizer`` moves."""

    model: Any
    optimizer: "torch.optim.Optimizer"
    limits: Preprocessing

    @property
    def module(self) -> "torch.nn.Module":
        """What is saved between steps."""

    def draw(self, step: int) -> Any:
        """What ``step`` learns from, the same on every call."""

    def learn(self, step: int, drawn: Any) -> dict[str, float]:
        """One step; gives its figures. Errors: Diverged before a weight moves."""


@dataclass(slots=True, kw_only=True)
class Taught:
    """Learns from right answers, and from where things are; see ``Learning``."""

    sampler: Sampler
    trainer: Trainer
    model: Any
    optimizer: "torch.optim.Optimizer"
    limits: Preprocessing

    @property
    def module(self) -> "torch.nn.Module":
        """Model and dense head."""
        import torch

        return torch.nn.ModuleDict({"model": self.model, "head": self.trainer.head})

    def draw(self, step: int) -> tuple[Batch, list[Targets]]:
        """Rows with their dense targets."""
        return self.sampler.batch(step)

    def learn(self, step: int, drawn: tuple[Batch, list[Targets]]) -> dict[str, float]:
        """Losses and gradient norm."""
        return self.trainer.step(step, *drawn)


def taught(
    recipe: Recipe,
    tokenizer: "Tokenizer",
    blood: Sequence[Scene],
    radiology: Sequence[Scene],
    start: Path | None,
) -> Taught:
    """A supervised stage of ``recipe``, from the weights of ``start`` or from nothing.

    Errors: CheckpointError when ``start`` is damaged or of other sizes.
    """
    ids = special_ids(tokenizer)
    model = build_model(recipe, ids)
    if start is not None:
        load_weights(model, start)
    head = build_head(recipe.text.hidden_size, recipe.seed)
    optimizer = build_optimizer([model, head], recipe)
    return Taught(
        sampler=Sampler(
            recipe=recipe, blood=blood, radiology=radiology, tokenizer=tokenizer, ids=ids
        ),
        trainer=Trainer(model=model, head=head, optimizer=optimizer, recipe=recipe),
        model=model,
        optimizer=optimizer,
        limits=processing(recipe.phases[-1]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Turns scenes into questions as the checkpoint that a stage starts from reads them."""

    chat: Chat
    limits: Preprocessing
    coords: Coords

    def question(self, asked: Asked) -> Question:
        """Prompt, truth and wanted answer of a sample."""
        sample, frames = asked.sample, [asked.frame]
        return question_of(sample, self.chat, self.limits, self.coords, guided=True, frames=frames)


@dataclass(slots=True, kw_only=True)
class Rewarded:
    """Learns from its own answers by GRPO; see ``Learning``."""

    recipe: Recipe
    spec: Reinforcement
    smears: Sequence[Scene]
    radiology: Sequence[Scene]
    asking: Asking
    learner: Learner
    model: Any
    optimizer: "torch.optim.Optimizer"
    limits: Preprocessing

    @property
    def module(self) -> "torch.nn.Module":
        """The model."""
        module: torch.nn.Module = self.model
        return module

    def draw(self, step: int) -> list[Question]:
        """Questions about scenes."""
        spec, shares = self.spec, shares_of(self.spec)
        streams = (np.random.default_rng([self.recipe.seed, step, i]) for i in range(spec.prompts))
        drawn = [draw(self.smears, self.radiology, shares, rng) for rng in streams]
        return [self.asking.question(asked) for asked in drawn]

    def learn(self, step: int, drawn: list[Question]) -> dict[str, float]:
        """Answer, judge and learn; the figures have TRL's names."""
        rate = learning_rate(step, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        threshold = self.spec.curriculum.threshold(step / self.spec.steps)
        experience = self.learner.collect(step, drawn, threshold)
        move = partial(update, self.optimizer, self.recipe.optimizer.clip_norm)
        return {**self.learner.learn(experience, move), "learning_rate": rate}


def shares_of(spec: Reinforcement) -> Shares:
    """How the questions of an rl stage are shared out."""
    return Shares(
        blood=spec.blood_share,
        radiology=spec.radiology_share,
        located=spec.located,
        present=spec.present,
    )


def rewarded(
    recipe: Recipe,
    tokenizer: "Tokenizer",
    smears: Sequence[Scene],
    radiology: Sequence[Scene],
    start: Path,
) -> Rewarded:
    """The rl stage of ``recipe`` from the checkpoint ``start``, to which beta > 0 holds it.

    Errors: CheckpointError when it is damaged or of other sizes.
    """
    assert recipe.rl is not None
    ids = special_ids(tokenizer)
    model = build_model(recipe, ids)
    load_weights(model, start)
    reference: Any = None
    if recipe.rl.objective.beta > 0:
        reference = build_model(recipe, ids).requires_grad_(False).train(False)
        load_weights(reference, start)
        use_products(reference)
    with open_checkpoint(start) as opened:
        asking = Asking(chat=Chat.of(opened), limits=opened.preprocessing, coords=opened.coords)
        decoding = decoding_of(opened.config, asking.chat.tokenizer.length, recipe.rl.rollouts)
    learner = Learner(
        model=model,
        objective=recipe.rl.objective,
        rewards=recipe.rl.rewards,
        decoding=decoding,
        decode=asking.chat.tokenizer.decode,
        seed=recipe.seed,
        row_tokens=recipe.rl.row_tokens,
        batch_tokens=2 * recipe.rl.row_tokens,
        reference=reference,
        precision=partial(arithmetic, model, Group(), "bfloat16"),
        guided=recipe.rl.rollouts.guided,
    )
    return Rewarded(
        recipe=recipe,
        spec=recipe.rl,
        smears=smears,
        radiology=with_yes_or_no(radiology),
        asking=asking,
        learner=learner,
        model=model,
        optimizer=build_optimizer([model], recipe),
        limits=asking.limits,
    )
