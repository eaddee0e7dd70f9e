"""What ``medmo-edge train`` does with its options: plan, refuse, or run. The work is elsewhere."""

import json
from pathlib import Path

import click

from medmo_edge.errors import RecipeError, UsageError
from medmo_edge.train.dry_run import dry_run, format_plan
from medmo_edge.train.recipe import is_staged, load_recipe, read_document
from medmo_edge.train.stages import read_stages


def run_train(
    recipe: str,
    output: Path | None,
    data: Path | None,
    resume: bool,
    stage: str | None,
    plan_only: bool,
    as_json: bool,
) -> None:
    """Print the plan of a recipe, or train it and print where the checkpoint is.

    Errors: RecipeError for a recipe or stage that cannot be trained here, UsageError without an
    output.
    """
    if plan_only:
        plan = dry_run(recipe, stage)
        click.echo(json.dumps(plan, indent=2) if as_json else format_plan(plan))
        return
    refuse_stages(recipe, stage)
    if output is None:
        raise UsageError("a training run needs a new folder: give it with -o")
    from medmo_edge.train.run import train

    checkpoint = train(recipe, output, data=data, resume=resume)
    click.echo(
        json.dumps({"checkpoint": str(checkpoint)}) if as_json else f"checkpoint: {checkpoint}"
    )


def refuse_stages(recipe: str, stage: str | None) -> None:
    """Say which stage cannot be run here, and why. Errors: RecipeError, UsageError."""
    document = read_document(recipe)
    if not is_staged(document):
        name = load_recipe(recipe).name
        if stage is not None:
            raise UsageError(f"recipe {name} has no stages: leave --stage out")
        return
    stages = [one for one in read_stages(document).stages if stage in (None, one.name, one.kind)]
    if not stages:
        raise UsageError(f"recipe {recipe} has no stage {stage!r}: see it with --dry-run")
    first = stages[0]
    what = (
        "reinforcement learning is not part of this version"
        if first.kind == "rl"
        else "this version trains from nothing only (nano, smoke)"
    )
    raise RecipeError(
        f"recipe {recipe}: stage {first.name!r} ({first.kind}) cannot be run yet: {what}; see what "
        "it needs with --dry-run"
    )
