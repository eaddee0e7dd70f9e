"""COCO detection files: one JSON with images, annotations and categories.

Finds ``instances_*.json`` and Roboflow's ``_annotations.coco.json``. Only boxes are read; crowd
regions are left out, segmentations, key points and captions ignored.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medmo_edge.boxes import XYXY
from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import Pictures, four_numbers, read_json
from medmo_edge.evaluation.items import (
    Item,
    OnBroken,
    detect_prompt,
    each,
    fit_boxes,
    picture_size,
    refuse,
)


def read_coco(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``locate`` item per image of the JSON file or folder ``source``.

    ``split`` keeps the files that have it in their name or folder ("train" fits
    ``instances_train2017.json`` and ``train/_annotations.coco.json``). Errors: SampleError.
    """
    root = source.parent if source.is_file() else source
    documents = [source] if source.is_file() else _documents(source, split)
    pictures = Pictures(root.parent if root.name == "annotations" else root)
    for path in documents:
        prefix = f"{path.parent.name}/{path.stem}/" if len(documents) > 1 else ""
        yield from _document(path, prefix, pictures, broken)


def _documents(folder: Path, split: str | None) -> list[Path]:
    found = sorted(folder.rglob("*.json"))
    instances = [path for path in found if path.name.startswith(("instances", "_annotations"))]
    kept = [path for path in instances or found if split is None or _is_of(path, folder, split)]
    if not kept:
        wanted = f" with {split!r} in its name" if split else ""
        raise SampleError(f"{folder} holds no .json file{wanted}: is it a COCO folder?")
    return kept


def _is_of(path: Path, folder: Path, split: str) -> bool:
    return any(split in part for part in path.relative_to(folder).parts)


def _document(path: Path, prefix: str, pictures: Pictures, broken: OnBroken) -> Iterator[Item]:
    document = read_json(path)
    images, annotations, categories = (_list(document, key, path) for key in _KEYS)
    names = {entry.get("id"): str(entry.get("name", "")) for entry in categories}
    known = {entry.get("id") for entry in images}
    boxes: dict[Any, list[Mapping[str, Any]]] = {}
    for entry in annotations:
        if entry.get("image_id") not in known:
            broken(SampleError(f"{path}: annotation {entry.get('id')!r} has no image"))
        boxes.setdefault(entry.get("image_id"), []).append(entry)

    def read(image: Mapping[str, Any]) -> Item:
        return _read(image, boxes.get(image.get("id"), []), names, path, prefix, pictures)

    yield from each(images, read, broken)


_KEYS = ("images", "annotations", "categories")


def _list(document: Any, key: str, path: Path) -> list[Mapping[str, Any]]:
    values = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise SampleError(f"{path}: {key!r} is not a list of objects: is it a COCO file?")
    return values


def _read(
    image: Mapping[str, Any],
    annotations: list[Mapping[str, Any]],
    names: Mapping[Any, str],
    path: Path,
    prefix: str,
    pictures: Pictures,
) -> Item:
    where = f"{path}, image {image.get('id')!r}"
    name = str(image.get("file_name") or "")
    near = (path.parent.name, path.stem.rpartition("_")[2])  # train/, or instances_train2017
    picture = pictures.find(name, where, near)
    size = picture_size(picture, where)
    noted = (image.get("width"), image.get("height"))
    if all(noted) and noted != size:
        raise SampleError(
            f"{where}: boxes belong to {noted[0]} x {noted[1]}, {name} has {size[0]} x {size[1]}"
        )
    single = [entry for entry in annotations if not entry.get("iscrowd")]
    boxes, notes = fit_boxes([_row(entry, names, where) for entry in single], size, where)
    crowds = len(annotations) - len(single)
    return Item(
        id=f"{prefix}{name}",
        task="locate",
        question=detect_prompt([label for label in names.values() if label]),
        where=where,
        images=(picture,),
        boxes=boxes,
        notes=(*notes, f"{crowds} crowd regions left out") if crowds else notes,
    )


def _row(entry: Mapping[str, Any], names: Mapping[Any, str], where: str) -> tuple[str, XYXY]:
    what = f"{where}, annotation {entry.get('id')!r}"
    if entry.get("category_id") not in names:
        raise SampleError(f"{what}: category {entry.get('category_id')!r} has no name")
    x, y, width, height = four_numbers(entry.get("bbox"), what)
    return names[entry["category_id"]], (x, y, x + width, y + height)
