"""SLAKE: bilingual questions in ``train.json``, ``validate.json`` and ``test.json``, ``imgs/``.

Masks, detection boxes and the knowledge graph are not read.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.format_vqa_rad import closedness, normal_answer
from medmo_edge.evaluation.item_sources import Pictures, json_rows, text_cell
from medmo_edge.evaluation.items import Item, OnBroken, each, picture_size, refuse

SPLITS = ("train", "validate", "test")


def read_slake(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``vqa`` item per question of a folder or of one of its JSON files.

    ``split``: "train", "validate" (also "val", "validation") or "test". ``meta``: language,
    answer_type, modality, organ, content_type. Errors: SampleError.
    """
    folder = source.parent if source.is_file() else source
    pictures = Pictures(folder)
    for path in [source] if source.is_file() else _documents(source, split):
        yield from each(json_rows(path), partial(_read, path.stem, pictures), broken)


def _documents(folder: Path, split: str | None) -> list[Path]:
    wanted = SPLITS if split is None else ("validate" if split.startswith("val") else split,)
    found = [folder / f"{name}.json" for name in wanted if (folder / f"{name}.json").is_file()]
    if not found:
        raise SampleError(f"{folder} has no {' or '.join(wanted)}.json: is it a SLAKE folder?")
    return found


def _read(stem: str, pictures: Pictures, entry: tuple[str, dict[str, Any]]) -> Item:
    where, row = entry
    picture = pictures.find(text_cell(row, "img_name", where), where)
    picture_size(picture, where)
    answer = normal_answer(text_cell(row, "answer", where))
    return Item(
        id=f"slake/{stem}/{text_cell(row, 'qid', where)}",
        task="vqa",
        question=" ".join(text_cell(row, "question", where).split()),
        where=where,
        images=(picture,),
        target=answer,
        answer=answer,
        group=f"slake/{row['img_id']}" if row.get("img_id") is not None else None,
        meta={
            "language": str(row.get("q_lang") or "en"),
            "answer_type": str(row.get("answer_type") or closedness(answer)).strip().upper(),
            "modality": str(row.get("modality") or ""),
            "organ": str(row.get("location") or ""),
            "content_type": str(row.get("content_type") or ""),
        },
    )
