"""Run a recipe that starts from nothing, stage by stage, or go on where it stopped.

The output folder holds a folder per stage with ``step-*`` (resumable), ``log.jsonl`` (a line per
step and per look at held-out pictures) and ``checkpoint`` (written at every look and at the end).
One process, one machine.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.errors import UsageError
from medmo_edge.train.architecture import build_model, load_weights
from medmo_edge.train.attention import use_library, use_products
from medmo_edge.train.auxiliary import Targets, build_head
from medmo_edge.train.blood import read_blood
from medmo_edge.train.collator import Batch, see
from medmo_edge.train.interrupt import stop_requests
from medmo_edge.train.loop import Sampler, Trainer, build_optimizer
from medmo_edge.train.prefetch import ahead
from medmo_edge.train.questions import sample_turns
from medmo_edge.train.radiology import read_radiology
from medmo_edge.train.recipe import Phase, Recipe, load_recipe
from medmo_edge.train.scenes import Scene, chest_scene
from medmo_edge.train.state import load_step, save_step
from medmo_edge.train.steps_bar import step_bar
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
    KeyboardInterrupt. Errors: RecipeError, SampleError, CheckpointError, and UsageError when
    ``output`` is not empty and neither ``resume`` nor a later ``stage`` asked for.
    """
    import torch

    recipe = load_recipe(recipe_name)
    stages = _chosen(recipe, stage)
    target = output if stage is None else output / stage
    if not resume and target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty: choose another folder, or go on with --resume")
    start = base or _before(recipe, stages[0], output)
    wanted = [phase for phase in recipe.phases if phase.stage in stages]
    pictures = _read_data(recipe.name, wanted, data)
    torch.set_num_threads(recipe.threads)
    for name in stages:
        run = Run.prepare(recipe.only(name), output / name, pictures, start)
        run.go(run.recipe.num_steps)
        start = run.write()
    return output / stages[-1] / "checkpoint"


def _chosen(recipe: Recipe, stage: str | None) -> tuple[str, ...]:
    if stage is not None and stage not in recipe.stages:
        known = ", ".join(recipe.stages)
        raise UsageError(f"recipe {recipe.name} has no stage {stage!r}: it has {known}")
    return recipe.stages if stage is None else (stage,)


def _before(recipe: Recipe, stage: str, output: Path) -> Path | None:
    """The checkpoint that ``stage`` starts from; None for the first."""
    index = recipe.stages.index(stage)
    if index == 0:
        return None
    folder = output / recipe.stages[index - 1] / "checkpoint"
    if not folder.is_dir():
        raise UsageError(
            f"stage {stage} starts from {folder}, which does not exist: train the stage before it, "
            "or name a checkpoint with --base"
        )
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Real pictures of a run: those to learn from, and those only looked at."""

    blood: list[Scene]
    radiology: list[Scene]
    blood_held_out: list[Scene]
    radiology_held_out: list[Scene]


def _read_data(recipe: str, phases: Sequence[Phase], data: Path | None) -> Pictures:
    """What the phases draw from; nothing is read that none of them wants."""
    wants_blood = any(phase.blood_share for phase in phases)
    wants_radiology = any(phase.radiology_share for phase in phases)
    if not wants_blood and not wants_radiology:
        return Pictures(blood=[], radiology=[], blood_held_out=[], radiology_held_out=[])
    if data is None and "MEDMO_EDGE_DATA" not in os.environ:
        names = " and ".join(["bccd/"] * wants_blood + ["vqa-rad/"] * wants_radiology)
        raise UsageError(
            f"recipe {recipe} needs pictures: set MEDMO_EDGE_DATA or --data to the folder "
            f"that holds {names}"
        )
    folder = data or Path(os.environ["MEDMO_EDGE_DATA"])
    return Pictures(
        blood=read_blood(folder, "train") if wants_blood else [],
        radiology=read_radiology(folder, "train") if wants_radiology else [],
        blood_held_out=read_blood(folder, "val") if wants_blood else [],
        radiology_held_out=read_radiology(folder, "val") if wants_radiology else [],
    )


@dataclass(slots=True, kw_only=True)
class Run:
    """A run in progress: what exists between two steps. ``step`` steps are done."""

    recipe: Recipe
    output: Path
    sampler: Sampler
    trainer: Trainer
    pictures: Pictures
    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def prepare(cls, recipe: Recipe, output: Path, pictures: Pictures, base: Path | None) -> "Run":
        """A fresh run of a recipe's one stage, or the newest saved step of ``output``.

        ``base`` is the checkpoint whose weights and tokenizer it starts from, None for nothing.
        """
        if base is None:
            texts = corpus(recipe, pictures.blood)
            tokenizer = train_tokenizer(texts, recipe.tokenizer.bpe_size)
        else:
            tokenizer = read_tokenizer(base, recipe.tokenizer.vocab_size)
        ids = special_ids(tokenizer)
        model = build_model(recipe, ids)
        if base is not None:
            load_weights(model, base)
        head = build_head(recipe.text.hidden_size, recipe.seed)
        optimizer = build_optimizer([model, head], recipe)
        output.mkdir(parents=True, exist_ok=True)
        run = cls(
            recipe=recipe,
            output=output,
            sampler=Sampler(
                recipe=recipe,
                blood=pictures.blood,
                radiology=pictures.radiology,
                tokenizer=tokenizer,
                ids=ids,
            ),
            trainer=Trainer(model=model, head=head, optimizer=optimizer, recipe=recipe),
            pictures=pictures,
        )
        saved = load_step(output, recipe.sha256)
        if saved is not None:
            run.step = saved[0]
            run.trainer.restore(saved[1])
        return run

    def go(self, until: int) -> None:
        """Train until ``until`` steps are done, saving and looking in the recipe's rhythm."""
        rhythm = self.recipe.rhythm
        self.trainer.model.train()
        use_products(self.trainer.model)
        with stop_requests() as stop, step_bar(self.step, until) as show:
            for batch, dense in ahead(self.sampler.batch, range(self.step, until), 1):
                show(self.step, self._one_step(batch, dense))
                if stop.is_set() or self.step % rhythm.save_every == 0:
                    self.save()
                if stop.is_set():
                    raise KeyboardInterrupt(f"stopped at step {self.step}: go on with --resume")
                if self.step % rhythm.evaluate_every == 0:
                    self.look()
                    self.write()

    def _one_step(self, batch: Batch, dense: list[Targets]) -> dict[str, float]:
        started = time.perf_counter()
        losses = self.trainer.step(self.step, batch, dense)
        self.step += 1
        self._log(losses | {"seconds": time.perf_counter() - started})
        return losses

    def save(self) -> None:
        """Make this step resumable."""
        save_step(self.output, self.step, self.recipe.sha256, self.trainer.state())

    def look(self) -> None:
        """Score the held-out pictures, for the log only."""
        limits = processing(self.recipe.phase_at(self.step - 1))
        asker = Asker(self.trainer.model, self.sampler.tokenizer, self.sampler.ids, limits)
        count = self.recipe.rhythm.evaluation_phantoms
        chests = [chest_scene(HELD_OUT_SEED + i, (320, 320)) for i in range(count)]
        use_library(self.trainer.model)
        self.figures = look(
            asker, self.pictures.blood_held_out, chests, self.pictures.radiology_held_out
        )
        use_products(self.trainer.model)
        self._log(self.figures)

    def write(self) -> Path:
        """Write the weights as they are to ``checkpoint``."""
        folder = self.output / "checkpoint"
        write_checkpoint(
            self.trainer.model.state_dict(),
            self.recipe,
            self.sampler.tokenizer,
            processing(self.recipe.phase_at(self.step - 1)),
            folder,
            {
                "stage": self.recipe.stages[0],
                "step": self.step,
                "of": self.recipe.num_steps,
                "recipe_sha256": self.recipe.sha256,
            },
        )
        return folder

    def _log(self, values: dict[str, float]) -> None:
        entry: dict[str, Any] = {"step": self.step, "time": round(time.time(), 1)}
        entry |= {name: round(value, 5) for name, value in values.items()}
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


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
