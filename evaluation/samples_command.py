"""What ``medmo-edge samples`` prints around a conversion. The work is in ``convert``."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from medmo_edge.evaluation.convert import BrokenItems, Report, Wishes, convert
from medmo_edge.evaluation.splitting import parse_fractions
from medmo_edge.progress import counter

LISTED = 50  # lines on the terminal; --json has all


def run_samples(
    format_name: str,
    source: Path,
    output: Path,
    split: str | None,
    fractions: str | None,
    seed: int,
    per_image: bool,
    absent: bool,
    retrieval: int,
    skip_broken: bool,
    as_json: bool,
) -> None:
    """Convert, then say what was written, put right and left out.

    Broken items are listed on stderr, a line each, also when they end the conversion. Errors: those
    of ``convert``.
    """
    wishes = Wishes(
        split=split,
        fractions=parse_fractions(fractions) if fractions else {},
        seed=seed,
        by_label=not per_image,
        absent=absent,
        retrieval=retrieval,
        skip_broken=skip_broken,
    )
    try:
        with counter("items read") as progress:
            report = convert(format_name, source, output, wishes, progress=progress)
    except BrokenItems as error:
        if len(error.reasons) > 1:
            _list("broken", error.reasons)
        raise
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        return
    _list("put right", report.notes)
    _list("left out", report.broken)
    click.echo(_summary(report))


def _list(what: str, lines: Sequence[str]) -> None:
    for line in lines[:LISTED]:
        click.echo(f"{what}: {line}", err=True)
    if len(lines) > LISTED:
        click.echo(f"{what}: {len(lines) - LISTED} more (--json lists all)", err=True)


def _summary(report: Report) -> str:
    tasks = ", ".join(f"{count} {task}" for task, count in sorted(report.tasks.items()))
    files = ", ".join(f"{path} ({count})" for path, count in report.files.items())
    pictures = f", {report.images_written} pictures written" if report.images_written else ""
    left_out = f", {len(report.broken)} left out" if report.broken else ""
    return f"samples: {files}: {tasks}{pictures}{left_out}"
