"""Pascal VOC folders: one XML file per picture with its boxes.

Coordinates are taken as they stand, as corners in pixels: LabelImg and most sets count from 0, the
original VOC from 1, and no file says which. Segmentations, parts and rotated boxes are not read.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from medmo_edge.boxes import XYXY
from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import Pictures, existing, read_text
from medmo_edge.evaluation.items import (
    Item,
    OnBroken,
    detect_prompt,
    each,
    fit_boxes,
    picture_size,
    refuse,
)


def read_voc(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``locate`` item per XML file of ``source``, in the order of their names.

    ``split`` names ``ImageSets/Main/SPLIT.txt`` or ``SPLIT.txt``. Errors: SampleError.
    """
    folder = next((source / name for name in _NOTES if (source / name).is_dir()), source)
    pictures = Pictures(source)
    found = [folder / f"{name}.xml" for name in _listed(source, split)] if split else _all(folder)
    return each(found, lambda path: _read(path, folder, pictures), broken)


_NOTES = ("Annotations", "annotations")


def _all(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.xml"))
    if not found:
        raise SampleError(f"{folder} holds no .xml file: is it a VOC folder?")
    return found


def _listed(source: Path, split: str) -> list[str]:
    """The names of a split; VOC's lists per class carry a second column."""
    lines = read_text(existing(source, f"ImageSets/Main/{split}.txt", f"{split}.txt")).splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def _read(path: Path, folder: Path, pictures: Pictures) -> Item:
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise SampleError(f"{path} is missing") from error
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise SampleError(f"{path} is not XML: {error}") from error
    picture = _picture(root, path, pictures)
    size = picture_size(picture, str(path))
    _check_size(root, size, path)
    boxes, notes = fit_boxes(_rows(root.iterfind("object"), str(path)), size, str(path))
    return Item(
        id=path.relative_to(folder).with_suffix("").as_posix(),
        task="locate",
        question=detect_prompt(),
        where=str(path),
        images=(picture,),
        boxes=boxes,
        notes=notes,
    )


def _picture(root: ElementTree.Element, path: Path, pictures: Pictures) -> Path:
    """The picture of the same name; the <filename> inside is often stale, so it comes second."""
    try:
        return pictures.find(path.stem, str(path), near=(path.parent.name,))
    except SampleError:
        return pictures.find(root.findtext("filename") or path.stem, str(path))


def _check_size(root: ElementTree.Element, size: tuple[int, int], path: Path) -> None:
    """Boxes drawn on another size of the picture mean nothing on this one; 0 x 0 says nothing."""
    try:
        noted = tuple(int(float(root.findtext(f"size/{key}") or 0)) for key in ("width", "height"))
    except ValueError as error:
        raise SampleError(f"{path}: <size> is not two numbers") from error
    if all(noted) and noted != size:
        raise SampleError(
            f"{path}: boxes are of {noted[0]} x {noted[1]}, the picture is {size[0]} x {size[1]}"
        )


def _rows(objects: Iterable[ElementTree.Element], where: str) -> Iterator[tuple[str, XYXY]]:
    for node in objects:
        label = node.findtext("name") or ""
        texts = [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(text or "") for text in texts)
        except ValueError as error:
            raise SampleError(f"{where}: {label or 'object'} has no bndbox of 4 numbers") from error
        yield label, (x1, y1, x2, y2)
