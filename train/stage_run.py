"""Run a recipe of stages: each from the checkpoint of the one before, in a folder of its own.

OUT/STAGE/ holds ``step-*`` (resumable), ``metrics.jsonl``, ``tensorboard/``, ``curves.png`` and at
the end ``checkpoint/``, whole; with LoRA the ``adapter/`` lies beside it. What can be known to be
wrong is refused before (``stage_plan``). Recipes that start from nothing have a run of their own
(``run``).
"""

import gc
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.checkpoint import NANO
from medmo_edge.errors import UsageError
from medmo_edge.train.base_model import Base, load_base, save_checkpoint, set_trainable
from medmo_edge.train.capacity import uses_vllm
from medmo_edge.train.folders import replaced, write_json
from medmo_edge.train.grpo import run_rl
from medmo_edge.train.grpo_trl import run_trl
from medmo_edge.train.lora import adapter_config, write_adapter
from medmo_edge.train.merge import merge_adapter
from medmo_edge.train.packed_attention import use_packed
from medmo_edge.train.parallel import Group, joined, spread, whole_weights
from medmo_edge.train.prefetch import ahead
from medmo_edge.train.recipe import read_document
from medmo_edge.train.stage_plan import (
    CARD,
    CHECKPOINT,
    Plan,
    checkpoint_before,
    is_done,
    make_plans,
    require_place,
)
from medmo_edge.train.stages import RlStage, Stage, StagedRecipe, read_stages
from medmo_edge.train.steps import StepLoop
from medmo_edge.train.supervised import Supervised, build_optimizer
from medmo_edge.train.vision_cache import keep_features

if TYPE_CHECKING:
    import torch

ADAPTER, FEATURES = "adapter", "vision-cache"
_DRAWN_AHEAD = 2  # steps whose rows are made while one is learned from


def run_stages(
    recipe_name: str | Path,
    output: Path,
    *,
    stage: str | None = None,
    data: Path | None = None,
    base: str | Path | None = None,
    resume: bool = False,
    skip_broken: bool = False,
    device: str | None = None,
) -> Path:
    """Train the stages of a recipe, or those of one name or kind; gives the last checkpoint.

    ``data`` holds the files that the stages name (default: the folder of the recipe). ``base`` is
    where the first of these stages starts (default: the checkpoint of the stage before it in
    ``output``, or the recipe's base). Under torchrun all processes call this alike. Ctrl-C saves,
    then raises KeyboardInterrupt. Errors: RecipeError, UsageError, CheckpointError, SampleError.
    """
    recipe = read_stages(read_document(recipe_name))
    chosen = _chosen(recipe, stage)
    start = Path(base) if base is not None else _start(recipe, chosen[0], output)
    folder = _data_folder(recipe_name, recipe, data)
    require_place(output, chosen, resume=resume)
    with joined(device) as group:
        plans = make_plans(recipe, chosen, start, folder, group, skip_broken=skip_broken)
        group.wait()  # nobody makes a folder while another still looks
        for plan in plans:
            checkpoint = output / plan.stage.name / CHECKPOINT
            if not is_done(checkpoint, plan.identity):
                train_stage(plan, start, output / plan.stage.name, group)
            start = checkpoint
    return start


def _chosen(recipe: StagedRecipe, wanted: str | None) -> list[Stage]:
    chosen = [one for one in recipe.stages if wanted in (None, one.name, one.kind)]
    if not chosen:
        names = ", ".join(one.name for one in recipe.stages)
        raise UsageError(f"recipe {recipe.name} has no stage {wanted!r}: it has {names}")
    return chosen


def _data_folder(name: str | Path, recipe: StagedRecipe, data: Path | None) -> Path:
    if data is not None:
        return data
    if not Path(name).is_file():  # packaged
        files = ", ".join(dict.fromkeys(one.path for s in recipe.stages for one in s.data))
        raise UsageError(f"recipe {recipe.name} reads {files}: give their folder with --data")
    return Path(name).parent


def _start(recipe: StagedRecipe, first: Stage, output: Path) -> Path:
    """Where the first of the chosen stages starts when nothing is said of it."""
    before = checkpoint_before([one.name for one in recipe.stages], first.name, output)
    if before is not None:
        return before
    if recipe.base != NANO and not Path(recipe.base).is_dir():
        raise UsageError(
            f"recipe {recipe.name} starts from {recipe.base}, which is no folder here: nothing is "
            "downloaded, name your copy with --base"
        )
    return Path(recipe.base)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A stage that is ready to learn. ``call`` is the model as it is spread over processes.

    ``base.model`` is the same model unwrapped; ``loop`` stands where the stage begins or goes on.
    """

    plan: Plan
    base: Base
    call: Any
    optimizer: "torch.optim.Optimizer"
    loop: StepLoop
    group: Group


def train_stage(plan: Plan, start: Path, folder: Path, group: Group) -> None:
    """Train one stage from the checkpoint ``start`` and write its own."""
    if isinstance(plan.stage, RlStage) and uses_vllm(plan.stage):
        _reinforce_in_trl(plan, plan.stage, start, folder)
        return
    prepared = prepare(plan, start, folder, group)
    if group.leads:
        _say_begin(prepared)
    if isinstance(plan.stage, RlStage):
        _reinforce(prepared, plan.stage)
    else:
        _supervise(prepared)
    _write(prepared, start, folder)
    del prepared
    _free_memory()


def prepare(plan: Plan, start: Path, folder: Path, group: Group) -> Prepared:
    """Load, choose what learns, spread over the processes, and go back to the newest step."""
    import torch

    recipe, stage = plan.recipe, plan.stage
    base = replace(load_base(start, precision=recipe.precision), device=group.device)
    torch.manual_seed(recipe.seed)  # adapters begin at random, alike in every process
    set_trainable(base, stage.trainable, stage.lora_rank)
    kept = folder.parent / FEATURES
    keep_features(plan.mixture, stage, base.model, kept, group, recipe.precision)
    call = spread(base.model, stage, group, recipe.precision)
    base.model.train()
    optimizer = build_optimizer(base.model, stage.tuning)
    loop = StepLoop(
        name=f"{recipe.name} {stage.name}",
        folder=folder,
        group=group,
        model=base.model,
        optimizer=optimizer,
        total=plan.mixture.steps,
        save_every=stage.save_every,
        identity=plan.identity,
        seed=recipe.seed,
    )
    loop.resume()
    return Prepared(plan=plan, base=base, call=call, optimizer=optimizer, loop=loop, group=group)


def _say_begin(prepared: Prepared) -> None:
    loop, plan = prepared.loop, prepared.plan
    print(
        f"{loop.name}: steps {loop.step} to {loop.total} of {plan.mixture.batch} samples, about "
        f"{plan.memory_gib:.1f} GiB a device",
        file=sys.stderr,
    )


def _supervise(prepared: Prepared) -> None:
    plan, loop, group = prepared.plan, prepared.loop, prepared.group
    use_packed(prepared.base.model)
    steps = range(loop.step, loop.total)
    draw = partial(plan.mixture.rows, rank=group.rank, world=group.world)
    rows: Any = ahead(draw, steps, _DRAWN_AHEAD)
    with closing(rows):
        learner = Supervised(
            call=prepared.call,
            optimizer=prepared.optimizer,
            tuning=plan.stage.tuning,
            total=loop.total,
            group=group,
            precision=plan.recipe.precision,
            rows=rows,
        )
        loop.run(learner.learn)


def _reinforce(prepared: Prepared, stage: RlStage) -> None:
    plan = prepared.plan
    run_rl(
        prepared.base,
        stage,
        plan.mixture,
        prepared.loop.folder,
        recipe=plan.recipe,
        call=prepared.call,
        optimizer=prepared.optimizer,
        loop=prepared.loop,
        group=prepared.group,
    )


def _reinforce_in_trl(plan: Plan, stage: RlStage, start: Path, folder: Path) -> None:
    """Answers by vLLM: TRL's trainer, which saves, resumes and spreads in its own way."""
    run_trl(
        load_base(start, precision=plan.recipe.precision),
        stage,
        plan.mixture,
        folder,
        seed=plan.recipe.seed,
        notes=plan.notes,
        steps=plan.mixture.steps,
        resume=any(folder.glob("checkpoint-*")),
    )


def _write(prepared: Prepared, start: Path, folder: Path) -> None:
    """Write the result of a stage; all processes call it, and return when it is there."""
    plan, group = prepared.plan, prepared.group
    weights = whole_weights(prepared.base.model, group, only_learned=bool(plan.stage.lora_rank))
    if group.leads:
        notes = plan.notes
        if plan.stage.lora_rank:
            _write_adapter(plan, weights, start, folder / ADAPTER, notes)
            merge_adapter(folder / ADAPTER, folder / CHECKPOINT, base=start)
        else:
            named = replace(prepared.base, name=plan.recipe.name)
            save_checkpoint(named, folder / CHECKPOINT, notes, weights)
        _say_skipped(plan)
    group.wait()


def _write_adapter(
    plan: Plan,
    weights: "Mapping[str, torch.Tensor]",
    start: Path,
    folder: Path,
    notes: Mapping[str, Any],
) -> None:
    config = adapter_config(plan.stage.trainable, plan.stage.lora_rank, str(start.absolute()))
    with replaced(folder) as staging:
        write_adapter(weights, config, staging)
        write_json(staging / CARD, {"name": plan.recipe.name, "training": dict(notes)})


def _say_skipped(plan: Plan) -> None:
    for where, why in list(plan.mixture.skipped.items())[:10]:
        print(f"skipped {where}: {why.partition(': ')[2]}", file=sys.stderr)


def _free_memory() -> None:
    """The next stage loads its own model."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
