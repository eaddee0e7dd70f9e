"""Our own sample files as a source: to check them, split them or add retrieval questions.

Every picture must be there and every box inside it. Conversations pass as they are, with all their
turns.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from medmo_edge.boxes import XYXY, Box
from medmo_edge.errors import SampleError
from medmo_edge.evaluation.items import (
    Item,
    OnBroken,
    each,
    fit_boxes,
    picture_size,
    refuse,
)
from medmo_edge.samples import Sample, numbered_lines, parse_sample, question_of, text_of


def read_jsonl(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One item per line of a sample file. Errors: SampleError, also for a ``split``."""
    if split is not None:
        raise SampleError(f"{source}: a sample file has no splits: leave --split out")
    return each(numbered_lines(source), partial(_read, source), broken)


def _read(source: Path, line: tuple[int, str]) -> Item:
    number, text = line
    sample = parse_sample(text, source, number)
    where = f"{source}:{number}"
    sizes = [picture_size(image, where) for image in sample.images]
    boxes: list[Box] = []
    notes: list[str] = []
    for index, size in enumerate(sizes):
        found, changed = fit_boxes(_rows(sample, index), size, where, index)
        boxes += found
        notes += changed
    last = sample.messages[-1]
    return Item(
        id=sample.id,
        task=sample.task,
        question=question_of(sample),
        where=where,
        images=sample.images,
        target=text_of(last) if last["role"] == "assistant" else None,
        boxes=tuple(boxes),
        answer=sample.answer,
        choices=sample.choices,
        turns=tuple(sample.messages),
        meta=sample.meta,
        notes=tuple(notes),
    )


def _rows(sample: Sample, image: int) -> list[tuple[str, XYXY]]:
    return [(box.label, box.xyxy) for box in sample.boxes if box.image == image]
