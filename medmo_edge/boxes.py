"""Boxes: read them out of answers, write them into answers, convert coordinates, compare them.

Understands MedMO's ``label <box>[[x1, y1, x2, y2], ...]</box>`` and Qwen3-VL's JSON ``bbox_2d``,
both broken in the ways models break them. It never guesses a box: what cannot be read safely comes
back as a reason in ``Parsed.rejected``. It does not know points, polygons or scores.

Every box is XYXY, half-open, in source pixels. Suffixes: N truth boxes, M predicted boxes.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medmo_edge.errors import UsageError

Coords = Literal["norm1000", "pixel_resized", "pixel_original"]
COORDS: tuple[Coords, ...] = get_args(Coords)

XYXY = tuple[float, float, float, float]

NORM = 1000  # Qwen3-VL's grid: 0..1000 along each side of the image
SLACK = 0.02  # part of a side by which a value may lie outside before the box is rejected
MAX_LABEL = 120  # characters; a longer "label" is prose, of which the end names the finding

# No pattern below can backtrack: every answer, however hostile, is read in linear time.
_TAG = re.compile(r"<(/?)box>", re.IGNORECASE)
_NUMBERS_ONLY = re.compile(r"[\s0-9.,\[\]()+-]*")
_BRACKETS = re.compile(r"[\[\]]+")
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")
_WORDS = re.compile(r"[^\W\d_]|%")
_OBJECT = re.compile(r"\{[^{}]*\}?")
_IMAGE = re.compile(r"\b(?:image|picture) #?([0-9]{1,4})\b[ :,]*", re.IGNORECASE)
_MARKUP = re.compile(r"</?ref>|[*`#_]+")
_LIST_MARK = re.compile(r"(?:\(?[0-9]{1,3}[.):]|[-+\u2022])\s")
_SENTENCE_END = re.compile(r"[a-z0-9)\]]{3}[.!?;]\s")


@dataclass(frozen=True, slots=True)
class Box:
    """One finding in source pixels of image number ``image``: XYXY, half-open, x2 > x1, y2 > y1."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    image: int = 0

    @property
    def xyxy(self) -> XYXY:
        """The four coordinates in source pixels."""
        return self.x1, self.y1, self.x2, self.y2

    @property
    def area(self) -> float:
        """Area in square pixels."""
        return _area(self.xyxy)

    def to_dict(self) -> dict[str, Any]:
        """The form printed by ``--json``: label, image, xyxy to a hundredth of a pixel."""
        xyxy = [round(value, 2) for value in self.xyxy]
        return {"label": self.label, "image": self.image, "xyxy": xyxy}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The three sizes of one picture, in pixels.

    ``width, height``: the source (DICOM Columns, Rows). ``frame_*``: the decoded frame, which
    differs when non-square pixels were made square. ``resized_*``: what the model sees.
    """

    width: int
    height: int
    frame_width: int
    frame_height: int
    resized_width: int
    resized_height: int

    def limits(self, coords: Coords) -> tuple[int, int]:
        """Largest x and y a model can write in this convention. Errors: UsageError if unknown."""
        if coords == "norm1000":
            return NORM, NORM
        if coords == "pixel_resized":
            return self.resized_width, self.resized_height
        if coords == "pixel_original":
            return self.frame_width, self.frame_height
        raise UsageError(f"coords {coords!r} is unknown: use one of {', '.join(COORDS)}")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an answer said: the boxes that could be read, and one reason per box that could not."""

    boxes: tuple[Box, ...]
    rejected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Finding:
    """Rows of coordinates as written, the text before them, and what could not be read."""

    prose: str
    label: str | None
    rows: tuple[tuple[float, ...], ...]
    problems: tuple[str, ...]


def to_source(values: Sequence[float], geometry: Geometry, coords: Coords) -> XYXY:
    """Model coordinates (x1, y1, x2, y2) to source pixels; nothing is clamped or reordered."""
    x_limit, y_limit = geometry.limits(coords)
    x1, y1, x2, y2 = (float(value) for value in values)
    x_scale, y_scale = geometry.width / x_limit, geometry.height / y_limit
    return x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale


def to_model(
    xyxy: Sequence[float], geometry: Geometry, coords: Coords
) -> tuple[int, int, int, int]:
    """Source pixels to the integers a model writes, clamped to the image; inverse of ``to_source``.

    The error is at most half a unit, or one unit for a side so short that rounding would erase it:
    such a side keeps one unit, because a box without area cannot be read back.
    """
    x_limit, y_limit = geometry.limits(coords)
    x1, y1, x2, y2 = xyxy
    left, right = _to_units(x1, x2, geometry.width, x_limit)
    top, bottom = _to_units(y1, y2, geometry.height, y_limit)
    return left, top, right, bottom


def _to_units(low: float, high: float, side: int, limit: int) -> tuple[int, int]:
    first, last = (min(limit, max(0, round(value * limit / side))) for value in (low, high))
    if last > first:
        return first, last
    middle = min(limit - 1, max(0, math.floor((low + high) / 2 * limit / side)))
    return middle, middle + 1


def format_boxes(label: str, rows: Iterable[Sequence[int]]) -> str:
    """One label's boxes as MedMO writes them: ``WBC <box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>``."""
    inner = ", ".join(f"[{', '.join(str(value) for value in row)}]" for row in rows)
    return f"{label} <box>[{inner}]</box>"


def render_boxes(boxes: Sequence[Box], geometry: Geometry, coords: Coords) -> str:
    """The answer text for ``boxes`` of one image: labels in order, rows sorted by x1 then y1."""
    rows: dict[str, list[tuple[int, int, int, int]]] = {}
    for box in boxes:
        rows.setdefault(box.label, []).append(to_model(box.xyxy, geometry, coords))
    return ", ".join(format_boxes(label, sorted(found)) for label, found in rows.items())


def parse_boxes(text: str, geometries: Sequence[Geometry], coords: Coords) -> Parsed:
    """Boxes of an answer about the images of ``geometries``, in source pixels.

    With several images, the last "Image N" or "Picture N" (counted from 1) before a box says where
    it belongs; without one it belongs to the first. Values slightly outside are clamped, swapped
    corners put in order. Time is linear in the length of ``text``.
    """
    boxes: list[Box] = []
    rejected: list[str] = []
    label, image = "", 0
    findings = _tagged_findings(text) if _TAG.search(text) else _json_findings(text)
    for finding in findings:
        image = _image_named(finding.prose, len(geometries), image)
        if finding.label is None:  # <box> without a name of its own continues the previous one
            label = _clean_label(finding.prose, len(geometries) > 1) or label
        else:
            label = finding.label
        rejected += [f"{label or 'box'}: {problem}" for problem in finding.problems]
        for row in finding.rows:
            box = _read_row(row, label, image, geometries, coords)
            if isinstance(box, Box):
                boxes.append(box)
            else:
                rejected.append(f"{label or 'box'} {_show(row)}: {box}")
    return Parsed(tuple(boxes), tuple(rejected))


def _read_row(
    row: Sequence[float], label: str, image: int, geometries: Sequence[Geometry], coords: Coords
) -> Box | str:
    """The box that four numbers mean, or the reason why they mean none."""
    if image >= len(geometries):
        return f"it names image {image + 1}, but there are {len(geometries)}"
    geometry = geometries[image]
    x1, y1, x2, y2 = row
    x_limit, y_limit = geometry.limits(coords)
    if not all(math.isfinite(value) for value in row):
        return "not a number"
    if coords == "norm1000" and max(row) <= 1 and any(value % 1 for value in row):
        return "these look like fractions of the image, not a 0..1000 grid"
    upper = 0.0 if coords == "norm1000" else SLACK
    for low, high, limit in (
        (min(x1, x2), max(x1, x2), x_limit),
        (min(y1, y2), max(y1, y2), y_limit),
    ):
        if high > limit * (1 + upper) or low < -SLACK * limit:
            return f"outside the image (0..{limit})"
    left, right = (min(max(value, 0.0), x_limit) for value in sorted((x1, x2)))
    top, bottom = (min(max(value, 0.0), y_limit) for value in sorted((y1, y2)))
    if left >= right or top >= bottom:
        return "zero area"
    return Box(label, *to_source((left, top, right, bottom), geometry, coords), image)


def _tagged_findings(text: str) -> Iterator[_Finding]:
    """The ``label <box>...</box>`` pieces of an answer; a missing ``</box>`` is forgiven."""
    position, prose = 0, ""  # the next label starts at position, where the last finding ended
    opened: int | None = None
    for tag in [*_TAG.finditer(text), None]:
        if opened is not None:
            closed = tag is not None and tag[1] == "/"
            limit = tag.start() if tag else len(text)
            end = limit if closed else _numbers_end(text, opened, limit)
            rows, problems = _read_rows(text[opened:end], cut=end == len(text))
            yield _Finding(prose, None, rows, problems)
            position = tag.end() if tag and closed else end
        opened = None
        if tag is not None and tag[1] == "":
            prose, opened = text[position : tag.start()], tag.end()


def _numbers_end(text: str, start: int, limit: int) -> int:
    """Where the coordinates after an unclosed ``<box>`` end, before any following list number."""
    found = _NUMBERS_ONLY.match(text, start, limit)
    end = found.end() if found else start
    bracket = text.rfind("]", start, end)
    return bracket + 1 if bracket >= 0 and end < len(text) else end


def _read_rows(body: str, *, cut: bool) -> tuple[tuple[tuple[float, ...], ...], tuple[str, ...]]:
    """Rows of four between brackets of any balance; ``cut``: the answer ends inside ``body``."""
    rows: list[tuple[float, ...]] = []
    problems: list[str] = []
    pieces = _BRACKETS.split(body) if body else []
    for index, piece in enumerate(pieces):
        values = [float(value) for value in _NUMBER.findall(piece)]
        if not values:
            continue
        if cut and index == len(pieces) - 1:
            problems.append(f"{_show(values)} is cut off at the end of the answer")
        elif _WORDS.search(piece):
            problems.append(f"{_quote(piece)} is not a list of numbers")
        elif len(values) % 4:
            problems.append(f"{_show(values)} has {len(values)} numbers, not 4")
        else:
            rows += [tuple(values[at : at + 4]) for at in range(0, len(values), 4)]
    return tuple(rows), tuple(problems)


def _json_findings(text: str) -> Iterator[_Finding]:
    """Qwen's ``{"bbox_2d": [...], "label": "..."}`` objects, fenced, listed, single or cut off."""
    position = 0
    for found in _OBJECT.finditer(text):
        if '"bbox' not in found[0]:
            continue
        prose, position = text[position : found.start()], found.end()
        yield _read_object(prose, found[0])


def _read_object(prose: str, source: str) -> _Finding:
    if not source.endswith("}"):
        return _Finding(prose, "", (), (f"{_quote(source)} is cut off at the end of the answer",))
    try:
        item = json.loads(source, parse_int=float)
    except (ValueError, RecursionError):
        return _Finding(prose, "", (), (f"{_quote(source)} is not valid JSON",))
    value = item.get("bbox_2d", item.get("bbox"))
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    good = tuple(tuple(row) for row in rows if _is_row(row))
    bad = tuple(
        f"{_quote(json.dumps(row))} is not four numbers" for row in rows if not _is_row(row)
    )
    label = item.get("label")
    return _Finding(prose, " ".join(label.split()) if isinstance(label, str) else "", good, bad)


def _is_row(row: object) -> bool:
    return (
        isinstance(row, list) and len(row) == 4 and all(isinstance(value, float) for value in row)
    )


def _image_named(prose: str, num_images: int, current: int) -> int:
    """Index of the image that ``prose`` names last, else ``current``."""
    if num_images == 1:
        return current
    named = _IMAGE.findall(prose)
    return max(0, int(named[-1]) - 1) if named else current


def _clean_label(prose: str, several_images: bool) -> str:
    """The finding's name at the end of ``prose``, without list numbers, markup, joining words."""
    line = prose[-4 * MAX_LABEL :].rstrip().rpartition("\n")[2]
    if not line:
        return ""
    line = _MARKUP.sub("", _IMAGE.sub("", line) if several_images else line)
    ends = list(_SENTENCE_END.finditer(line))
    line = line[ends[-1].end() :] if ends else line
    line = line.lstrip(" \t,;:.&|)]").rstrip(" \t,;:.=(-\u2013\u2014")
    mark = _LIST_MARK.match(line)
    line = line[mark.end() :].strip() if mark else line
    if line.lower().startswith("and "):
        line = line[4:]
    label = " ".join(line.split())
    label = "" if label.lower() == "and" else label
    return label if len(label) <= MAX_LABEL else label[-MAX_LABEL:].partition(" ")[2]


def _show(values: Sequence[float]) -> str:
    return _quote(f"[{', '.join(f'{value:g}' for value in values[:8])}]")


def _quote(text: str) -> str:
    """``text`` on one short line."""
    line = " ".join(text[:200].split())
    return line if len(line) <= 80 else f"{line[:77]}..."


def _area(xyxy: Sequence[float]) -> float:
    return max(0.0, xyxy[2] - xyxy[0]) * max(0.0, xyxy[3] - xyxy[1])


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two XYXY boxes; 0 for a box without area, even with itself."""
    return float(pairwise_iou([a], [b])[0, 0])


def giou(a: Sequence[float], b: Sequence[float]) -> float:
    """Generalised IoU, -1..1 (Rezatofighi et al. 2019): IoU minus the empty part of the hull.

    Two boxes without area give -1, the worst value; one without area counts as an empty set, so it
    gives 0 inside the other box and less outside.
    """
    union = _union(a, b)
    hull = _area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    return iou(a, b) - (hull - union) / hull if union > 0 else -1.0


def _union(a: Sequence[float], b: Sequence[float]) -> float:
    shared = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return _area(a) + _area(b) - _area(shared)


def pairwise_iou(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """IoU [N, M] of every box of ``a`` [N, 4] with every box of ``b`` [M, 4]; N or M may be 0."""
    a_N4, b_M4 = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (a, b))
    low_NM2 = np.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high_NM2 = np.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    shared_NM = np.clip(high_NM2 - low_NM2, 0, None).prod(axis=2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (a_N4, b_M4)]
    union_NM = areas[0][:, None] + areas[1][None, :] - shared_NM
    iou_NM: NDArray[np.float64] = shared_NM / np.where(union_NM > 0, union_NM, np.inf)
    return iou_NM


def assign(score_NM: ArrayLike) -> list[tuple[int, int]]:
    """The one-to-one pairing (i, j) of min(N, M) pairs with the largest total score (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(np.asarray(score_NM, np.float64), maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]


def match(truth: ArrayLike, predicted: ArrayLike) -> list[tuple[int, int]]:
    """Pairs (truth index, predicted index) of largest total IoU; boxes that touch nothing stay out.

    ``truth`` [N, 4] and ``predicted`` [M, 4] are XYXY. Labels are the caller's business.
    """
    iou_NM = pairwise_iou(truth, predicted)
    return [(i, j) for i, j in assign(iou_NM) if iou_NM[i, j] > 0]
