"""YOLO folders: one text file per picture, a line per box in parts of the sides.

Reads Ultralytics (``data.yaml``) and Darknet (``classes.txt``, ``obj.names``) forms. A polygon
becomes the box around it. A picture without a text file shows nothing, by YOLO's own rule.
"""

from collections.abc import Iterator
from pathlib import Path

from medmo_edge.boxes import XYXY
from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.item_sources import PICTURE_ENDINGS, read_text
from medmo_edge.evaluation.items import (
    Item,
    OnBroken,
    detect_prompt,
    each,
    fit_boxes,
    picture_size,
    refuse,
)


def read_yolo(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``locate`` item per picture below ``source``; ``split`` is a folder name in its path.

    Errors: SampleError, UsageError when ``data.yaml`` cannot be read for want of PyYAML.
    """
    names = _names(source)
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in PICTURE_ENDINGS
        and (split is None or split in path.relative_to(source).parts[:-1])
    ]
    if not found:
        wanted = f" in a folder {split!r}" if split else ""
        raise SampleError(f"{source} holds no picture{wanted}: is it a YOLO folder?")
    return each(found, lambda path: _read(path, source, names), broken)


def _names(source: Path) -> dict[int, str]:
    for name in ("classes.txt", "obj.names", "labels/classes.txt"):
        if (source / name).is_file():
            lines = [line.strip() for line in read_text(source / name).splitlines()]
            return {index: line for index, line in enumerate(lines) if line}
    documents = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    if not documents:
        raise SampleError(f"{source} has no data.yaml or classes.txt: the classes have no names")
    return _yaml_names(documents[0])


def _yaml_names(path: Path) -> dict[int, str]:
    try:
        import yaml
    except ImportError as error:
        raise UsageError(
            f"{path} needs PyYAML: install it with pip install 'medmo-edge[data]', or write "
            "classes.txt, one name a line"
        ) from error
    try:
        document = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise SampleError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    names = document.get("names") if isinstance(document, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(type(key) is int for key in names):
        raise SampleError(f"{path} has no names: a list, or a table from class number to name")
    return {key: str(value) for key, value in names.items()}


def _read(path: Path, source: Path, names: dict[int, str]) -> Item:
    notes_path = _notes_path(path, source)
    size = picture_size(path, str(path))
    rows = list(_rows(notes_path, size, names)) if notes_path else []
    boxes, notes = fit_boxes(rows, size, str(notes_path or path))
    return Item(
        id=path.relative_to(source).with_suffix("").as_posix(),
        task="locate",
        question=detect_prompt([names[key] for key in sorted(names)]),
        where=str(notes_path or path),
        images=(path,),
        boxes=boxes,
        notes=notes if notes_path else ("no text file: the picture shows nothing",),
    )


def _notes_path(picture: Path, source: Path) -> Path | None:
    """The text file beside the picture, or where ``images`` in its path is ``labels``."""
    parts = list(picture.relative_to(source).parts)
    places = [picture.with_suffix(".txt")]
    if "images" in parts:
        at = len(parts) - 1 - parts[::-1].index("images")
        places.insert(
            0, source.joinpath(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt")
        )
    return next((place for place in places if place.is_file()), None)


def _rows(path: Path, size: tuple[int, int], names: dict[int, str]) -> Iterator[tuple[str, XYXY]]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            kind, *values = (float(part) for part in line.split())
        except ValueError as error:
            raise SampleError(f"{where}: {line.strip()[:60]!r} is not a list of numbers") from error
        if kind not in names:
            raise SampleError(f"{where}: class {kind:g} has no name: there are {sorted(names)}")
        yield names[int(kind)], _corners(values, size, where)


def _corners(values: list[float], size: tuple[int, int], where: str) -> XYXY:
    """``cx cy w h`` (perhaps with a confidence behind), or the corners of a polygon, to pixels."""
    width, height = size
    if len(values) in (4, 5):
        x, y, w, h = values[:4]
        xs, ys = [x - w / 2, x + w / 2], [y - h / 2, y + h / 2]
    elif len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[::2], values[1::2]
    else:
        raise SampleError(f"{where}: {len(values)} numbers are neither a box nor a polygon")
    return min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height
