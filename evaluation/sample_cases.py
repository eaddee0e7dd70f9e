"""A JSONL file of samples as a benchmark: every task is asked in the file's own words.

Only the last question of a conversation is asked. How it is scored follows from the sample: boxes,
options, a short answer, else the wanted text.
"""

from collections.abc import Iterator
from pathlib import Path

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.cases import Case
from medmo_edge.evaluation.items import Item, OnBroken
from medmo_edge.samples import Sample, question_of, read_samples, target_text

_TOKENS = {"locate": 700, "report": 512, "caption": 512}
_SHORT = 64


def read_sample_items(path: Path, broken: OnBroken) -> Iterator[Item]:
    """The samples of a file as items; missing pictures are broken. Errors: SampleError."""
    for sample in read_samples(path):
        missing = [image for image in sample.images if not image.is_file()]
        if missing:
            where = f"{path}:{sample.line}"
            broken(SampleError(f"{where}: picture {missing[0].name!r} is missing below {path}"))
            continue
        yield _item(sample, path)


def _item(sample: Sample, path: Path) -> Item:
    return Item(
        id=sample.id,
        task=sample.task,
        question=question_of(sample),
        where=f"{path}:{sample.line}",
        images=sample.images,
        target=None if sample.task == "locate" else _target(sample),
        boxes=sample.boxes,
        answer=sample.answer,
        choices=sample.choices,
    )


def _target(sample: Sample) -> str | None:
    try:
        return target_text(sample)
    except SampleError:
        return None


def sample_cases(item: Item) -> Iterator[Case]:
    """The one question of a sample. Errors: SampleError when nothing is wanted."""
    yield Case(
        id=item.id,
        sample=item.id,
        question=item.question,
        rule=_rule(item),
        images=tuple(item.images),
        max_new_tokens=_TOKENS.get(item.task, _SHORT),
        gold=item.answer or item.target or "",
        options=item.choices,
        boxes=item.boxes,
        groups={"task": item.task},
    )


def _rule(item: Item) -> str:
    if item.task == "locate":
        return "boxes"
    if item.answer is None and item.target is None:
        raise SampleError(f"{item.where}: sample {item.id!r} has no gold answer to score against")
    if item.task in ("report", "caption"):
        return "report"
    answer = (item.answer or item.target or "").strip().rstrip(".").lower()
    if item.choices:
        return "choice"
    return "yes_no" if answer in ("yes", "no") else "open"
