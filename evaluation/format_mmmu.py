"""MMMU's Parquet copy, the five medical subjects; OmniMedVQA's JSON files.

MMMU shows ``image_1`` alone, as MedEvalKit does; an item whose options are several images is asked
without any. The test split has no gold answers and is not read.
"""

import ast
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import (
    Pictures,
    embedded,
    json_rows,
    parquet_rows,
    text_cell,
)
from medmo_edge.evaluation.items import LETTERS, Item, OnBroken, Picture, each, picture_size, refuse

MMMU_SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
_IMAGE_MARK = re.compile(r"<image \d+>|<img='.*?'>")


def read_mmmu(source: Path, broken: OnBroken = refuse) -> Iterator[Item]:
    """The validation items of ``source``, a folder with one folder per subject.

    ``choices`` is empty for open items, whose ``meta["golds"]`` lists every accepted answer.
    Errors: SampleError naming the subjects that are missing.
    """
    missing = [name for name in MMMU_SUBJECTS if not _documents(source, name)]
    if missing:
        raise SampleError(f"{source} lacks the MMMU subject {', '.join(missing)} (validation)")
    for subject in MMMU_SUBJECTS:
        for path in _documents(source, subject):
            rows = parquet_rows(path, ("id", "question", "options", "answer", "question_type"))
            yield from each(rows, partial(_mmmu, subject), broken)


def _documents(source: Path, subject: str) -> list[Path]:
    return sorted((source / subject).glob("validation-*.parquet"))


def _mmmu(subject: str, entry: tuple[str, dict[str, Any]]) -> Item:
    where, row = entry
    name = text_cell(row, "id", where)
    options = _texts(row["options"], where)
    open_ended = row["question_type"] != "multiple-choice"
    golds = _golds(row["answer"], where)
    images: tuple[Picture, ...] = ()
    if row.get("image_1") is not None and sum(map(_count_images, options)) < 2:
        images = (embedded(row["image_1"], name, where),)
        picture_size(images[0], where)
    if not open_ended and golds[0] not in LETTERS[: len(options)]:
        raise SampleError(f"{where}: gold answer {golds[0]!r} is not one of the options")
    return Item(
        id=f"mmmu-med/{name}",
        task="vqa" if images else "text_qa",
        question=text_cell(row, "question", where),
        where=where,
        images=images,
        answer=golds[0],
        choices=() if open_ended else tuple(options),
        meta={"subject": subject, "golds": golds},
    )


def _texts(value: Any, where: str) -> list[str]:
    """The options: a list written as Python source, or a list."""
    try:
        options = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise SampleError(f"{where}: options {str(value)[:60]!r} are not a list") from error
    if not isinstance(options, list):
        raise SampleError(f"{where}: options {str(value)[:60]!r} are not a list")
    return [str(option) for option in options]


def _golds(value: Any, where: str) -> list[str]:
    """One gold answer, or several written as a Python list."""
    text = str(value or "").strip()
    if text.startswith("["):
        return _texts(text, where)
    if not text or text == "?":
        raise SampleError(f"{where}: the gold answer is missing")
    return [text]


def _count_images(option: str) -> int:
    return len(_IMAGE_MARK.findall(option))


def read_omnimedvqa(source: Path, broken: OnBroken = refuse) -> Iterator[Item]:
    """One item per question of ``QA_information/Open-access/*.json``; images below ``source``.

    ``meta``: modality, question_type and dataset. Errors: SampleError, also when the gold text is
    not one of the options.
    """
    found = sorted((source / "QA_information" / "Open-access").glob("*.json"))
    if not found:
        raise SampleError(f"{source} holds no QA_information/Open-access/*.json: is it OmniMedVQA?")
    pictures = Pictures(source)
    for path in found:
        numbered = enumerate(json_rows(path), start=1)
        yield from each(numbered, partial(_omni, path.stem, pictures), broken)


def _omni(stem: str, pictures: Pictures, entry: tuple[int, tuple[str, dict[str, Any]]]) -> Item:
    number, (where, row) = entry
    picture = pictures.find(text_cell(row, "image_path", where), where)
    picture_size(picture, where)
    choices = tuple(
        str(row[f"option_{letter}"]) for letter in "ABCD" if row.get(f"option_{letter}") is not None
    )
    gold = text_cell(row, "gt_answer", where)
    if gold not in [choice.strip() for choice in choices]:
        raise SampleError(f"{where}: gold answer {gold[:60]!r} is not one of the options")
    return Item(
        id=f"omnimedvqa/{stem}/{row.get('question_id') or number}",
        task="vqa",
        question=text_cell(row, "question", where),
        where=where,
        images=(picture,),
        choices=choices,
        answer=LETTERS[[choice.strip() for choice in choices].index(gold)],
        meta={
            "modality": str(row.get("modality_type") or ""),
            "question_type": str(row.get("question_type") or ""),
            "dataset": str(row.get("dataset") or stem),
        },
    )
