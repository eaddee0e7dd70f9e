"""Scores of answers against labels: boxes and short answers, with baselines and intervals.

Mean IoU here is over truth boxes: per image, truth and predicted boxes are paired by the
Hungarian method on IoU; a truth box without partner counts 0. Boxes too many do not lower it, so
their number is always reported beside it. No text similarity, no model judges.

Suffixes: N samples.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import match, pairwise_iou

XYXY = Sequence[float]
DRAWS = 2000  # bootstrap samples


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMatch:
    """IoU of every truth box of one image (0 when unmatched), and how many boxes were too many."""

    ious: tuple[float, ...]
    false_positives: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxScore:
    """Localisation on ``num_truth`` boxes of ``num_images`` images; the interval is 95 %."""

    mean_iou: float
    interval: tuple[float, float]
    at_50: float
    at_75: float
    false_positives: int
    num_truth: int
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScore:
    """Part of right answers with its 95 % interval, and what the best constant answer gets."""

    accuracy: float
    interval: tuple[float, float]
    baseline: float
    baseline_answer: str
    num_answers: int


def match_image(truth: Sequence[XYXY], predicted: Sequence[XYXY]) -> ImageMatch:
    """Pair the boxes of one image; both are XYXY in the same pixels, of one label."""
    overlaps = pairwise_iou(truth, predicted)
    pairs = match(truth, predicted)
    ious = [0.0] * len(truth)
    for i, j in pairs:
        ious[i] = float(overlaps[i, j])
    return ImageMatch(ious=tuple(ious), false_positives=len(predicted) - len(pairs))


def box_score(matches: Sequence[ImageMatch], seed: int = 0) -> BoxScore:
    """Scores over images; the bootstrap draws images, since boxes of one image are not independent.

    With no truth box at all the IoU figures are nan, and only false positives mean something.
    """
    sums = np.array([sum(found.ious) for found in matches], np.float64)
    sizes = np.array([len(found.ious) for found in matches], np.float64)
    ious = np.array([value for found in matches for value in found.ious])
    return BoxScore(
        mean_iou=_ratio(sums.sum(), sizes.sum()),
        interval=bootstrap(
            lambda drawn: _ratio(sums[drawn].sum(), sizes[drawn].sum()), len(matches), seed
        ),
        at_50=float(np.mean(ious >= 0.5)) if ious.size else float("nan"),
        at_75=float(np.mean(ious >= 0.75)) if ious.size else float("nan"),
        false_positives=sum(found.false_positives for found in matches),
        num_truth=int(sizes.sum()),
        num_images=len(matches),
    )


def answer_score(truth: Sequence[str], answers: Sequence[str], seed: int = 0) -> AnswerScore:
    """Accuracy of short answers, compared after ``normalise``, against the most frequent truth."""
    expected = [normalise(text) for text in truth]
    right = np.array(
        [normalise(text) == want for text, want in zip(answers, expected, strict=True)], np.float64
    )
    common, times = Counter(expected).most_common(1)[0]
    return AnswerScore(
        accuracy=float(right.mean()),
        interval=bootstrap(lambda drawn: float(right[drawn].mean()), len(right), seed),
        baseline=times / len(expected),
        baseline_answer=common,
        num_answers=len(expected),
    )


def normalise(answer: str) -> str:
    """Lower case, first sentence, no punctuation: "Yes." and "yes" are the same answer."""
    first = re.split(r"[.,;!\n]", answer.strip().lower(), maxsplit=1)[0]
    return " ".join(first.split())


def bootstrap(
    score: Callable[[NDArray[np.intp]], float], size: int, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``score`` over ``DRAWS`` resamples of ``size`` indices."""
    rng = np.random.default_rng(seed)
    values = np.array([score(rng.integers(size, size=size)) for _ in range(DRAWS)])
    known = values[~np.isnan(values)]
    low, high = np.percentile(known, [2.5, 97.5]) if known.size else (np.nan, np.nan)
    return float(low), float(high)


def _ratio(total: float, size: float) -> float:
    return float(total / size) if size else float("nan")
