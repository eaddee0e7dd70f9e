"""A progress bar for training steps with the losses; silent when stderr is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def step_bar(done: int, total: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Give a callback (steps done, losses by name) that draws the bar."""
    if not sys.stderr.isatty():
        yield lambda step, losses: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done)

        def show(step: int, losses: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            bar.update(task, completed=step, description=text)

        yield show
