"""Coordinates of the three conventions and back, overlap measures, and Hungarian matching."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.boxes import (
    COORDS,
    Coords,
    Geometry,
    assign,
    giou,
    iou,
    match,
    pairwise_iou,
    parse_boxes,
    to_model,
    to_source,
)
from medmo_edge.errors import UsageError

side = st.integers(1, 8000)
geometries = st.builds(
    Geometry,
    width=side,
    height=side,
    frame_width=side,
    frame_height=side,
    resized_width=side,
    resized_height=side,
)


@st.composite
def geometry_and_box(draw: st.DrawFn) -> tuple[Geometry, tuple[float, float, float, float]]:
    geometry = draw(geometries)
    fractions = st.floats(0, 1, allow_subnormal=False)
    x = sorted(draw(fractions) * geometry.width for _ in range(2))
    y = sorted(draw(fractions) * geometry.height for _ in range(2))
    return geometry, (x[0], y[0], x[1], y[1])


@given(geometry_and_box(), st.sampled_from(COORDS))
def test_source_to_model_and_back_loses_only_the_rounding(
    case: tuple[Geometry, tuple[float, float, float, float]], coords: Coords
) -> None:
    geometry, xyxy = case
    rows = to_model(xyxy, geometry, coords)
    assert all(isinstance(value, int) for value in rows)
    x_limit, y_limit = geometry.limits(coords)
    assert 0 <= rows[0] < rows[2] <= x_limit and 0 <= rows[1] < rows[3] <= y_limit
    units = geometry.width / x_limit, geometry.height / y_limit
    back = to_source(rows, geometry, coords)
    for axis in (0, 1):
        # Half a unit, or one where rounding would have erased the side.
        erased = rows[axis + 2] - rows[axis] == 1
        allowed = units[axis] * (1.0 if erased else 0.5) + 1e-6
        assert abs(back[axis] - xyxy[axis]) <= allowed
        assert abs(back[axis + 2] - xyxy[axis + 2]) <= allowed


@given(geometries, st.data(), st.sampled_from(COORDS))
def test_model_to_source_and_back_is_exact(
    geometry: Geometry, data: st.DataObject, coords: Coords
) -> None:
    x_limit, y_limit = geometry.limits(coords)
    x1, y1 = data.draw(st.integers(0, x_limit - 1)), data.draw(st.integers(0, y_limit - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, x_limit)), data.draw(st.integers(y1 + 1, y_limit))
    source = to_source((x1, y1, x2, y2), geometry, coords)
    assert to_model(source, geometry, coords) == (x1, y1, x2, y2)


def test_conventions_by_hand() -> None:
    # 400 x 300 pixels, each twice as wide as tall: shown square as 800 x 300, seen as 640 x 320.
    geometry = Geometry(
        width=400,
        height=300,
        frame_width=800,
        frame_height=300,
        resized_width=640,
        resized_height=320,
    )
    box = (100.0, 30.0, 200.0, 150.0)
    assert to_model(box, geometry, "norm1000") == (250, 100, 500, 500)
    assert to_model(box, geometry, "pixel_resized") == (160, 32, 320, 160)
    assert to_model(box, geometry, "pixel_original") == (200, 30, 400, 150)
    for coords in COORDS:
        assert to_source(to_model(box, geometry, coords), geometry, coords) == box


def test_pixel_conventions_reject_and_clamp_at_their_own_size() -> None:
    geometry = Geometry(
        width=100,
        height=100,
        frame_width=100,
        frame_height=100,
        resized_width=64,
        resized_height=64,
    )
    text = "A <box>[[1, 1, 65, 64], [1, 1, 70, 64]]</box>"
    parsed = parse_boxes(text, [geometry], "pixel_resized")
    assert [box.xyxy for box in parsed.boxes] == [(1 / 0.64, 1 / 0.64, 100, 100)]
    assert "outside the image (0..64)" in parsed.rejected[0]
    assert len(parse_boxes(text, [geometry], "pixel_original").boxes) == 2


def test_a_vanishing_side_keeps_one_unit() -> None:
    geometry = Geometry(
        width=4000,
        height=4000,
        frame_width=4000,
        frame_height=4000,
        resized_width=512,
        resized_height=512,
    )
    assert to_model((100, 100, 101, 101), geometry, "norm1000") == (25, 25, 26, 26)
    assert to_model((3999, 3999, 4000, 4000), geometry, "norm1000") == (999, 999, 1000, 1000)


def test_unknown_convention() -> None:
    geometry = Geometry(
        width=1, height=1, frame_width=1, frame_height=1, resized_width=1, resized_height=1
    )
    with pytest.raises(UsageError, match="norm1000"):
        to_model((0, 0, 1, 1), geometry, "norm100")  # type: ignore[arg-type]


cell = st.integers(0, 12)
cell_boxes = st.tuples(cell, cell, cell, cell).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)


def cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    """The box as the set of unit cells it covers: an independent definition of area."""
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@given(cell_boxes, cell_boxes)
def test_iou_and_giou_count_cells(
    a: tuple[int, int, int, int], b: tuple[int, int, int, int]
) -> None:
    union = len(cells(a) | cells(b))
    expected = len(cells(a) & cells(b)) / union if union else 0.0
    assert iou(a, b) == pytest.approx(expected)
    assert iou(a, b) == iou(b, a)
    hull = cells((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    generalised = expected - (len(hull) - union) / len(hull) if union else -1.0
    assert giou(a, b) == pytest.approx(generalised)
    assert -1 <= giou(a, b) <= iou(a, b) + 1e-12


def test_overlap_of_boxes_without_area() -> None:
    point, line, square = (1, 1, 1, 1), (0, 0, 0, 5), (0, 0, 2, 2)
    assert iou(point, point) == iou(line, line) == iou(point, square) == 0.0
    assert giou(point, point) == giou(point, line) == -1.0
    assert giou(point, square) == 0.0
    assert iou((5, 5, 1, 1), (5, 5, 1, 1)) == 0.0  # inverted corners have no area either


def test_pairwise_iou_of_nothing() -> None:
    assert pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    assert pairwise_iou([[0, 0, 1, 1]], np.zeros((0, 4))).shape == (1, 0)
    assert match([], []) == [] and match([[0, 0, 1, 1]], []) == []


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_matching_is_the_best_of_all_permutations(n: int, m: int, seed: int) -> None:
    corners = np.random.default_rng(seed).integers(0, 8, (n + m, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], axis=1)
    truth, predicted = boxes[:n], boxes[n:]
    iou_nm = pairwise_iou(truth, predicted)
    pairs = match(truth, predicted)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(iou_nm[i, j] > 0 for i, j in pairs)
    short, long = sorted((n, m))
    table = iou_nm if n <= m else iou_nm.T
    best = max(
        sum(table[i, j] for i, j in enumerate(order)) for order in permutations(range(long), short)
    )
    assert sum(iou_nm[i, j] for i, j in pairs) == pytest.approx(best)


def test_assign_pairs_everything_it_can() -> None:
    assert assign([[0.0, -1.0], [-1.0, -3.0]]) == [(0, 1), (1, 0)]
    assert assign(np.zeros((1, 3)))[0][0] == 0
