"""VQA-RAD: the published JSON (all rows or split files) and the Hugging Face Parquet copy.

Answers are normalised only in white space, a final full stop and the case of yes and no; what is
wrong in them stays. Rephrased questions (``question_rephrase``) are not used.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import (
    Pictures,
    embedded,
    json_rows,
    parquet_files,
    parquet_rows,
    text_cell,
)
from medmo_edge.evaluation.items import Item, OnBroken, each, picture_size, refuse

_ALIASES = {"ATRIB": "ATTRIB", "PRSE": "PRES"}  # misspelt in the published file


def read_vqa_rad(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``vqa`` item per question of ``source``, a folder or one of its files.

    ``split``: ``SPLIT.json``, else the rows whose ``phrase_type`` begins with "test" for "test" and
    the others for "train"; the Parquet files of that name in a Hugging Face copy. ``meta`` has
    answer_type ("CLOSED", "OPEN"), question_type (a list) and organ where given. Errors:
    SampleError.
    """
    if source.suffix == ".parquet" or (source.is_dir() and any(source.rglob("*.parquet"))):
        yield from read_pairs(source, "vqa-rad", split=split, broken=broken)
        return
    folder = source.parent if source.is_file() else source
    path = source if source.is_file() else _document(source, split)
    pictures = Pictures(folder)
    rows = json_rows(path)
    if split is not None and path.stem != split:
        rows = (entry for entry in rows if _is_test(entry[1]) == (split == "test"))
    yield from each(rows, lambda entry: _read(*entry, pictures), broken)


def _document(folder: Path, split: str | None) -> Path:
    if split is not None and (folder / f"{split}.json").is_file():
        return folder / f"{split}.json"
    found = sorted(folder.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise SampleError(f"{folder}: which .json file? has {names}: name it, or give --split")
    if split not in (None, "train", "test"):
        raise SampleError(f"{folder}: VQA-RAD has no split {split!r}: use train or test")
    return found[0]


def _is_test(row: dict[str, Any]) -> bool:
    return str(row.get("phrase_type", "")).startswith("test")


def _read(where: str, row: dict[str, Any], pictures: Pictures) -> Item:
    picture = pictures.find(text_cell(row, "image_name", where), where)
    picture_size(picture, where)
    answer = normal_answer(text_cell(row, "answer", where))
    return Item(
        id=f"vqa-rad/{text_cell(row, 'qid', where)}",
        task="vqa",
        question=" ".join(text_cell(row, "question", where).split()),
        where=where,
        images=(picture,),
        target=answer,
        answer=answer,
        meta={
            "answer_type": str(row.get("answer_type") or closedness(answer)).strip().upper(),
            "question_type": _types(str(row.get("question_type") or "")),
            "organ": str(row.get("image_organ") or "").strip().upper(),
        },
    )


def _types(text: str) -> list[str]:
    names = (name.strip().upper() for name in text.split(","))
    return sorted({_ALIASES.get(name, name) for name in names if name})


def normal_answer(text: str) -> str:
    """One line without a final full stop; yes and no in lower case."""
    answer = " ".join(text.split()).rstrip(".").rstrip() or text.strip()
    return answer.lower() if answer.lower() in ("yes", "no") else answer


def closedness(answer: str) -> str:
    """ "CLOSED" for yes and no, else "OPEN": the rule for copies that do not say."""
    return "CLOSED" if answer.lower() in ("yes", "no") else "OPEN"


def read_pairs(source: Path, name: str, *, split: str | None, broken: OnBroken) -> Iterator[Item]:
    """The Parquet form of VQA-RAD and PathVQA: columns image, question, answer."""
    for path in parquet_files(source, split):
        rows = enumerate(parquet_rows(path, ("image", "question", "answer")), start=1)
        yield from each(rows, partial(_pair, f"{name}-{path.stem}"), broken)


def _pair(stem: str, entry: tuple[int, tuple[str, dict[str, Any]]]) -> Item:
    number, (where, row) = entry
    picture = embedded(row["image"], f"{stem}-{number:06d}", where)
    picture_size(picture, where)
    answer = normal_answer(text_cell(row, "answer", where))
    return Item(
        id=f"{stem}/{number}",
        task="vqa",
        question=" ".join(text_cell(row, "question", where).split()),
        where=where,
        images=(picture,),
        target=answer,
        answer=answer,
        meta={"answer_type": closedness(answer)},
    )
