"""Options of the ``build`` command; the work is in ``medmo_edge.build``, loaded when it runs."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of engines [ARTIFACT/engines]."
)
@click.option("--check", is_flag=True, help="Compile two layers with tensorrt-rtx; keep nothing.")
@click.option("--sm", "sms", type=int, multiple=True, help="GPU to compile for, e.g. 89.")
@click.option("--rtx", is_flag=True, help="Build with tensorrt-rtx, also where tensorrt is.")
@click.option(
    "--level", type=click.IntRange(0, 5), default=3, show_default=True, help="TensorRT's effort."
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(**options: Any) -> None:
    """Build TensorRT engines of ARTIFACT for the GPU that is here.

    ARTIFACT is a trt-* target. Once on every machine that runs it. --check --sm 89 needs no GPU.
    """
    from medmo_edge.build import run_build

    run_build(**options)
