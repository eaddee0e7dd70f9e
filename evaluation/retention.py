"""How much of the reference's score an artifact keeps, with an interval small sets cannot fool.

Both sides answered the same questions, so the interval is paired: pictures are drawn with
replacement, each with the scores of both. Twenty answers that all agree do not prove 99 %, and two
that differ prove no loss: every draw therefore also holds, once in n + 1, an invented picture, for
the lower end one on which the artifact loses everything, for the upper end one on which it keeps
everything. With nothing lost, n pictures show about 1 - 3 / n (the rule of three).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmo_edge.evaluation.measure import Record
from medmo_edge.evaluation.truth import Kind

DRAWS = 2000
_ENOUGH_DRAWS = 500
_MOST_PICTURES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """``value`` = artifact / reference with its 95 % ``interval``; both scores are means.

    ``pictures`` counts what is independent; ``questions`` of them were scored.
    """

    kind: Kind
    reference: float
    artifact: float
    value: float
    interval: tuple[float, float]
    pictures: int
    questions: int


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Summed scores of artifact and reference per picture, and the sum of weights."""

    artifact: NDArray[np.float64]
    reference: NDArray[np.float64]
    weight: float
    questions: int


def retention(records: Iterable[Record], kind: Kind, seed: int = 0) -> Retention | None:
    """None when no record has such a score, or the reference itself scores nothing."""
    pairs = _pairs(records, kind)
    if pairs is None or pairs.reference.sum() == 0:
        return None
    size = len(pairs.reference)
    low, high = _interval(pairs, size, DRAWS, seed)
    return Retention(
        kind=kind,
        reference=float(pairs.reference.sum() / pairs.weight),
        artifact=float(pairs.artifact.sum() / pairs.weight),
        value=float(pairs.artifact.sum() / pairs.reference.sum()),
        interval=(low, high),
        pictures=size,
        questions=pairs.questions,
    )


def pictures_needed(records: Iterable[Record], kind: Kind, threshold: float) -> int | None:
    """About how many pictures like these would show ``threshold``; None when none would do."""
    pairs = _pairs(records, kind)
    if pairs is None or pairs.artifact.sum() <= threshold * pairs.reference.sum():
        return None
    size = len(pairs.reference)
    while size <= _MOST_PICTURES:
        if _interval(pairs, size, _ENOUGH_DRAWS, 0)[0] >= threshold:
            return _round_up(size)
        size = int(size * 1.2) + 1
    return None


def _pairs(records: Iterable[Record], kind: Kind) -> _Pairs | None:
    sums: dict[str, list[float]] = {}
    weight, questions = 0.0, 0
    for record in records:
        scores = record.scores
        if scores is None or scores["reference"].kind != kind:
            continue
        row = sums.setdefault(record.picture, [0.0, 0.0])
        row[0] += scores["artifact"].value
        row[1] += scores["reference"].value
        weight += scores["reference"].weight
        questions += 1
    if not sums:
        return None
    columns = np.array(list(sums.values()), np.float64)
    return _Pairs(columns[:, 0], columns[:, 1], weight, questions)


def _interval(pairs: _Pairs, size: int, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval over draws of ``size`` + 1 pictures, the invented one among them."""
    known = len(pairs.reference)
    chances = np.full(known + 1, size / (size + 1) / known)
    chances[-1] = 1 / (size + 1)
    counts = np.random.default_rng(seed).multinomial(size + 1, chances / chances.sum(), draws)
    usual = pairs.reference.mean()
    totals = counts @ np.append(pairs.reference, usual)
    known_draws = totals > 0
    lost, kept = (
        (counts @ np.append(pairs.artifact, invented))[known_draws] / totals[known_draws]
        for invented in (0.0, usual)
    )
    return float(np.percentile(lost, 2.5)), float(np.percentile(kept, 97.5))


def _round_up(size: int) -> int:
    """Two significant digits: the estimate is no better."""
    step: int = 10 ** max(0, len(str(size)) - 2)
    return -(-size // step) * step
