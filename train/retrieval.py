"""Retrieval questions for training, made while it runs from any captioned file.

Both ways: which of several texts belongs to the picture, which of several pictures to the text.
Rivals are drawn from the same file and nowhere else: a file that is one part of a split by picture
(``evaluation.splitting``) never shows a picture of another part. They are the most alike of a few
drawn ones, but never the same picture, whatever its name, nor nearly the same text: both could be
right. The words of the question are those of ``evaluation.retrieval``.
"""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.retrieval import TASKS, retrieval_samples
from medmo_edge.samples import Sample, target_text
from medmo_edge.train.packing import named
from medmo_edge.train.picture_files import digest
from medmo_edge.train.sample_index import SampleIndex

CANDIDATES = 4  # the right one and three rivals, as a multiple choice of benchmarks has
DRAWN = 4  # samples drawn for every rival that is shown
TRIES = 50  # draws per rival before a file counts as too uniform
SAME = 0.8  # part of two texts' words from which on they count as saying the same
DIRECTIONS = 2  # picture to text, text to picture


def captioned(index: SampleIndex) -> NDArray[np.int64]:
    """The samples of a file that retrieval questions can be made of; none when they are too few."""
    rows = index.rows(*TASKS)
    return rows if len(rows) >= CANDIDATES else rows[:0]


@dataclass(frozen=True, slots=True)
class _Captioned:
    """A sample with what makes it different from others: words, and digests of its pictures."""

    sample: Sample
    words: frozenset[str]
    pictures: frozenset[bytes]

    def differs(self, other: "_Captioned") -> bool:
        """Whether only one of the two can be right."""
        if self.sample.id == other.sample.id or overlap(self.words, other.words) >= SAME:
            return False
        return self.pictures.isdisjoint(other.pictures)


def retrieval_sample(
    index: SampleIndex, rows: NDArray[np.int64], place: int, rng: np.random.Generator
) -> Sample:
    """Question number ``place`` of ``DIRECTIONS`` times ``rows``: the first way when it is even.

    Errors: SampleError for a broken sample, or a file without enough different texts and pictures.
    """
    row, direction = divmod(place, DIRECTIONS)
    right = _read(index, int(rows[row]))
    shown = [right, *_rivals(right, index, rows, rng)]
    both = retrieval_samples(
        [one.sample for one in shown], candidates=CANDIDATES, seed=int(rng.integers(2**32))
    )
    made = next(islice(both, direction, None))
    return replace(made, line=right.sample.line)


def _rivals(
    right: _Captioned, index: SampleIndex, rows: NDArray[np.int64], rng: np.random.Generator
) -> list[_Captioned]:
    """The drawn samples whose texts are most like the right one's, all different."""
    drawn = [right]
    for _ in range(TRIES * CANDIDATES):
        rival = _read(index, int(rows[rng.integers(len(rows))]))
        if all(rival.differs(other) for other in drawn):
            drawn.append(rival)
        if len(drawn) > DRAWN * (CANDIDATES - 1):
            break
    if len(drawn) < CANDIDATES:
        raise SampleError(
            f"{index.path}:{right.sample.line}: retrieval among {CANDIDATES} needs as many "
            f"different texts and pictures: the file has {len(drawn) - 1} beside this one"
        )
    alike = sorted(drawn[1:], key=lambda one: -overlap(right.words, one.words))
    return alike[: CANDIDATES - 1]


def _read(index: SampleIndex, row: int) -> _Captioned:
    sample = index.read(row)
    with named(sample, index.path):
        if not sample.images:
            raise SampleError("a captioned sample needs an image")
        words = frozenset(target_text(sample).lower().split())
        return _Captioned(sample, words, frozenset(map(digest, sample.images)))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """The part of all words that both texts have, 0..1; 1 for two empty ones."""
    return len(a & b) / len(a | b) if a or b else 1.0
