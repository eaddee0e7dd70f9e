"""DeepLesion: ``DL_info.csv`` and 16-bit CT slices, shown in the window that each row gives.

A stored value minus 32768 is in Hounsfield units. Each annotated slice becomes an 8-bit PNG; the
neighbouring slices, the diameters and the 3-D position are not used.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np

from medmo_edge.boxes import XYXY
from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import Pictures, csv_rows, existing, four_numbers
from medmo_edge.evaluation.items import (
    Embedded,
    Item,
    OnBroken,
    each,
    fit_boxes,
    refuse,
)
from medmo_edge.prompts import locate_prompt

LABEL = "lesion"
OFFSET = 32768  # what the publisher added so that Hounsfield units fit unsigned 16 bit
TYPES = {
    1: "bone",
    2: "abdomen",
    3: "mediastinum",
    4: "liver",
    5: "lung",
    6: "kidney",
    7: "soft tissue",
    8: "pelvis",
}
_SPLITS = {"train": "1", "val": "2", "test": "3"}
_COLUMNS = ("File_name", "Bounding_boxes", "DICOM_windows", "Train_Val_Test")

Rows = list[tuple[str, dict[str, str]]]


def read_deeplesion(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``locate`` item per slice and window of ``DL_info.csv`` or of the folder that holds it.

    ``split``: "train", "val" or "test", as published. The patient is the item's group. Errors:
    SampleError.
    """
    folder = source.parent if source.is_file() else source
    path = source if source.is_file() else existing(source, "DL_info.csv")
    if split is not None and split not in _SPLITS:
        raise SampleError(f"{path}: DeepLesion has no split {split!r}: use train, val or test")
    slices: dict[tuple[str, str], Rows] = {}
    for where, row in csv_rows(path, _COLUMNS):
        if split is None or row["Train_Val_Test"] == _SPLITS[split]:
            slices.setdefault((row["File_name"], row["DICOM_windows"]), []).append((where, row))
    pictures = Pictures(folder)
    return each(slices.values(), lambda rows: _read(rows, pictures), broken)


def _read(rows: Rows, pictures: Pictures) -> Item:
    where, first = rows[0]
    name = first["File_name"]
    series, _, number = name.rpartition("_")
    path = pictures.find(f"{series}/{number}", where)
    low, high = _window(first["DICOM_windows"], where)
    pixels = shown(_read_slice(path, where), low, high)
    size = (pixels.shape[1], pixels.shape[0])
    boxes, notes = fit_boxes([_row(row, place) for place, row in rows], size, where)
    stem = f"{Path(name).stem}_{low:g}_{high:g}"
    return Item(
        id=stem,
        task="locate",
        question=locate_prompt(LABEL),
        where=where,
        images=(Embedded(f"{stem}.png", _png(pixels)),),
        boxes=boxes,
        group=f"deeplesion/{first.get('Patient_index') or series}",
        meta={"window": [low, high], "types": [_type(row) for _, row in rows]},
        notes=notes,
    )


def _window(text: str, where: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SampleError(f"{where}: DICOM_windows {text!r} is not two numbers") from error
    if not low < high:
        raise SampleError(f"{where}: DICOM_windows {text!r} is empty")
    return low, high


def shown(hounsfield: np.ndarray, low: float, high: float) -> np.ndarray:
    """[H, W] Hounsfield units as uint8: ``low`` and below black, ``high`` and above white."""
    grey = (hounsfield.astype(np.float64) - low) / (high - low)
    return np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)


def _read_slice(path: Path, where: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in ("I;16", "I;16B", "I"):
                raise SampleError(f"{where}: {path} is no 16-bit slice (mode {image.mode})")
            return np.asarray(image).astype(np.int64) - OFFSET
    except (OSError, ValueError, SyntaxError) as error:
        raise SampleError(f"{where}: {path} cannot be read ({error})") from error


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _row(row: dict[str, str], where: str) -> tuple[str, XYXY]:
    return LABEL, four_numbers(row["Bounding_boxes"], where)


def _type(row: dict[str, str]) -> str | None:
    """The coarse lesion type; only validation and test rows have one, the others say -1."""
    value = row.get("Coarse_lesion_type", "")
    return TYPES.get(int(value)) if value.isdigit() else None
