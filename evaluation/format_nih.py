"""NIH ChestX-ray14: ``BBox_List_2017.csv``, the radiographs with boxes.

Boxes are x, y, width, height on the original 1024 x 1024 pictures; on a resized copy they are
scaled. Images without boxes (the 14 image-level labels) are not read.
"""

from collections.abc import Iterator
from pathlib import Path

from medmo_edge.boxes import XYXY
from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import Pictures, csv_rows, existing, four_numbers, read_text
from medmo_edge.evaluation.items import (
    Item,
    OnBroken,
    detect_prompt,
    each,
    fit_boxes,
    picture_size,
    refuse,
)

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltrate",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
)
SIDE = 1024  # pixels of the published pictures
_SPLITS = {"train": "train_val_list.txt", "test": "test_list.txt"}
# The published header is "Image Index,Finding Label,Bbox [x,y,w,h],,,": four columns and no more.
_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")

Rows = list[tuple[str, dict[str, str]]]


def read_nih(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``locate`` item per picture of the list ``source`` or of the folder that holds it.

    ``split``: "train" or "test" by NIH's own lists. The patient is the item's group. Errors:
    SampleError.
    """
    folder = source.parent if source.is_file() else source
    path = source if source.is_file() else existing(source, "BBox_List_2017.csv")
    kept = _names(folder, split)
    images: dict[str, Rows] = {}
    for where, row in csv_rows(path, _COLUMNS):
        if kept is None or row["Image Index"] in kept:
            images.setdefault(row["Image Index"], []).append((where, row))
    pictures = Pictures(folder)
    return each(images.items(), lambda entry: _read(*entry, pictures), broken)


def _names(folder: Path, split: str | None) -> set[str] | None:
    if split is None:
        return None
    if split not in _SPLITS:
        raise SampleError(f"{folder}: NIH has no split {split!r}: use train or test")
    return set(read_text(existing(folder, _SPLITS[split])).split())


def _read(name: str, rows: Rows, pictures: Pictures) -> Item:
    where = rows[0][0]
    picture = pictures.find(name, where)
    size = picture_size(picture, where)
    scale = size[0] / SIDE, size[1] / SIDE
    boxes, notes = fit_boxes([_row(row, place, scale) for place, row in rows], size, where)
    scaled = () if scale == (1, 1) else (f"boxes scaled from {SIDE} to {size[0]} x {size[1]}",)
    return Item(
        id=Path(name).stem,
        task="locate",
        question=detect_prompt(LABELS),
        where=where,
        images=(picture,),
        boxes=boxes,
        group=f"nih/{name.partition('_')[0]}",
        notes=notes + scaled,
    )


def _row(row: dict[str, str], where: str, scale: tuple[float, float]) -> tuple[str, XYXY]:
    x, y, width, height = four_numbers([row[name] for name in _COLUMNS[2:]], where)
    return row["Finding Label"], (
        x * scale[0],
        y * scale[1],
        (x + width) * scale[0],
        (y + height) * scale[1],
    )
