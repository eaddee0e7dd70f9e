"""Measuring one artifact against its checkpoint, case by case, with what was measured kept on disk.

Per case there are up to three sides: the reference (transformers), the unquantised artifact of the
same format, and the artifact. The runtime gap is between the first two, the quantisation gap
between the last two. A run that was interrupted goes on after its last complete case. Verdicts are
not given here.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box
from medmo_edge.evaluation.gaps import (
    Gap,
    box_agreement,
    first_difference,
    gap,
    margins,
    patch_difference,
)
from medmo_edge.evaluation.reference import Reference, Trace
from medmo_edge.evaluation.truth import Score, score
from medmo_edge.evaluation.verify_cases import Case, open_cases
from medmo_edge.runtime.observe import Observer, Seen
from medmo_edge.samples import Sample

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything that was measured on one case; ``stability`` is the smallest lead of the
    reference's best logit over its answer, ``scores`` compare each side with the label.

    ``same_text_iou``: agreement of the boxes that both sides read in the reference's own answer,
    None when it has none.
    """

    id: str
    picture: str
    task: str
    num_tokens: int
    patches: float
    prompt_equal: bool
    stability: float
    complete: bool
    whole: Gap
    runtime: Gap
    quantisation: Gap | None
    same_text_iou: float | None
    rejected: tuple[int, int]
    scores: dict[str, Score] | None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """Read what ``to_json`` wrote."""
        values = json.loads(line)
        for name in ("whole", "runtime", "quantisation"):
            values[name] = values[name] and Gap.from_dict(values[name])
        values["rejected"] = tuple(values["rejected"])
        values["scores"] = values["scores"] and {
            side: Score(**found) for side, found in values["scores"].items()
        }
        return cls(**values)


class Side:
    """One artifact, asked the way an application asks it."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._frames: tuple[Any, ...] | None = None
        self._seen = Seen(patches=(), features=())

    def trace(self, case: Case, max_new_tokens: int) -> Trace:
        """Its way through one case."""
        observed = self._observer.ask(case.frames, case.question, max_new_tokens)
        if self._frames is not case.frames:  # consecutive questions about the same images
            self._frames, self._seen = case.frames, self._observer.look(case.frames)
        return Trace(
            patches=self._seen.patches,
            features=self._seen.features,
            prompt_ids=observed.prompt_ids,
            tokens=observed.tokens,
            logits_TV=observed.logits_TV,
            text=observed.answer.text,
            boxes=observed.answer.boxes,
            rejected=observed.answer.rejected_boxes,
        )

    def forced(self, case: Case, own: Trace, tokens: Sequence[int]) -> Array:
        """Logits [T, V] along given tokens; what the own answer shares with them is not redone."""
        first = first_difference(own.tokens, tokens)
        if first is None:
            return own.logits_TV
        known = own.logits_TV[: min(first + 1, len(tokens))]
        if len(known) == len(tokens):
            return known
        rest = self._observer.follow(case.frames, case.question, tokens, len(known))
        return np.concatenate([known, rest])

    def read(self, case: Case, text: str) -> tuple[Box, ...]:
        """The boxes this artifact would give its user for an answer of this text."""
        return self._observer.read_boxes(case.frames, text)

    def draft(self, case: Case, begun: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
        """A guess how the reference's answer goes on after ``begun``."""
        if not begun:
            observed = self._observer.ask(case.frames, case.question, max_new_tokens)
            return observed.tokens
        return self._observer.go_on(case.frames, case.question, begun, max_new_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The sides of a measurement; ``unquantised`` is None when the artifact is so itself."""

    reference: Reference
    artifact: Side
    unquantised: Side | None
    levels: int
    max_new_tokens: int

    def measure(self, cases: Sequence[Case]) -> Iterator[Record]:
        """Trace ``cases`` together and compare the sides of each."""

        def draft(case: Case, begun: tuple[int, ...]) -> tuple[int, ...]:
            return (self.unquantised or self.artifact).draft(case, begun, self.max_new_tokens)

        traces = self.reference.trace(cases, draft, self.max_new_tokens)
        for case, base in zip(cases, traces, strict=True):
            yield self._compare(case, base)

    def _compare(self, case: Case, base: Trace) -> Record:
        own, forced, whole = self._against(self.artifact, case, base)
        runtime, quantisation, plain = whole, None, None
        if self.unquantised is not None:
            plain, plain_forced, runtime = self._against(self.unquantised, case, base)
            quantisation = gap(own, plain, forced, plain_forced, self.levels)
        read = self.artifact.read(case, base.text) if base.boxes else ()
        sides = {"reference": base, "artifact": own, "unquantised": plain}
        boxes = {name: side.boxes for name, side in sides.items() if side}
        texts = {name: side.text for name, side in sides.items() if side}
        return Record(
            id=case.sample.id,
            picture=case.picture,
            task=case.sample.task,
            num_tokens=len(base.tokens),
            patches=patch_difference(own.patches, base.patches),
            prompt_equal=own.prompt_ids == base.prompt_ids,
            stability=float(margins(base.logits_TV).min()),
            complete=base.complete,
            whole=whole,
            runtime=runtime,
            quantisation=quantisation,
            same_text_iou=box_agreement(read, base.boxes) if base.boxes else None,
            rejected=(len(base.rejected), len(own.rejected)),
            scores=_scores(case.sample, texts, boxes),
        )

    def _against(self, side: Side, case: Case, base: Trace) -> tuple[Trace, Array, Gap]:
        own = side.trace(case, self.max_new_tokens)
        forced = side.forced(case, own, base.tokens)
        return own, forced, gap(own, base, forced, base.logits_TV, self.levels)


def _scores(
    sample: Sample, texts: dict[str, str], boxes: dict[str, tuple[Box, ...]]
) -> dict[str, Score] | None:
    found = {name: score(sample, texts[name], boxes[name]) for name in texts}
    known = {name: each for name, each in found.items() if each is not None}
    return known or None


def measure_all(
    bench: Bench,
    samples: Sequence[Sample],
    probes: Sequence[Case],
    journal: Path,
    progress: Progress,
) -> list[Record]:
    """Measure the cases that ``journal`` does not hold yet; every record is appended to it.

    KeyboardInterrupt is passed on with words that say how to go on.
    """
    records = read_journal(journal)
    done = {record.id for record in records}
    cases = chain(
        (case for case in probes if case.sample.id not in done),
        open_cases([sample for sample in samples if sample.id not in done]),
    )
    total = len(samples) + len(probes)
    progress("samples", len(records), total)
    try:
        with journal.open("a", encoding="utf-8") as file:
            for chunk in _chunks(cases, bench.reference.chunk):
                for record in bench.measure(chunk):
                    file.write(record.to_json() + "\n")
                    file.flush()
                    records.append(record)
                    progress("samples", len(records), total)
    except KeyboardInterrupt:
        done_words = f"interrupted after {len(records)} of {total} samples"
        raise KeyboardInterrupt(f"{done_words}: the same command goes on") from None
    return records


def _chunks(cases: Iterator[Case], size: int) -> Iterator[list[Case]]:
    while chunk := list(islice(cases, size)):
        yield chunk


def read_journal(journal: Path) -> list[Record]:
    """Records of an earlier run; a line that was cut off by a crash ends them and is removed."""
    if not journal.exists():
        return []
    records, good = [], 0
    for line in journal.read_bytes().splitlines(keepends=True):
        try:
            records.append(Record.from_json(line.decode()))
        except (ValueError, TypeError, KeyError):
            break
        good += len(line)
    with journal.open("r+b") as file:
        file.truncate(good)
    return records
