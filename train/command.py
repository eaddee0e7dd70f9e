"""What ``medmo-edge train`` does with its options: plan, or run. The work is elsewhere."""

import json
import os
from pathlib import Path

import click

from medmo_edge.errors import UsageError
from medmo_edge.train.dry_run import dry_run, format_plan
from medmo_edge.train.recipe import is_staged, read_document


def run_train(
    recipe: str,
    output: Path | None,
    data: Path | None,
    base: Path | None,
    resume: bool,
    skip_broken: bool,
    stage: str | None,
    plan_only: bool,
    as_json: bool,
) -> None:
    """Print the plan of a recipe, or train it and print where the checkpoint is.

    Under torchrun only the first process prints. Errors: RecipeError and others for what cannot
    be trained here, UsageError without an output.
    """
    if plan_only:
        plan = dry_run(recipe, stage)
        click.echo(json.dumps(plan, indent=2) if as_json else format_plan(plan))
        return
    if output is None:
        raise UsageError("a training run needs a new folder: give it with -o")
    if is_staged(read_document(recipe)):
        from medmo_edge.train.stage_run import run_stages

        checkpoint = run_stages(
            recipe,
            output,
            stage=stage,
            data=data,
            base=base,
            resume=resume,
            skip_broken=skip_broken,
        )
    else:
        from medmo_edge.train.run import train

        checkpoint = train(recipe, output, data=data, resume=resume, stage=stage, base=base)
    if os.environ.get("RANK", "0") == "0":
        text = json.dumps({"checkpoint": str(checkpoint)})
        click.echo(text if as_json else f"checkpoint: {checkpoint}")
