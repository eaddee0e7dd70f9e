"""Saved steps of a run: atomic folders, so that a kill at any moment leaves a step that resumes.

``step-N`` holds model, head, optimiser and recipe hash; it is written beside, synced, renamed, and
marked COMPLETE last. Random numbers need no saving: every row draws from its own step and place.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from medmo_edge.errors import UsageError

MARK = "COMPLETE"
KEEP = 2  # the newest steps; older ones are removed


def save_step(output: Path, step: int, recipe_sha256: str, tensors: dict[str, Any]) -> None:
    """Write ``tensors`` (state dicts by name) as the state before ``step``."""
    import torch

    folder = output / f"step-{step:06d}"
    staging = output / f"step-{step:06d}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with (staging / "state.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
    mark = json.dumps({"step": step, "recipe_sha256": recipe_sha256})
    (folder / MARK).write_text(mark, encoding="utf-8")
    for old in complete_steps(output)[:-KEEP]:
        shutil.rmtree(old)


def complete_steps(output: Path) -> list[Path]:
    """The resumable steps of a run, oldest first."""
    return sorted(path.parent for path in output.glob(f"step-*/{MARK}"))


def load_step(output: Path, recipe_sha256: str) -> tuple[int, dict[str, Any]] | None:
    """The newest complete step and its state dicts, None when there is none.

    Errors: UsageError when it belongs to another recipe.
    """
    import torch

    steps = complete_steps(output)
    if not steps:
        return None
    mark = json.loads((steps[-1] / MARK).read_text(encoding="utf-8"))
    if mark["recipe_sha256"] != recipe_sha256:
        raise UsageError(
            f"{steps[-1]} was trained with another recipe: resume with that one, or start in an "
            "empty folder"
        )
    state = torch.load(steps[-1] / "state.pt", map_location="cpu", weights_only=True)
    return int(mark["step"]), state
