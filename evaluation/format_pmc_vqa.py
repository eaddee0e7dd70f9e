"""PMC-VQA: ``train_2.csv``, ``test_2.csv`` or the first version's, or Parquet, and the figures.

The answer is the letter; the captions that come with the second version stay in ``meta``.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import (
    Pictures,
    csv_rows,
    parquet_files,
    parquet_rows,
    text_cell,
)
from medmo_edge.evaluation.items import Item, OnBroken, each, picture_size, refuse

_CHOICES = ("Choice A", "Choice B", "Choice C", "Choice D")
_COLUMNS = ("Figure_path", "Question", "Answer", *_CHOICES)
_MARK = re.compile(r"[A-D]\s*[:.)]\s*")  # choices are printed as " A: text "


def read_pmc_vqa(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``vqa`` item with four choices per row of a folder or file; ``split`` "train" or "test".

    The article (PMC number) is the item's group. Errors: SampleError.
    """
    folder = source.parent if source.is_file() else source
    pictures = Pictures(folder)
    for path in [source] if source.is_file() else _documents(source, split):
        rows = (
            parquet_rows(path, _COLUMNS) if path.suffix == ".parquet" else csv_rows(path, _COLUMNS)
        )
        numbered = enumerate(rows, start=1)
        yield from each(
            numbered,
            partial(_read, path.stem, pictures),
            broken,
        )


def _documents(folder: Path, split: str | None) -> list[Path]:
    """The second version where both are there: it has fewer compound figures."""
    found = sorted(folder.glob("*.csv"))
    newer = [path for path in found if path.stem.endswith("_2")]
    kept = [path for path in newer or found if split is None or path.stem.split("_")[0] == split]
    return kept or parquet_files(folder, split)


def _read(stem: str, pictures: Pictures, entry: tuple[int, tuple[str, dict[str, Any]]]) -> Item:
    number, (where, row) = entry
    name = f"{stem}/{number}"
    figure = text_cell(row, "Figure_path", where)
    picture = pictures.find(figure, where)
    picture_size(picture, where)
    choices = tuple(_MARK.sub("", text_cell(row, key, where), count=1).strip() for key in _CHOICES)
    return Item(
        id=f"pmc-vqa/{name}",
        task="vqa",
        question=" ".join(text_cell(row, "Question", where).split()),
        where=where,
        images=(picture,),
        answer=_letter(row, choices, where),
        choices=choices,
        group=figure.rpartition("/")[2].partition("_")[0] or None,
        meta={"caption": str(row["Caption"])} if row.get("Caption") else {},
    )


def _letter(row: Mapping[str, Any], choices: tuple[str, ...], where: str) -> str:
    """The second version gives the letter, the first the text, sometimes with ``Answer_label``."""
    for key in ("Answer_label", "Answer"):
        value = str(row.get(key) or "").strip()
        if value in ("A", "B", "C", "D"):
            return value
    plain = _MARK.sub("", value, count=1).strip().lower()
    fitting = [index for index, text in enumerate(choices) if text.lower() == plain]
    if len(fitting) != 1:
        raise SampleError(f"{where}: answer {value[:60]!r} is none, or several, of the choices")
    return "ABCD"[fitting[0]]
