"""VQA-RAD as scenes: real radiology pictures with the questions that people asked about them.

Reads the folder as it is, split by picture with the rule of the vqa-rad benchmark, so that no
picture is learned from and asked about. There are no boxes. Nothing is downloaded.
"""

from collections.abc import Iterator
from io import BytesIO
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.benchmarks import held_out
from medmo_edge.evaluation.formats import read_items
from medmo_edge.evaluation.items import Embedded, Item
from medmo_edge.train.scenes import Scene

LONGEST_SIDE = 640  # pixels; a row never shows more
LONGEST_ANSWER = 40  # characters: yes, no, or a phrase


def read_radiology(data: Path, split: str) -> list[Scene]:
    """The pictures of ``split`` ("train" or "val") below ``data``/vqa-rad, each with its questions.

    Long answers are left out. Errors: SampleError naming the file.
    """
    folder = data / "vqa-rad"
    if not folder.is_dir():
        raise SampleError(
            f"{folder} does not exist: set MEDMO_EDGE_DATA or --data to the folder that holds "
            "vqa-rad/"
        )
    items = sorted(read_items("vqa-rad", folder), key=_picture_name)
    scenes = []
    for name, group in groupby(items, key=_picture_name):
        asked = list(group)
        turns = tuple(_turns(asked))
        if turns and held_out(name) == (split == "val"):
            scenes.append(Scene(kind="radiology", pixels=_pixels(asked[0]), boxes=(), turns=turns))
    return scenes


def _picture_name(item: Item) -> str:
    return item.images[0].name


def _turns(items: list[Item]) -> Iterator[tuple[str, str]]:
    for item in items:
        answer = item.answer or ""
        if 0 < len(answer) <= LONGEST_ANSWER:
            yield item.question, f"{answer[0].upper()}{answer[1:]}."


def _pixels(item: Item) -> NDArray[np.uint8]:
    picture = item.images[0]
    source = BytesIO(picture.data) if isinstance(picture, Embedded) else picture
    try:
        with Image.open(source) as image:
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise SampleError(f"picture {picture.name} cannot be read: {error}") from error
