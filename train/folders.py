"""Folders that appear whole: filled beside their place and renamed into it, durably.

What is in them is the writer's business. Folders of saved steps, which also carry a mark and push
out older ones, are in ``state``.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medmo_edge.train.state import sync


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when the block ends without an error.

    At no time is half of one there; what an error leaves beside it goes at the next try. Errors:
    OSError.
    """
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for path in staging.iterdir():
        sync(path)
    sync(staging)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Readable JSON with a line end."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
