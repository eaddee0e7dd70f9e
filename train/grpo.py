"""The reinforcement stage of a recipe in our own loop: questions in, steps of the learner, figures.

It stands in the same loop as supervised stages (``steps``), so it is saved, resumed and stopped as
they are, on as many processes. What a step does is in ``grpo_learner``; the same stage in TRL's
trainer, for answers written by vLLM, is ``grpo_trl``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import RecipeError, SampleError
from medmo_edge.samples import Sample
from medmo_edge.train.base_model import Base, load_base
from medmo_edge.train.grpo_learner import CHUNK, Learner, Question, decoding_of, question_of
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.parallel import Group, arithmetic
from medmo_edge.train.stages import RlStage, StagedRecipe
from medmo_edge.train.steps import StepLoop
from medmo_edge.train.supervised import set_rates, update

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, kw_only=True)
class Reinforced:
    """Learns from its own answers to the questions of one step after the other."""

    base: Base
    stage: RlStage
    mixture: Mixture
    learner: Learner
    optimizer: "torch.optim.Optimizer"
    total: int
    group: Group

    def learn(self, step: int) -> dict[str, float]:
        """One step; gives its figures over all processes, under TRL's names.

        Errors: Diverged before weights move, SampleError for a reward that fails or a prompt that
        is too long, RecipeError when there is nothing to ask.
        """
        rate = set_rates(self.optimizer, step, self.total, self.stage.tuning)
        threshold = self.stage.curriculum.threshold(step / self.total)
        experience = self.learner.collect(step, self._questions(step), threshold)
        move = partial(update, self.optimizer, self.stage.tuning.clip_norm)
        own = self.learner.learn(experience, move)
        found = shared(own, self.learner.names(), self.group)
        tokens = sum(len(answer.ids) for group in experience.answers for answer in group)
        found["answer_tokens"] = self.group.total([float(tokens)])[0]
        return {**found, "learning_rate": rate}

    def _questions(self, step: int) -> list[Question]:
        """As many in every process: a sharded model is called by all of them or by none."""
        wanted = math.ceil(self.mixture.batch / self.group.world)
        samples = self.mixture.samples(step, self.group.rank, self.group.world)
        if not samples:
            raise RecipeError(
                f"stage {self.stage.name!r}, step {step}: no sample is left to ask for one of "
                f"{self.group.world} processes: raise rows, or use fewer processes"
            )
        questions = [self.question(sample) for sample in samples]
        return questions + [questions[-1]] * (wanted - len(questions))

    def question(self, sample: Sample) -> Question:
        """The prompt of a sample and its truth. Errors: SampleError when it is too long."""
        base, limit = self.base, self.stage.rollouts.max_prompt_tokens
        guided = self.learner.guided
        found = question_of(sample, base.chat, self.mixture.limits, base.coords, guided=guided)
        if found.prompt.tokens > limit:
            raise SampleError(
                f"sample {sample.id!r} needs {found.prompt.tokens} prompt tokens, "
                f"max_prompt_tokens is {limit}: raise it or lower max_pixels in the recipe"
            )
        return found


def run_rl(
    base: Base,
    stage: RlStage,
    mixture: Mixture,
    folder: Path,
    *,
    recipe: StagedRecipe,
    call: Any,
    optimizer: "torch.optim.Optimizer",
    loop: StepLoop,
    group: Group,
) -> None:
    """Do what is left of a reinforcement stage; ``loop`` saves, logs and stops.

    ``call`` is ``base.model`` as it is spread over the processes. With beta > 0 the checkpoint that
    the stage starts from is loaded once more, as the frozen reference. Errors: see ``learn``.
    """
    learner = Learner(
        model=call,
        objective=stage.objective,
        rewards=stage.rewards,
        decoding=decoding_of(base.config, base.tokenizer.length, stage.rollouts),
        decode=base.tokenizer.decode,
        seed=recipe.seed,
        row_tokens=stage.row_tokens,
        batch_tokens=stage.row_tokens,
        chunk=min(CHUNK, math.ceil(mixture.batch / group.world)),
        reference=_frozen(base) if stage.objective.beta > 0 else None,
        precision=partial(arithmetic, call, group, recipe.precision),
        rank=group.rank,
        processes=group.world,
        guided=stage.rollouts.guided,
    )
    reinforced = Reinforced(
        base=base,
        stage=stage,
        mixture=mixture,
        learner=learner,
        optimizer=optimizer,
        total=loop.total,
        group=group,
    )
    loop.run(reinforced.learn)


def _frozen(base: Base) -> Any:
    model = load_base(base.path, precision=base.precision, device=base.device).model
    return model.requires_grad_(False).train(False)


def shared(own: Mapping[str, float], names: tuple[str, ...], group: Group) -> dict[str, float]:
    """The mean of each figure over the processes that have it; what none has is left out."""
    values = [own.get(name, 0.0) for name in names]
    counts = [float(name in own) for name in names]
    summed = group.total([*values, *counts])
    pairs = zip(names, summed[: len(names)], summed[len(names) :], strict=True)
    return {name: value / count for name, value, count in pairs if count}
