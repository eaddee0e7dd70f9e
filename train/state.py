"""Saved steps of a run: atomic folders, so that a kill at any moment leaves a step that resumes.

``step-N`` is filled beside, synced, and renamed when everything, the file COMPLETE included, is in
it: a folder of that name is whole. What is in it is the loop's affair (``steps``). Random numbers
need no saving: whatever is drawn is drawn from its own step and place.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medmo_edge.errors import UsageError
from medmo_edge.staging import sync

MARK = "COMPLETE"
KEEP = 2  # the newest steps; older ones are removed

_NAME = re.compile(r"step-\d{6,}")


@contextmanager
def new_step(
    output: Path,
    step: int,
    mark: Mapping[str, Any],
    *,
    leads: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Give the folder to write into; it becomes ``step-N`` when the block ends without an error.

    In several processes all enter, one of them ``leads``, and ``wait`` returns when all have
    called it. ``mark`` is kept in COMPLETE. Errors: OSError; nothing is left behind then.
    """
    folder, staging = output / f"step-{step:06d}", output / f".step-{step:06d}.tmp"
    if leads:
        for left in output.glob(".step-*.tmp"):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(parents=True)
    wait()
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    wait()
    if leads:
        _finish(staging, folder, mark)
    wait()


def _finish(staging: Path, folder: Path, mark: Mapping[str, Any]) -> None:
    try:
        (staging / MARK).write_text(json.dumps(mark), encoding="utf-8")
        for path in staging.iterdir():
            sync(path)
        sync(staging)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for old in complete_steps(folder.parent)[:-KEEP]:
        shutil.rmtree(old)


def complete_steps(output: Path) -> list[Path]:
    """The resumable steps of a run, oldest first."""
    found = [mark.parent for mark in output.glob(f"step-*/{MARK}")]
    return sorted(
        (path for path in found if _NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:])
    )


def newest_step(output: Path, recipe_sha256: str) -> tuple[dict[str, Any], Path] | None:
    """The mark and the folder of the newest complete step, None when there is none.

    Errors: UsageError when it belongs to another recipe.
    """
    steps = complete_steps(output)
    if not steps:
        return None
    mark: dict[str, Any] = json.loads((steps[-1] / MARK).read_text(encoding="utf-8"))
    if mark["recipe_sha256"] != recipe_sha256:
        raise UsageError(
            f"{steps[-1]} was trained with another recipe: resume with that one, or start in an "
            "empty folder"
        )
    return mark, steps[-1]
