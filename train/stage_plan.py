"""What a stage is about to do, checked before weights are loaded: base, memory, data, rewards.

A mistake that would show after hours on many machines is one line here, after seconds on one.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import RecipeError, UsageError
from medmo_edge.evaluation.models import geometry_of
from medmo_edge.train.capacity import free_gib, require_fit
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.packing import Chat
from medmo_edge.train.parallel import Group
from medmo_edge.train.picture_files import hollow_frame
from medmo_edge.train.rewards import Case, case_of, require_applicable
from medmo_edge.train.stages import RlStage, Stage, StagedRecipe

CHECKPOINT, CARD = "checkpoint", "medmo_edge.json"
_JUDGED = 256  # samples that rewards are tried on before a reinforcement stage begins
# What may change when a stage is resumed; the loss curve stays the same without the first.
_FREE = ("tuning", "save_every", "sharding", "offload", "gradient_checkpointing")


@dataclass(frozen=True, eq=False, kw_only=True)  # no slots: the identity is kept
class Plan:
    """One stage with its samples. ``notes`` are what its checkpoint will say of it."""

    recipe: StagedRecipe
    stage: Stage
    mixture: Mixture
    memory_gib: float

    @cached_property
    def data(self) -> dict[str, str]:
        """sha256 of the files that the stage draws from."""
        return self.mixture.identity()

    @cached_property
    def identity(self) -> str:
        """Hash of all that may not change when the stage is resumed."""
        recipe = self.recipe
        stage = {name: value for name, value in asdict(self.stage).items() if name not in _FREE}
        values = [recipe.seed, recipe.precision, recipe.machine.devices, self.data, stage]
        model = [asdict(recipe.text), asdict(recipe.vision)]
        return hashlib.sha256(json.dumps([values, model], sort_keys=True).encode()).hexdigest()

    @property
    def notes(self) -> dict[str, Any]:
        """For the checkpoint's card."""
        return {
            "recipe": self.recipe.name,
            "stage": self.stage.name,
            "steps": self.mixture.steps,
            "recipe_sha256": self.identity,
            "data": self.data,
            "skipped_samples": len(self.mixture.skipped),
        }


def make_plans(
    recipe: StagedRecipe,
    stages: Sequence[Stage],
    start: Path,
    data: Path,
    group: Group,
    *,
    skip_broken: bool,
) -> list[Plan]:
    """The plans of ``stages``, the first of which starts from the checkpoint ``start``.

    Errors: CheckpointError for ``start``; RecipeError for sizes that differ from it, memory that
    does not suffice, a mixture or a reward that the data cannot serve; SampleError for the data.
    """
    with open_checkpoint(start) as opened:
        require_same_model(recipe, opened)
        chat, limits, coords = Chat.of(opened), opened.preprocessing, opened.coords
    memory = free_gib(group)
    plans = []
    for stage in stages:
        estimate = require_fit(recipe, stage, group, memory)
        mixture = Mixture(
            stage,
            recipe.seed,
            chat,
            limits,
            coords,
            folder=data,
            devices=recipe.machine.devices,
            skip_broken=skip_broken,
        )
        if isinstance(stage, RlStage):
            require_applicable(stage.rewards, _cases(mixture))
        needed = estimate.memory.device
        plans.append(Plan(recipe=recipe, stage=stage, mixture=mixture, memory_gib=needed))
    return plans


def require_same_model(recipe: StagedRecipe, opened: Checkpoint) -> None:
    """Errors: RecipeError naming the first size of the recipe that the checkpoint has otherwise."""
    parts = (
        ("text", recipe.model.text, opened.config.text),
        ("vision", recipe.model.vision, opened.config.vision),
    )
    for part, planned, found in parts:
        theirs = asdict(found)
        for name, value in asdict(planned).items():
            if value != theirs[name]:
                raise RecipeError(
                    f"recipe {recipe.name} is for a model with {part} {name} {value}, and "
                    f"{opened.path} has {theirs[name]}: take its own recipe or another --base"
                )


def _cases(mixture: Mixture) -> Iterator[Case]:
    """The first samples of a mixture as rewards see them, without a completion."""
    count = 0
    for step in range(mixture.steps):
        for sample in mixture.samples(step, 0, 1):
            frames = [hollow_frame(image) for image in sample.images]
            geometries = [geometry_of(frame, mixture.limits) for frame in frames]
            yield case_of(sample, geometries)
            count += 1
        if count >= _JUDGED:
            return


def is_done(checkpoint: Path, identity: str) -> bool:
    """Whether ``checkpoint`` is the result of the stage whose hash is ``identity``."""
    try:
        card = json.loads((checkpoint / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(card.get("training", {}).get("recipe_sha256") == identity)


def checkpoint_before(stages: Sequence[str], stage: str, output: Path) -> Path | None:
    """The checkpoint in ``output`` of the stage before ``stage``; None for the first of ``stages``.

    Errors: UsageError when it does not exist.
    """
    index = stages.index(stage)
    if index == 0:
        return None
    folder = output / stages[index - 1] / CHECKPOINT
    if not folder.is_dir():
        raise UsageError(
            f"stage {stage!r} starts from {folder}, which does not exist: train the stage before "
            "it, or name a checkpoint with --base"
        )
    return folder


def require_place(output: Path, stages: Sequence[Stage], *, resume: bool) -> None:
    """Errors: UsageError when one of the stages' folders is in use and nobody said to go on."""
    for stage in stages:
        folder = output / stage.name
        if not resume and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(
                f"{folder} is not empty: choose another folder, or go on with --resume"
            )
