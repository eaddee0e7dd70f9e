"""BCCD blood smears (MIT licence): pictures and VOC boxes, as scenes.

Reads the folder as it is, with its zero-area boxes left out. Labels are the data set's own: RBC,
WBC, Platelets. Nothing is downloaded.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from medmo_edge.boxes import Box
from medmo_edge.errors import SampleError
from medmo_edge.train.scenes import Scene

LABELS = ("WBC", "RBC", "Platelets")


def read_names(folder: Path, split: str) -> tuple[str, ...]:
    """Image names of ``split`` ("train" or "val"). Errors: SampleError when the list is missing."""
    path = folder / f"{split}.txt"
    try:
        return tuple(path.read_text(encoding="utf-8").split())
    except OSError as error:
        raise SampleError(
            f"blood smear list {path} cannot be read: set MEDMO_EDGE_DATA or --data to the folder "
            "that holds bccd/"
        ) from error


def read_blood(data: Path, split: str) -> list[Scene]:
    """All scenes of one split of ``data``/bccd. Errors: SampleError naming the file."""
    folder = data / "bccd"
    return [read_scene(folder, name) for name in read_names(folder, split)]


def read_scene(folder: Path, name: str) -> Scene:
    """One smear with its boxes in pixels, XYXY."""
    picture, notes = folder / "images" / f"{name}.jpg", folder / "annotations" / f"{name}.xml"
    try:
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        objects = ElementTree.parse(notes).getroot().findall("object")
        boxes = [_read_box(node) for node in objects]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise SampleError(f"blood smear {name} in {folder} cannot be read: {error}") from error
    return Scene(kind="blood", pixels=pixels, boxes=_usable(boxes))


def _read_box(node: ElementTree.Element) -> Box:
    frame = node.find("bndbox")
    label = node.findtext("name", "").strip()
    if frame is None or label not in LABELS:
        raise ValueError(f"object {label!r} is not one of {', '.join(LABELS)} with a bndbox")
    keys = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(frame.findtext(key, "")) for key in keys)
    return Box(label, x1, y1, x2, y2)


def _usable(boxes: Sequence[Box]) -> tuple[Box, ...]:
    return tuple(box for box in boxes if box.area > 0)
