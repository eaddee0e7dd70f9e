"""Report sets behind a licence, as MedEvalKit lays them out: MIMIC-CXR and CheXpert Plus.

A folder with ``test.json`` (a list of image, findings, impression) and ``images/``. Nothing of
PhysioNet's or AIMI's own layout is read: their terms ask each site to make this selection itself.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import Pictures, json_rows
from medmo_edge.evaluation.items import Item, OnBroken, each, picture_size, refuse
from medmo_edge.prompts import TASK_PROMPTS


def read_reports(name: str, source: Path, broken: OnBroken = refuse) -> Iterator[Item]:
    """One ``report`` item per entry of ``source``/test.json; entries without any text are left out.

    ``meta``: findings and impression. Errors: SampleError.
    """
    path = source if source.is_file() else source / "test.json"
    if not path.is_file():
        raise SampleError(f"{source} has no test.json: see docs/evaluation.md for its form")
    folder = path.parent
    pictures = Pictures(folder / "images" if (folder / "images").is_dir() else folder)
    rows = (entry for entry in enumerate(json_rows(path), start=1) if _has_text(entry[1][1]))
    return each(rows, partial(_read, name, pictures), broken)


def _has_text(row: dict[str, Any]) -> bool:
    return any(str(row.get(key) or "").strip() for key in ("findings", "impression"))


def _read(name: str, pictures: Pictures, entry: tuple[int, tuple[str, dict[str, Any]]]) -> Item:
    number, (where, row) = entry
    names = row.get("image")
    names = names if isinstance(names, list) else [names]
    images = tuple(pictures.find(str(each), where) for each in names if each)
    if not images:
        raise SampleError(f"{where}: names no image")
    for picture in images:
        picture_size(picture, where)
    parts = {key: str(row.get(key) or "").strip() for key in ("findings", "impression")}
    return Item(
        id=f"{name}/{row.get('id') or row.get('study_id') or number}",
        task="report",
        question=TASK_PROMPTS["report"],
        where=where,
        images=images,
        target=f"Findings: {parts['findings']} Impression: {parts['impression']}",
        meta=parts,
    )
