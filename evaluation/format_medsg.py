"""MedSG-Bench: grounding over several images, ``Task*.json``, its Parquet copy, and MedSG-188K.

The benchmark gives one box and does not say in which image; it is read from the question ("in the
third image"), else it is the last one, and ``meta["image_stated"]`` says which of the two. The
benchmark's own metric compares coordinates only.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medmo_edge.boxes import XYXY, Box
from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import (
    Pictures,
    embedded,
    four_numbers,
    json_rows,
    parquet_files,
    parquet_rows,
    text_cell,
)
from medmo_edge.evaluation.items import (
    Item,
    OnBroken,
    Picture,
    each,
    fit_boxes,
    picture_size,
    refuse,
)

LABEL = "target"
MAX_IMAGES = 6
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_NAMED = re.compile(r"\b(" + "|".join(_ORDINALS) + r")\s+(?:image|picture|frame|slice)", re.I)
_NUMBERED = re.compile(r"\b(?:image|picture|frame|slice)[ -]?([1-6])\b", re.I)
_SPAN = re.compile(
    r"<\|box_start\|>\s*\(?\s*([\d.]+)\s*,\s*([\d.]+)\s*\)?\s*,\s*\(?\s*([\d.]+)\s*,\s*([\d.]+)"
)
_PLACEHOLDER = re.compile(r"<image>\s*")


def read_medsg(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``locate`` item per question of a folder, a Task*.json, a Parquet file or a 188K JSON.

    ``split`` is the name of a task file ("Task8") or of a Parquet split. ``meta["task"]`` names the
    task. Errors: SampleError.
    """
    folder = source.parent if source.is_file() else source
    pictures = Pictures(folder)
    for path in [source] if source.is_file() else _documents(source, split):
        rows = (
            parquet_rows(path, ("task", "question", "answer_xyxy", "num_images"))
            if path.suffix == ".parquet"
            else json_rows(path)
        )
        yield from each(
            enumerate(rows, start=1),
            partial(_read, path.stem, pictures),
            broken,
        )


def _documents(folder: Path, split: str | None) -> list[Path]:
    found = sorted(folder.glob("*.json"), key=lambda path: (len(path.name), path.name))
    kept = [path for path in found if split is None or path.stem.lower() == split.lower()]
    return kept or parquet_files(folder, split)


def _read(stem: str, pictures: Pictures, entry: tuple[int, tuple[str, dict[str, Any]]]) -> Item:
    number, (where, row) = entry
    name = f"{stem}/{number}"
    if "conversations" in row or "messages" in row:
        question, answer, xyxy = _conversation(row, where)
    else:
        question, answer = text_cell(row, "question", where), ""
        xyxy = four_numbers(row.get("answer_xyxy", row.get("answer")), where)
    images = _images(row, name, pictures, where)
    sizes = [picture_size(picture, where) for picture in images]
    stated = named_image(answer or question, len(images))
    image = len(images) - 1 if stated is None else stated
    boxes, notes = _box(xyxy, sizes[image], image, where)
    return Item(
        id=f"medsg/{name}",
        task="locate",
        question=" ".join(_PLACEHOLDER.sub("", question).split()),
        where=where,
        images=images,
        boxes=boxes,
        meta={"task": str(row.get("task") or ""), "image_stated": stated is not None},
        notes=notes,
    )


def _box(
    xyxy: XYXY, size: tuple[int, int], image: int, where: str
) -> tuple[tuple[Box, ...], tuple[str, ...]]:
    boxes, notes = fit_boxes([(LABEL, xyxy)], size, where, image)
    if not boxes:
        raise SampleError(f"{where}: the one box of the answer has no area")
    return boxes, notes


def named_image(text: str, num_images: int) -> int | None:
    """Index of the image that ``text`` names last ("third image", "image 3"), None without one."""
    found = [(m.start(), _ORDINALS.index(m[1].lower())) for m in _NAMED.finditer(text)]
    found += [(m.start(), int(m[1]) - 1) for m in _NUMBERED.finditer(text)]
    return max(found)[1] if found and max(found)[1] < num_images else None


def _conversation(row: dict[str, Any], where: str) -> tuple[str, str, XYXY]:
    """Question, answer and box of a ShareGPT row: one question, one answer with one box."""
    turns = row.get("conversations") or row.get("messages")
    try:
        asked, said = (str(turn.get("value", turn.get("content"))) for turn in turns or [])
    except (AttributeError, ValueError) as error:
        raise SampleError(f"{where}: the conversation is not one question and answer") from error
    found = _SPAN.search(said)
    if found is None:
        raise SampleError(f"{where}: no <|box_start|>(x1,y1),(x2,y2) in {said[:60]!r}")
    return asked, said, four_numbers(found.groups(), where)


def _images(row: dict[str, Any], name: str, pictures: Pictures, where: str) -> tuple[Picture, ...]:
    if "num_images" in row:
        stem = name.replace("/", "-")
        numbers = range(1, min(int(row["num_images"] or 0), MAX_IMAGES) + 1)
        images: tuple[Picture, ...] = tuple(
            embedded(row.get(f"image_bytes_{n}"), f"{stem}-{n}", where) for n in numbers
        )
    else:
        names = row.get("images")
        images = tuple(pictures.find(str(each), where) for each in names or [])
    if not images:
        raise SampleError(f"{where}: names no image")
    return images
