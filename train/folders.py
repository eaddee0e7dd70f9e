"""Folders that appear whole: filled beside their place and renamed into it, durably.

What is in them is the writer's business. Folders of saved steps, which also carry a mark and push
out older ones, are in ``state``.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medmo_edge.staging import staging_folder, sync, take_place


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when the block ends without an error.

    At no time is half of one there. An error leaves nothing; what a killed writer leaves beside it
    goes at the next try. Errors: OSError.
    """
    with staging_folder(folder) as staging:
        yield staging
        for path in staging.iterdir():
            sync(path)
        sync(staging)
        take_place(staging, folder, durable=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Readable JSON with a line end."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
