"""How far one side of a case is from another: images, features, logits, tokens, boxes.

Figures only, plain numbers that go into JSON; what is too far is for the gates to say.

Shape suffixes: M vision tokens, D hidden size, T tokens of an answer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box
from medmo_edge.evaluation.reference import Trace
from medmo_edge.evaluation.scores import match_image

Array = NDArray[np.float32]

#: stands for "as far as can be" where two sides cannot be compared at all; JSON has no infinity
APART = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureGap:
    """One level of the vision features; ``error`` is |a - b| / |b| of a token's vector."""

    mean_cosine: float
    worst_cosine: float
    mean_error: float
    worst_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitGap:
    """Logits of one position or several: KL in nats from the base's distribution, the largest
    difference of one logit, and how often the most likely token is the same.
    """

    mean_kl: float
    max_kl: float
    max_difference: float
    top1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """One side against its base, on one case.

    ``first_difference``: index of the first token that differs, None without one; ``margin``: by
    how much the base's best logit led there, None where it is not known. ``box_iou``: mean IoU of
    both answers' boxes, None when neither has one.
    """

    features: tuple[FeatureGap, ...]
    prefill: LogitGap
    answer: LogitGap
    first_difference: int | None
    margin: float | None
    box_iou: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Gap":
        """Read what ``to_dict`` wrote."""
        return cls(
            features=tuple(FeatureGap(**level) for level in values["features"]),
            prefill=LogitGap(**values["prefill"]),
            answer=LogitGap(**values["answer"]),
            first_difference=values["first_difference"],
            margin=values["margin"],
            box_iou=values["box_iou"],
        )


def gap(side: Trace, base: Trace, forced_TV: Array, base_forced_TV: Array, levels: int) -> Gap:
    """``side`` against ``base``; the two logits [T, V] belong to the same tokens.

    ``levels``: number of deepstack levels beside the main features.
    """
    first = first_difference(side.tokens, base.tokens)
    return Gap(
        features=feature_gaps(side.features, base.features, 1 + levels),
        prefill=logit_gap(forced_TV[:1], base_forced_TV[:1]),
        answer=logit_gap(forced_TV, base_forced_TV),
        first_difference=first,
        margin=None if first is None else _margin(base, first),
        box_iou=box_agreement(side.boxes, base.boxes),
    )


def patch_difference(side: Sequence[Array], base: Sequence[Array]) -> float:
    """Largest difference of any value of the images' patches; ``APART`` for other shapes."""
    if [each.shape for each in side] != [each.shape for each in base]:
        return APART
    return max((float(np.abs(a - b).max()) for a, b in zip(side, base, strict=True)), default=0.0)


def feature_gaps(
    side: Sequence[Array], base: Sequence[Array], num_levels: int
) -> tuple[FeatureGap, ...]:
    """One gap per level over the tokens of all images; none when there are no images."""
    if not base:
        return ()
    if [each.shape for each in side] != [each.shape for each in base]:
        far = FeatureGap(mean_cosine=-1, worst_cosine=-1, mean_error=APART, worst_error=APART)
        return (far,) * num_levels
    parts = [np.split(np.concatenate(rows), num_levels, axis=1) for rows in (side, base)]
    return tuple(_feature_gap(a, b) for a, b in zip(*parts, strict=True))


def _feature_gap(side_MD: Array, base_MD: Array) -> FeatureGap:
    a, b = side_MD.astype(np.float64), base_MD.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine_M = (a * b).sum(axis=1) / np.maximum(lengths, 1e-30)
    error_M = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)
    return FeatureGap(
        mean_cosine=_finite(cosine_M.mean(), -1),
        worst_cosine=_finite(cosine_M.min(), -1),
        mean_error=_finite(error_M.mean(), APART),
        worst_error=_finite(error_M.max(), APART),
    )


def logit_gap(side_TV: Array, base_TV: Array) -> LogitGap:
    """Both [T, V]; ``APART`` when the shapes differ or a logit is not a number."""
    if side_TV.shape != base_TV.shape or not np.isfinite(side_TV).all():
        return LogitGap(mean_kl=APART, max_kl=APART, max_difference=APART, top1=0.0)
    side, base = (_log_softmax(each) for each in (side_TV, base_TV))
    kl_T = np.maximum((np.exp(base) * (base - side)).sum(axis=1), 0)  # rounding can go below 0
    return LogitGap(
        mean_kl=float(kl_T.mean()),
        max_kl=float(kl_T.max()),
        max_difference=float(np.abs(side_TV - base_TV).max()),
        top1=float((side_TV.argmax(axis=1) == base_TV.argmax(axis=1)).mean()),
    )


def _log_softmax(logits_TV: Array) -> NDArray[np.float64]:
    values = logits_TV.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=1, keepdims=True)))


def first_difference(side: Sequence[int], base: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, None when they are equal."""
    for index, (a, b) in enumerate(zip(side, base, strict=False)):
        if a != b:
            return index
    return None if len(side) == len(base) else min(len(side), len(base))


def margins(logits_TV: Array) -> Array:
    """By how much the best logit of each position leads the second best [T]."""
    best = np.partition(logits_TV, -2, axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], np.float32)


def _margin(base: Trace, first: int) -> float | None:
    if first >= len(base.logits_TV):
        return None
    return float(margins(base.logits_TV[first : first + 1])[0])


def box_agreement(side: Sequence[Box], base: Sequence[Box]) -> float | None:
    """Mean IoU of the boxes of two answers, paired by image and label; a box alone counts 0.

    None when neither has a box.
    """
    total, count = 0.0, 0
    for key in {(box.image, box.label.lower()) for box in (*side, *base)}:
        ours, theirs = (
            [box.xyxy for box in boxes if (box.image, box.label.lower()) == key]
            for boxes in (side, base)
        )
        total += sum(match_image(theirs, ours).ious)
        count += max(len(ours), len(theirs))
    return total / count if count else None


def _finite(value: float, otherwise: float) -> float:
    return float(value) if np.isfinite(value) else otherwise
