"""Run a recipe that starts from nothing, stage by stage, or go on where it stopped.

The output folder holds a folder per stage, as for recipes that start from a checkpoint
(``stage_run``): ``step-*`` (resumable), metrics.jsonl, curves.png, TensorBoard's files and
``checkpoint``. One process, one machine.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.errors import UsageError
from medmo_edge.train.attention import use_library, use_products
from medmo_edge.train.blood import read_blood
from medmo_edge.train.collator import see
from medmo_edge.train.parallel import Group
from medmo_edge.train.prefetch import ahead
from medmo_edge.train.questions import sample_turns
from medmo_edge.train.radiology import read_radiology
from medmo_edge.train.recipe import Recipe, load_recipe
from medmo_edge.train.scene_stages import Learning, rewarded, taught
from medmo_edge.train.scenes import Scene, chest_scene
from medmo_edge.train.stage_plan import CHECKPOINT, checkpoint_before, is_done
from medmo_edge.train.steps import StepLoop
from medmo_edge.train.vocabulary import read_tokenizer, special_ids, train_tokenizer
from medmo_edge.train.watch import Asker, look
from medmo_edge.train.writer import COORDS, processing, write_checkpoint

HELD_OUT_SEED = 1_000_000  # phantoms from here on are never trained on
CORPUS = 3000  # scenes whose questions and answers the tokenizer is trained on


def train(
    recipe_name: str | Path,
    output: Path,
    *,
    resume: bool = False,
    data: Path | None = None,
    stage: str | None = None,
    base: Path | None = None,
) -> Path:
    """Train a packaged recipe ("nano", "smoke") or a TOML file; gives the last checkpoint's folder.

    ``data`` holds ``bccd/`` and ``vqa-rad/`` (default: environment variable MEDMO_EDGE_DATA).
    ``stage`` trains one stage alone, a later one from the checkpoint ``base`` (default: that of the
    stage before it in ``output``). Ctrl-C finishes and saves the step, then raises
    KeyboardInterrupt. Errors: RecipeError (also when a loss is not finite), SampleError,
    CheckpointError, and UsageError when the disk is full, or ``output`` is not empty and neither
    ``resume`` nor a later ``stage`` asked for.
    """
    import torch

    recipe = load_recipe(recipe_name)
    stages = _chosen(recipe, stage)
    target = output if stage is None else output / stage
    if not resume and target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty: choose another folder, or go on with --resume")
    start = base or checkpoint_before(recipe.stages, stages[0], output)
    pictures = _read_data(recipe, stages, data)
    torch.set_num_threads(recipe.threads)
    for name in stages:
        one, folder = recipe.only(name), output / name
        if not is_done(folder / CHECKPOINT, one.sha256):
            _train_stage(one, folder, pictures, start)
        start = folder / CHECKPOINT
    return output / stages[-1] / CHECKPOINT


def _chosen(recipe: Recipe, stage: str | None) -> tuple[str, ...]:
    if stage is not None and stage not in recipe.stages:
        known = ", ".join(recipe.stages)
        raise UsageError(f"recipe {recipe.name} has no stage {stage!r}: it has {known}")
    return recipe.stages if stage is None else (stage,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Real pictures of a run: those to learn from, and those only looked at."""

    blood: list[Scene]
    radiology: list[Scene]
    blood_held_out: list[Scene]
    radiology_held_out: list[Scene]


def _read_data(recipe: Recipe, stages: Sequence[str], data: Path | None) -> Pictures:
    """What the stages draw from; nothing is read that none of them wants."""
    phases = [phase for phase in recipe.phases if phase.stage in stages]
    shares = [(phase.blood_share, phase.radiology_share) for phase in phases]
    if recipe.rl is not None and "rl" in stages:
        shares.append((recipe.rl.blood_share, recipe.rl.radiology_share))
    wants_blood, wants_radiology = (any(share[i] for share in shares) for i in (0, 1))
    if not wants_blood and not wants_radiology:
        return Pictures(blood=[], radiology=[], blood_held_out=[], radiology_held_out=[])
    if data is None and "MEDMO_EDGE_DATA" not in os.environ:
        names = " and ".join(["bccd/"] * wants_blood + ["vqa-rad/"] * wants_radiology)
        raise UsageError(
            f"recipe {recipe.name} needs pictures: set MEDMO_EDGE_DATA or --data to the folder "
            f"that holds {names}"
        )
    folder = data or Path(os.environ["MEDMO_EDGE_DATA"])
    return Pictures(
        blood=read_blood(folder, "train") if wants_blood else [],
        radiology=read_radiology(folder, "train") if wants_radiology else [],
        blood_held_out=read_blood(folder, "val") if wants_blood else [],
        radiology_held_out=read_radiology(folder, "val") if wants_radiology else [],
    )


def _train_stage(recipe: Recipe, folder: Path, pictures: Pictures, start: Path | None) -> None:
    """Train the one stage of ``recipe`` and write its checkpoint."""
    if start is None:
        tokenizer = train_tokenizer(corpus(recipe, pictures.blood), recipe.tokenizer.bpe_size)
    else:
        tokenizer = read_tokenizer(start, recipe.tokenizer.vocab_size)
    learning: Learning
    if recipe.rl is not None and start is not None:
        learning = rewarded(recipe, tokenizer, pictures.blood, pictures.radiology, start)
    else:
        learning = taught(recipe, tokenizer, pictures.blood, pictures.radiology, start)
    (stage,) = recipe.stages
    loop = StepLoop(
        name=f"{recipe.name} {stage}",
        folder=folder,
        group=Group(),
        model=learning.module,
        optimizer=learning.optimizer,
        total=recipe.num_steps,
        save_every=recipe.rhythm.save_every,
        identity=recipe.sha256,
        seed=recipe.seed,
    )
    loop.resume()
    watch = Watch(
        recipe=recipe,
        asker=Asker(learning.model, tokenizer, special_ids(tokenizer), learning.limits),
        pictures=pictures,
    )
    _run(learning, loop, watch)
    notes = {"stage": stage, "steps": recipe.num_steps, "recipe_sha256": recipe.sha256}
    weights = learning.model.state_dict()
    write_checkpoint(weights, recipe, tokenizer, learning.limits, folder / CHECKPOINT, notes)


def _run(learning: Learning, loop: StepLoop, watch: "Watch") -> None:
    """Do the steps that are left; each is drawn while the one before it is learned from."""
    learning.model.train()
    use_products(learning.model)
    rows: Any = ahead(learning.draw, range(loop.step, loop.total), 1)
    with closing(rows):
        loop.run(lambda step: learning.learn(step, next(rows)) | watch.figures(step))


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Looks at held-out pictures in the recipe's rhythm and after the last step, for the log."""

    recipe: Recipe
    asker: Asker
    pictures: Pictures

    def figures(self, step: int) -> dict[str, float]:
        """What is seen after ``step``; nothing when it is not yet time."""
        done, rhythm = step + 1, self.recipe.rhythm
        if done % rhythm.evaluate_every and done != self.recipe.num_steps:
            return {}
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + rhythm.evaluation_phantoms)
        chests = [chest_scene(seed, (320, 320)) for seed in seeds]
        use_library(self.asker.model)
        try:
            radiology = self.pictures.radiology_held_out
            return look(self.asker, self.pictures.blood_held_out, chests, radiology)
        finally:
            use_products(self.asker.model)


def corpus(recipe: Recipe, blood: list[Scene]) -> Iterator[str]:
    """Questions and answers of random scenes: all that the tokenizer ever reads."""
    limits = processing(recipe.phases[-1])
    chests = [chest_scene(seed) for seed in range(min(64, recipe.data.phantoms))]
    scenes = [(scene, see(scene.pixels, limits).geometry) for scene in [*chests, *blood]]
    for index in range(CORPUS):
        rng = np.random.default_rng([recipe.seed, index])
        scene, geometry = scenes[int(rng.integers(len(scenes)))]
        for turn in sample_turns(scene, geometry, COORDS, rng):
            yield turn.question
            yield turn.answer
