"""Items: what a reader of a publisher's format gives, before it becomes a sample.

An item is a sample whose pictures may still lie inside the publisher's file. Dirt that can be put
right without guessing is put right and noted (a box without area is left out, an overhanging box is
cut at the edge); the rest makes the item broken. Nothing here writes a file.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from medmo_edge.boxes import XYXY, Box
from medmo_edge.errors import ImageError, SampleError
from medmo_edge.image_budgets import check_pixels
from medmo_edge.images import read_image
from medmo_edge.prompts import TASK_PROMPTS, locate_prompt, user_message

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSIDE = 0.5  # part of a box that must lie in its picture: with less, they do not belong together

Source = TypeVar("Source")

_ORIENTATION = 0x0112  # the EXIF tag
_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture that has no file of its own; ``name`` is a file name with its ending."""

    name: str
    data: bytes = field(repr=False)


Picture = Path | Embedded


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One labelled example as its publisher gives it.

    ``question`` has no options in it; they are in ``choices``, and ``answer`` is then a letter.
    ``target`` is the whole wanted text, None for ``locate`` (its boxes say it). ``boxes`` are in
    source pixels. ``turns`` is the conversation where the source has one. ``group`` names the
    patient or study, when known: a split never divides one. ``where`` is the place in the source
    ("file:line"), ``notes`` what was put right.
    """

    id: str
    task: str
    question: str
    where: str
    images: tuple[Picture, ...] = ()
    target: str | None = None
    boxes: tuple[Box, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    turns: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation of a sample: its ``turns``, else question, options and wanted text."""
        if self.turns:
            return list(self.turns)
        text = choice_prompt(self.question, self.choices) if self.choices else self.question
        asked = user_message(text, len(self.images))
        wanted = self.answer if self.target is None else self.target
        if self.task == "locate" or wanted is None:
            return [asked]
        return [asked, {"role": "assistant", "content": wanted}]


OnBroken = Callable[[SampleError], None]


def refuse(error: SampleError) -> None:
    """The default for broken items: the first one ends the reading. Errors: the SampleError."""
    raise error


def each(
    sources: Iterable[Source], read: Callable[[Source], Item], broken: OnBroken
) -> Iterator[Item]:
    """``read`` of every source; those that raise SampleError go to ``broken`` instead."""
    for source in sources:
        try:
            item = read(source)
        except SampleError as error:
            broken(error)
            continue
        yield item


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """A multiple-choice question in MedEvalKit's words, options as "A. text"."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
    return (
        f"Question: {question}\nOptions:\n{options}\n"
        "Answer with the option's letter from the given choices directly."
    )


def detect_prompt(labels: Sequence[str] = ()) -> str:
    """The question for every box of a picture, naming the ``labels`` when they are known."""
    return f"Locate all of: {', '.join(labels)}." if labels else TASK_PROMPTS["detect"]


def per_label(item: Item, absent: Iterable[str] = ()) -> Iterator[Item]:
    """A ``locate`` item as one item per label it shows, then one per label of ``absent`` it lacks.

    Other items, and conversations, pass unchanged.
    """
    if item.task != "locate" or item.turns:
        yield item
        return
    shown = list(dict.fromkeys(box.label for box in item.boxes))
    for label in [*shown, *(label for label in absent if label not in shown)]:
        boxes = tuple(box for box in item.boxes if box.label == label)
        yield replace(item, id=f"{item.id}/{label}", question=locate_prompt(label), boxes=boxes)


def picture_size(picture: Picture, where: str) -> tuple[int, int]:
    """(width, height) as displayed, from the header alone where the format allows.

    Errors: SampleError when the picture is missing, is none, or is too large to be read later.
    """
    try:
        width, height = _size(picture)
        check_pixels(width, height)
    except ImageError as error:
        raise SampleError(f"{where}: picture {picture.name} {error}") from error
    return width, height


def _size(picture: Picture) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            source = BytesIO(picture.data) if isinstance(picture, Embedded) else picture
            with Image.open(source) as file:
                turned = file.getexif().get(_ORIENTATION) in _QUARTER_TURNS
                return (file.height, file.width) if turned else file.size
    except UnidentifiedImageError:
        if isinstance(picture, Embedded):
            raise ImageError("is not a picture") from None
        source_facts = read_image(picture).source  # perhaps DICOM
        return source_facts.width, source_facts.height
    # Pillow's parsers raise nearly anything on damaged bytes (struct.error, KeyError, ...).
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ImageError(f"cannot be read ({reason or type(error).__name__})") from error


def fit_boxes(
    rows: Iterable[tuple[str, XYXY]], size: tuple[int, int], where: str, image: int = 0
) -> tuple[tuple[Box, ...], tuple[str, ...]]:
    """Labelled corners as boxes inside a picture of ``size`` (width, height), and what was changed.

    Corners in the wrong order are swapped, a box without area is left out, one that hangs over the
    edge is cut. Errors: SampleError for an empty label, a number that is none, and a box of which
    more than half lies outside the picture.
    """
    boxes: list[Box] = []
    notes: list[str] = []
    for label, xyxy in rows:
        name = " ".join(label.split())
        if not name:
            raise SampleError(f"{where}: box {_show(xyxy)} has no label")
        kept = _fit(xyxy, size, f"{where}: {name} box {_show(xyxy)}")
        if kept is None:
            notes.append(f"{name} box {_show(xyxy)} has no area: left out")
            continue
        if kept != xyxy:
            notes.append(f"{name} box {_show(xyxy)} was cut or put in order")
        boxes.append(Box(name, *kept, image))
    return tuple(boxes), tuple(notes)


def _fit(xyxy: XYXY, size: tuple[int, int], what: str) -> XYXY | None:
    """The part of the box inside the picture; None when the box itself has no area."""
    if not all(map(math.isfinite, xyxy)):
        raise SampleError(f"{what} has a coordinate that is no number")
    (x1, x2), (y1, y2) = sorted((xyxy[0], xyxy[2])), sorted((xyxy[1], xyxy[3]))
    area = (x2 - x1) * (y2 - y1)
    if area <= 0:
        return None
    width, height = size
    left, right = (min(max(value, 0.0), float(width)) for value in (x1, x2))
    top, bottom = (min(max(value, 0.0), float(height)) for value in (y1, y2))
    if (right - left) * (bottom - top) < INSIDE * area:
        raise SampleError(
            f"{what} lies mostly outside its picture of {width} x {height}: "
            "are these the boxes of another size or file?"
        )
    return left, top, right, bottom


def _show(xyxy: XYXY) -> str:
    return f"[{', '.join(f'{value:g}' for value in xyxy)}]"
