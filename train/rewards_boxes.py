"""Rewards for boxes: place, overlap, label, number, form, and no box twice.

Pure functions of plain values, each in 0..1, 1 for the perfect answer. They need numpy and scipy,
no torch. ``box_reward`` is MedMO's (paper, section 3.5) with its penalties switched on: as printed,
boxes too many cost nothing. They do not read pictures.

Suffixes: G truth boxes, P predicted boxes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import (
    MAX_LABEL,
    XYXY,
    Box,
    Coords,
    Geometry,
    assign,
    pairwise_iou,
    parse_boxes,
)

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0  # the paper's
#: what a box too many, and one too few, cost. A random box already earns 0.5 to 0.6 of a match, so
#: a penalty of half a match is what makes guessing another box a loss.
FP_WEIGHT = FN_WEIGHT = 0.5
#: what a box anywhere earns by the paper's formula (0.4 to 0.6), which leaves little above it
FLOOR = 0.5
NAMED = 0.1  # IoU from which a box may claim to name what is there
TOLERANCE = 0.2  # IoU that two boxes of a label may share before they count as the same box
_EPSILON = 1e-6

Size = tuple[float, float]
Place = tuple[int, str]  # image and label: boxes match only within one

_TAGS = re.compile(r"</?box>", re.IGNORECASE)
_ROW = r"\[\s*\d{1,5}\s*,\s*\d{1,5}\s*,\s*\d{1,5}\s*,\s*\d{1,5}\s*\]"
_BODY = re.compile(rf"<box>\s*\[\s*{_ROW}(?:\s*,\s*{_ROW})*\s*\]\s*</box>")


@dataclass(frozen=True, slots=True)
class _Matched:
    """Sums over groups of boxes: matched scores, matches, predicted and truth boxes."""

    score: float
    matches: int
    predicted: int
    truth: int


def box_reward(
    predicted: Sequence[XYXY],
    truth: Sequence[XYXY],
    *,
    size: Size,
    fp_weight: float = FP_WEIGHT,
    fn_weight: float = FN_WEIGHT,
    floor: float = 0.0,
) -> float:
    """MedMO's box reward of one picture of ``size`` (width, height), boxes XYXY in its pixels.

    Pairs by the Hungarian method on 5 * L1 + 2 * (1 - GIoU), where L1 is the summed distance of the
    four coordinates over twice the diagonal. A pair scores
    (5 * (1 - L1) + 2 * (GIoU + 1) / 2) / 7; the result is the sum of pairs / G minus
    (fn_weight * missing + fp_weight * too many) / G, cut to 0..1. With ``floor`` a pair earns
    (score - floor) / (1 - floor), at least 0: see ``FLOOR``.

    Nothing to find: 1 for no box, else 0. A predicted box without area, or with a value that is no
    number, matches nothing and is one too many; a truth box without area is ignored.
    """
    return _settle([_match(predicted, truth, size, floor)], fp_weight, fn_weight)


def labelled_box_reward(
    predicted: Sequence[Box],
    truth: Sequence[Box],
    *,
    sizes: Sequence[Size],
    fp_weight: float = FP_WEIGHT,
    fn_weight: float = FN_WEIGHT,
    floor: float = 0.0,
) -> float:
    """``box_reward`` over several pictures and labels: boxes match within picture and label only.

    ``sizes`` has (width, height) per picture.
    """
    found, wanted = _by_place(predicted), _by_place(truth)
    matched = [
        _match(found.get(place, []), wanted.get(place, []), sizes[place[0]], floor)
        for place in sorted(found.keys() | wanted.keys())
    ]
    return _settle(matched, fp_weight, fn_weight)


def iou_reward(predicted: Sequence[Box], truth: Sequence[Box], *, threshold: float = 0.0) -> float:
    """Sum of the IoU of matched boxes over the larger number of boxes.

    Pairs under ``threshold`` earn nothing, so raising it makes the task harder. Nothing to find: 1
    for no box, else 0. Unlike ``box_reward`` it gives a far box nothing.
    """
    found, wanted = _by_place(predicted), _by_place(truth)
    total, most = 0.0, 0
    for place in sorted(found.keys() | wanted.keys()):
        kept = _areas(wanted.get(place, []))
        iou_GP = pairwise_iou(kept, _areas(found.get(place, [])))
        total += sum(float(iou_GP[i, j]) for i, j in assign(iou_GP) if iou_GP[i, j] >= threshold)
        most += max(len(kept), len(found.get(place, [])))
    return min(1.0, total / most) if most else 1.0


def label_reward(predicted: Sequence[Box], truth: Sequence[Box]) -> float:
    """Part of the boxes that name the right thing: paired by place, whatever the label.

    Right labels of pairs with an IoU of ``NAMED`` or more, over the larger number of boxes; 1 when
    neither has any. A place may be right for two labels (a mass in an effusion), so among equal
    overlaps the right label wins.
    """
    most = max(len(predicted), len(truth))
    right = 0
    for image in {box.image for box in truth}:
        wanted = [box for box in truth if box.image == image and box.area > 0]
        found = [box for box in predicted if box.image == image and _is_box(box.xyxy)]
        if not wanted or not found:
            continue
        iou_GP = pairwise_iou([box.xyxy for box in wanted], [box.xyxy for box in found])
        same_GP = np.array([[_name(a.label) == _name(b.label) for b in found] for a in wanted])
        named_GP = iou_GP >= NAMED
        pairs = assign(named_GP * (iou_GP + _EPSILON * same_GP))
        right += sum(bool(named_GP[i, j] and same_GP[i, j]) for i, j in pairs)
    return right / most if most else 1.0


def count_reward(predicted: Sequence[Box], truth: Sequence[Box]) -> float:
    """Agreement of the numbers of boxes per picture and label: sum of minima over sum of maxima.

    1 when neither has any.
    """
    found = Counter((box.image, _name(box.label)) for box in predicted)
    wanted = Counter((box.image, _name(box.label)) for box in truth)
    most = sum((found | wanted).values())
    return sum((found & wanted).values()) / most if most else 1.0


def distinct_reward(predicted: Sequence[Box], truth: Sequence[Box]) -> float:
    """1 minus the mean surplus overlap of boxes of one label: the same box said again earns less.

    Overlaps up to the largest among the truth boxes of that label (at least ``TOLERANCE``) are
    free. When one side has no box: 1 if neither has any, else 0.
    """
    if not predicted or not truth:
        return float(not predicted and not truth)
    wanted = _by_place(truth)
    surplus = 0.0
    for place, boxes in _by_place(predicted).items():
        free = max(TOLERANCE, float(_closest(wanted.get(place, [])).max(initial=0.0)))
        overlap = _closest(boxes)
        surplus += float(np.clip((overlap - free) / max(1 - free, _EPSILON), 0, 1).sum())
    return 1 - surplus / len(predicted)


def format_reward(
    text: str, truth: Sequence[Box], *, geometries: Sequence[Geometry], coords: Coords
) -> float:
    """1 when the answer is a list of ``label <box>[[x1, y1, x2, y2], ...]</box>``, else 0.

    Every piece has a label and whole numbers inside the picture, in order. With nothing to find: 1
    for any text without tags. An answer without text is 0.
    """
    if not text.strip():
        return 0.0
    if not truth:
        return 0.0 if _TAGS.search(text) else 1.0
    *between, last = (part.strip(" \n\t,;:.") for part in _BODY.split(text))
    tidy = bool(between) and not last and all(map(_is_label, between))
    in_order = all(_in_order(body) for body in _BODY.findall(text))
    return float(tidy and in_order and not parse_boxes(text, geometries, coords).rejected)


def _is_label(text: str) -> bool:
    return 0 < len(text) <= MAX_LABEL and not re.search(r"[<>\[\]]", text)


def _in_order(body: str) -> bool:
    numbers = [int(value) for value in re.findall(r"\d+", body)]
    rows = zip(*[iter(numbers)] * 4, strict=True)
    return all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in rows)


def _match(predicted: Sequence[XYXY], truth: Sequence[XYXY], size: Size, floor: float) -> _Matched:
    kept = _areas(truth)
    usable = _areas(predicted)
    l1_GP, giou_GP = _terms(kept, usable, size)
    score_GP = (L1_WEIGHT * (1 - np.clip(l1_GP, 0, 1)) + GIOU_WEIGHT * (giou_GP + 1) / 2) / (
        L1_WEIGHT + GIOU_WEIGHT
    )
    cost_GP = L1_WEIGHT * l1_GP + GIOU_WEIGHT * (1 - giou_GP)
    # The score decides between equal costs, so that the order of the boxes never does.
    pairs = assign(_EPSILON * score_GP - cost_GP)
    total = sum(max(0.0, float(score_GP[i, j]) - floor) / (1 - floor) for i, j in pairs)
    return _Matched(total, len(pairs), len(predicted), len(kept))


def _settle(groups: Iterable[_Matched], fp_weight: float, fn_weight: float) -> float:
    groups = list(groups)
    score, matches, predicted, truth = (
        sum(getattr(group, name) for group in groups) for name in _Matched.__slots__
    )
    if truth == 0:
        return float(predicted == 0)
    penalty = fn_weight * (truth - matches) + fp_weight * (predicted - matches)
    return float(min(1.0, max(0.0, (score - penalty) / truth)))


def _terms(
    truth: Sequence[XYXY], predicted: Sequence[XYXY], size: Size
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """L1 and GIoU [G, P] of boxes that all have an area."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (truth, predicted))
    l1_GP = np.abs(a[:, None] - b[None]).sum(axis=2) / (2 * np.hypot(*size))
    low, high = np.minimum(a[:, None], b[None]), np.maximum(a[:, None], b[None])
    hull_GP = (high[..., 2:] - low[..., :2]).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    iou_GP = pairwise_iou(a, b)
    union_GP = (areas[0][:, None] + areas[1][None]) / (1 + iou_GP)
    return l1_GP, iou_GP - (hull_GP - union_GP) / hull_GP


def _closest(boxes: Sequence[XYXY]) -> NDArray[np.float64]:
    """[N] the IoU of each box with the most similar other one; 0 for a box alone."""
    iou_NN = pairwise_iou(boxes, boxes)
    for index, box in enumerate(boxes):
        iou_NN[index, index] = 0.0
        if not _is_box(box):  # without an area it overlaps nothing, but is never a box of its own
            iou_NN[index, :] = 1.0
    closest_N: NDArray[np.float64] = iou_NN.max(axis=1, initial=0.0)
    return closest_N


def _areas(boxes: Sequence[XYXY]) -> list[XYXY]:
    return [box for box in boxes if _is_box(box)]


def _is_box(box: XYXY) -> bool:
    return all(map(np.isfinite, box)) and box[2] > box[0] and box[3] > box[1]


def _by_place(boxes: Iterable[Box]) -> Mapping[Place, list[XYXY]]:
    places: dict[Place, list[XYXY]] = {}
    for box in boxes:
        places.setdefault((box.image, _name(box.label)), []).append(box.xyxy)
    return places


def _name(label: str) -> str:
    """Labels are compared without case and outer white space; "nodule" is not "nodules"."""
    return " ".join(label.split()).casefold()
