"""An answer against its label, as a number that can be paired: right or wrong, or overlap of boxes.

For verification, where the same question is put to two sides and only their difference matters.
Benchmarks have their own parsers and rules (benchmarks of ``medmo-edge eval``); free text has no
score here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medmo_edge.boxes import Box
from medmo_edge.evaluation.scores import match_image, normalise
from medmo_edge.samples import Sample

Kind = Literal["answers", "boxes"]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """``value`` of ``weight``: 0 or 1 of 1 for an answer, summed IoU of the number of true boxes.

    ``kind`` says which of the two; they are never added up.
    """

    kind: Kind
    value: float
    weight: float


def score(sample: Sample, text: str, boxes: Sequence[Box]) -> Score | None:
    """None for a sample whose answer cannot be right or wrong (captions, reports).

    A ``locate`` sample without true boxes is an answer: right when no box was given.
    """
    if sample.task == "locate":
        return _located(sample.boxes, boxes)
    if sample.answer is None or sample.task not in ("vqa", "text_qa"):
        return None
    right = _is_right(text, sample.answer, sample.choices)
    return Score(kind="answers", value=float(right), weight=1.0)


def _located(truth: Sequence[Box], found: Sequence[Box]) -> Score:
    if not truth:
        return Score(kind="answers", value=float(not found), weight=1.0)
    total = 0.0
    for key in {_key(box) for box in truth}:
        wanted = [box.xyxy for box in truth if _key(box) == key]
        total += sum(match_image(wanted, [box.xyxy for box in found if _key(box) == key]).ious)
    return Score(kind="boxes", value=total, weight=float(len(truth)))


def _key(box: Box) -> tuple[int, str]:
    return box.image, box.label.lower()


def _is_right(text: str, answer: str, choices: Sequence[str]) -> bool:
    """Same words after ``normalise``; for a choice its letter or its text will do."""
    said = normalise(text)
    if not choices:
        return said == normalise(answer)
    letter = answer.strip().upper()[:1]
    accepted = {letter.lower(), normalise(answer)}
    if letter in _LETTERS[: len(choices)] and len(answer.strip()) == 1:
        accepted.add(normalise(choices[_LETTERS.index(letter)]))
    return said.strip("() ") in accepted
