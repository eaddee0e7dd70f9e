"""MedTrinity-25M: pictures with long captions, as Parquet (columns image, id, caption).

A copy without the image column finds its pictures by id in the folder. The captions were written by
a model from boxes and metadata: they are not a radiologist's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medmo_edge.evaluation.item_sources import (
    Pictures,
    parquet_files,
    parquet_rows,
    picture_or_embedded,
    text_cell,
)
from medmo_edge.evaluation.items import Item, OnBroken, each, picture_size, refuse
from medmo_edge.prompts import TASK_PROMPTS


def read_medtrinity(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``caption`` item per row of the Parquet files. Errors: SampleError."""
    pictures = Pictures(source.parent if source.is_file() else source)
    for path in parquet_files(source, split):
        rows = parquet_rows(path, ("id", "caption"))
        yield from each(rows, lambda entry: _read(*entry, pictures), broken)


def _read(where: str, row: dict[str, Any], pictures: Pictures) -> Item:
    name = text_cell(row, "id", where)
    if row.get("image") is None:
        row = row | {"image": name}
    stem = Path(name.replace("\\", "/")).stem
    picture = picture_or_embedded(row, "image", stem, pictures, where)
    picture_size(picture, where)
    return Item(
        id=f"medtrinity/{name}",
        task="caption",
        question=TASK_PROMPTS["caption"],
        where=where,
        images=(picture,),
        target=text_cell(row, "caption", where),
    )
