"""What ``medmo-edge eval`` does: one run, a comparison of two, or a probe of the coordinates.

Options are checked here and results printed here; everything else is elsewhere.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from medmo_edge.errors import UsageError
from medmo_edge.evaluation import probe_coords as probes
from medmo_edge.evaluation.compare import compare_runs, format_comparison
from medmo_edge.evaluation.evaluate import EvalOptions, evaluate
from medmo_edge.evaluation.predictions import Progress
from medmo_edge.evaluation.summary import NAMES


def run_eval(
    *,
    model: str | None,
    benchmark: str | None,
    compare: tuple[Path, Path] | None,
    probe_coords: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Print what was asked for. Errors: UsageError for options that do not go together."""
    if compare:
        if model or benchmark:
            raise UsageError("--compare takes two output folders and neither MODEL nor --benchmark")
        _print(compare_runs(*compare), format_comparison, as_json)
        return
    if model is None or benchmark is None:
        raise UsageError("give MODEL and --benchmark, or --compare with two output folders")
    chosen = EvalOptions(model=model, benchmark=benchmark, **options)
    with _bar(benchmark) as progress:
        if probe_coords:
            _print(_probe(chosen, progress), probes.format_probe, as_json)
            return
        run = evaluate(chosen, progress)
    _print(run.result, format_result, as_json)
    if chosen.output and not as_json:
        click.echo(f"  report: {chosen.output / 'report.html'}")


def _probe(options: EvalOptions, progress: Progress) -> dict[str, Any]:
    if options.output:
        raise UsageError("--probe-coords writes nothing: leave out -o")
    return probes.probe_coords(options, progress)


def _print(result: dict[str, Any], words: Any, as_json: bool) -> None:
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else words(result))


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    """A bar with the time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        "{task.description}",
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def format_result(result: dict[str, Any]) -> str:
    """The figures for a terminal: the headline, what it is compared with, the breakdowns."""
    metric = result["metric"]
    lines = [
        f"{result['benchmark']}: {_words(metric)} {_figure(result, metric)}"
        f"  ({result['num_samples']} samples, {result['num_questions']} questions)",
        f"  baseline {_number(result['baseline'])} ({_short(result['baseline_answer'])})",
        f"  answers that could be read {_number(result['parse_rate'])}"
        + (f", errors {result['num_errors']}" if result["num_errors"] else ""),
    ]
    for name in NAMES:
        if name != metric and name in result:
            low, high = result[f"{name}_interval"]
            value = f"{_number(result[name])} [{_number(low)}, {_number(high)}]"
            lines.append(
                f"  {_words(name)} {value}, baseline {_number(result[f'{name}_baseline'])}"
            )
    for name, value in result["figures"].items():
        if not isinstance(value, dict):
            lines.append(f"  {_words(name)} {_number(value)}")
    for key, values in result["groups"].items():
        if len(values) <= 12:
            lines += [f"  by {key}: {_group_line(value, found)}" for value, found in values.items()]
    return "\n".join(lines)


def _group_line(name: str, found: dict[str, Any]) -> str:
    metric = found["metric"]
    return f"{name}: {_words(metric)} {_figure(found, metric)}, {found['num_questions']} questions"


def _figure(values: dict[str, Any], metric: str) -> str:
    low, high = values.get("interval") or (None, None)
    return f"{_number(values.get(metric))} [{_number(low)}, {_number(high)}]"


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _words(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
