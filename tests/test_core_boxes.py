"""Boxes in answers: every surface form, every way models break them, and hostile text."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.boxes import Box, Geometry, Parsed, format_boxes, parse_boxes, render_boxes

# The source is exactly the 0..1000 grid, so that numbers in a test read as they are written.
GRID = Geometry(
    width=1000,
    height=1000,
    frame_width=1000,
    frame_height=1000,
    resized_width=992,
    resized_height=992,
)


def parse(text: str, images: int = 1) -> Parsed:
    return parse_boxes(text, [GRID] * images, "norm1000")


def found(text: str, images: int = 1) -> list[tuple[str, tuple[float, ...]]]:
    """Labels and coordinates of an answer that must hold no rejected box."""
    parsed = parse(text, images)
    assert parsed.rejected == ()
    return [(box.label, box.xyxy) for box in parsed.boxes]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The example printed in MedMO's README, which does not balance its brackets.
        (
            "Fractures <box>[[156, 516, 231, 607], ...]]</box>",
            [("Fractures", (156, 516, 231, 607))],
        ),
        ("WBC <box>[[1, 2, 3, 4]]</box>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[1, 2, 3, 4]</box>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>1, 2, 3, 4</box>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[1 2 3 4]]</box>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[(1, 2), (3, 4)]]</box>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[1.5, 2.25, 3.0, 4]]</box>", [("WBC", (1.5, 2.25, 3, 4))]),
        ("WBC <box>[[1,2,3,4,5,6,7,8]]</box>", [("WBC", (1, 2, 3, 4)), ("WBC", (5, 6, 7, 8))]),
        ("WBC <BOX>[[1, 2, 3, 4]]</BOX>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[[1, 2, 3, 4]]]]]</box>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[1, 2, 3, 4]]", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[1, 2, 3, 4]] </bo", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[1, 2, 3, 4</box>", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[1, 2, 3, 4]]\n2. RBC", [("WBC", (1, 2, 3, 4))]),
        ("WBC <box>[[1, 2, 3, 4]] is seen.", [("WBC", (1, 2, 3, 4))]),
        ("No nodule found.", []),
        ("", []),
        ("<box></box>", []),
        ("nodule <box>[[]]</box>", []),
        ("The interval [10, 20, 30, 40] days is no box.", []),
    ],
)
def test_surface_forms(text: str, expected: list[tuple[str, tuple[float, ...]]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("A <box>[[1, 2, 3, 4]]</box>, B <box>[[1, 2, 3, 4]]</box>", ["A", "B"]),
        ("A <box>[[1, 2, 3, 4]]</box> and B <box>[[1, 2, 3, 4]]</box>.", ["A", "B"]),
        ("1. A b <box>[[1, 2, 3, 4]]</box>\n2) C <box>[[1, 2, 3, 4]]</box>", ["A b", "C"]),
        ("- **A**: <box>[[1, 2, 3, 4]]</box>\n- B - <box>[[1, 2, 3, 4]]</box>", ["A", "B"]),
        ("A <box>[[1, 2, 3, 4]] B <box>[[1, 2, 3, 4]]", ["A", "B"]),
        ("A <box>[[1, 2, 3, 4]]\n2. B <box>[[1, 2, 3, 4]]</box>", ["A", "B"]),
        ("A <box>[[1, 2, 3, 4]]</box><box>[[1, 2, 3, 4]]</box>", ["A", "A"]),
        ("A <box>[[1, 2, 3, 4]]</box>, and <box>[[1, 2, 3, 4]]</box>", ["A", "A"]),
        ("<box>[[1, 2, 3, 4]]</box>", [""]),
        ("The lungs are clear. Old fracture <box>[[1, 2, 3, 4]]</box>", ["Old fracture"]),
        ("S. aureus <box>[[1, 2, 3, 4]]</box>", ["S. aureus"]),
        ("Nodule, left lung <box>[[1, 2, 3, 4]]</box>", ["Nodule, left lung"]),
        ("<ref>mass</ref><box>[[1, 2, 3, 4]]</box>", ["mass"]),
        ("Findings:\n\nmass\n<box>[[1, 2, 3, 4]]</box>", ["mass"]),
        ("\u809d\u810f <box>[[1, 2, 3, 4]]</box>", ["\u809d\u810f"]),
    ],
)
def test_labels(text: str, labels: list[str]) -> None:
    assert [label for label, _ in found(text)] == labels


@pytest.mark.parametrize(
    "text",
    [
        '[{"bbox_2d": [1, 2, 3, 4], "label": "WBC"}]',
        '```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "WBC"}\n]\n```',
        'Here it is:\n```json\n{"label": "WBC", "bbox_2d": [1.0, 2.0, 3.0, 4.0]}\n```\nDone.',
        '{"bbox_2d": [[1, 2, 3, 4]], "label": "WBC"}',
        '[{"bbox_2d": [1, 2, 3, 4], "label": "WBC", "extra": "\u00e9"},]',
        '{"bbox": [1, 2, 3, 4], "label": "WBC"}',
        '{"bbox_2d": [3, 4, 1, 2], "label": " WBC\\n"}',
    ],
)
def test_json_form(text: str) -> None:
    assert found(text) == [("WBC", (1, 2, 3, 4))]


def test_truncated_json_keeps_the_complete_objects() -> None:
    rows = [{"bbox_2d": [1, 2, 3, 4], "label": "A"}, {"bbox_2d": [5, 6, 7, 8], "label": "B"}]
    text = json.dumps(rows)
    parsed = parse(text[: text.index('"B"')])
    assert [box.label for box in parsed.boxes] == ["A"]
    assert len(parsed.rejected) == 1 and "cut off" in parsed.rejected[0]


@pytest.mark.parametrize(
    "value",
    ["[1, 2, 3]", "[1, 2, 3, 4, 5]", '"1,2,3,4"', "[true, 1, 2, 3]", "null", "[[1, 2], [3, 4]]"],
)
def test_json_that_is_no_box_is_rejected(value: str) -> None:
    parsed = parse(f'{{"bbox_2d": {value}, "label": "WBC"}}')
    assert parsed.boxes == () and parsed.rejected
    assert "WBC" in parsed.rejected[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[1001, 2, 3, 4]", "outside"),
        ("[1, 2, 3, 99999]", "outside"),
        ("[-500, 2, 3, 4]", "outside"),
        ("[5, 5, 5, 9]", "zero area"),
        ("[5, 5, 9, 5]", "zero area"),
        ("[-3, 5, -1, 9]", "zero area"),
        ("[1, 2, 3]", "3 numbers"),
        ("[1, 2, 3, 4, 5]", "5 numbers"),
        ("[0.1, 0.2, 0.3, 0.4]", "fractions"),
        ("[x1: 1, y1: 2, x2: 3, y2: 4]", "not a list of numbers"),
        ("[10%, 20%, 30%, 40%]", "not a list of numbers"),
        ("[" + ", ".join(["9" * 400] * 4) + "]", "not a number"),
    ],
)
def test_rejected_with_reason(row: str, reason: str) -> None:
    parsed = parse(f"WBC <box>[{row}, [1, 2, 3, 4]]</box>")
    assert [box.xyxy for box in parsed.boxes] == [(1, 2, 3, 4)]
    assert len(parsed.rejected) == 1
    assert parsed.rejected[0].startswith("WBC") and reason in parsed.rejected[0]
    assert "\n" not in parsed.rejected[0] and len(parsed.rejected[0]) < 200


def test_corners_are_ordered_and_slight_excess_clamped() -> None:
    assert found("A <box>[[30, 40, 10, 20]]</box>") == [("A", (10, 20, 30, 40))]
    assert found("A <box>[[-5, 20, 30, 40]]</box>") == [("A", (0, 20, 30, 40))]


def test_numbers_cut_off_by_the_token_limit_are_not_trusted() -> None:
    complete = "A <box>[[1, 2, 3, 4], [5, 6, 7, 800]]</box>"
    for end in range(len("A <box>[[1, 2, 3, 4]"), complete.index("800") + 3):
        parsed = parse(complete[:end])
        assert [box.xyxy for box in parsed.boxes] == [(1, 2, 3, 4)], complete[:end]
    assert parse("A <box>[[1, 2, 3, 4").boxes == ()


def test_several_images() -> None:
    box = "<box>[[1, 2, 3, 4]]</box>"
    text = f"Image 2: A {box}. Picture 1: B {box} C {box}"
    boxes = parse(text, images=2).boxes
    assert [(box.label, box.image) for box in boxes] == [("A", 1), ("B", 0), ("C", 0)]
    last = parse(f"Unlike image 1, image 2 shows A {box}", images=2).boxes
    assert [box.image for box in last] == [1]
    beyond = parse("Image 3: A <box>[[1, 2, 3, 4]]</box>", images=2)
    assert beyond.boxes == () and "image 3" in beyond.rejected[0]
    # With one image, a name such as "Image 2" is only part of the label.
    assert parse("Image 2: A <box>[[1, 2, 3, 4]]</box>").boxes[0].image == 0


@pytest.mark.parametrize(
    "unit",
    [
        "[",
        "]",
        "<box>",
        "</box>",
        "<box>[[",
        "<box>[1,",
        "<box>1,2,3,4",
        "{",
        '{"bbox_2d":',
        '{"bbox_2d":[',
        "1. ",
        " ",
        "\n",
        "9",
        "<box>[[1,2,3,4]]\n",
        "Image 1",
        "a. ",
        "*",
        "<ref>",
    ],
)
@pytest.mark.parametrize("prefix", ["", "A <box>"])
def test_any_repeated_text_takes_linear_time(unit: str, prefix: str) -> None:
    def seconds(size: int) -> float:
        """The best of two: a neighbour on the processor may take its cache."""
        text = prefix + unit * (size // len(unit))
        found = []
        for _ in range(2):
            start = time.process_time()
            parse(text, images=2)
            found.append(time.process_time() - start)
        return min(found)

    # 16 times the text: a quadratic reader needs 256 times as long.
    small, large = seconds(1 << 13), seconds(1 << 17)
    assert large < 64 * max(small, 0.01)


@pytest.mark.parametrize(
    ("text", "num_rejected"),
    [
        ("[" * 10**6, 0),
        ("<box>" * 200_000, 0),
        ("A <box>" + "[" * 10**6, 0),
        ('{"bbox_2d": ' + "[" * 10**6 + "}", 1),
        ('{"bbox_2d": [' + "9" * 10**6 + "]}", 1),
        ("A <box>[[" + "9" * 10**6 + "]]</box>", 1),
    ],
)
def test_a_megabyte_of_nonsense(text: str, num_rejected: int) -> None:
    start = time.process_time()
    parsed = parse(text)
    assert time.process_time() - start < 20
    assert parsed.boxes == () and len(parsed.rejected) == num_rejected


coordinate = st.integers(0, 999)


@st.composite
def boxes_on_the_grid(draw: st.DrawFn) -> Box:
    x1, y1 = draw(coordinate), draw(coordinate)
    x2, y2 = draw(st.integers(x1 + 1, 1000)), draw(st.integers(y1 + 1, 1000))
    label = draw(st.sampled_from(["WBC", "white blood cell", "S. aureus", "nodule, left"]))
    return Box(label, float(x1), float(y1), float(x2), float(y2))


@given(st.lists(boxes_on_the_grid(), max_size=6))
def test_what_is_rendered_is_read_back(boxes: list[Box]) -> None:
    text = render_boxes(boxes, GRID, "norm1000")
    parsed = parse(text)
    assert parsed.rejected == ()
    assert sorted(parsed.boxes, key=repr) == sorted(boxes, key=repr)


@given(st.text(alphabet='<box>/[]{}",:0123456789.-+ \nbbox_2dlabel\\u', max_size=200))
def test_no_text_raises(text: str) -> None:
    for box in parse(text, images=2).boxes:
        assert 0 <= box.x1 < box.x2 <= 1000 and 0 <= box.y1 < box.y2 <= 1000


def test_render_groups_labels_and_sorts_rows() -> None:
    boxes = [
        Box("B", 50, 1, 60, 9),
        Box("A", 5, 8, 9, 9),
        Box("B", 50, 0, 60, 9),
        Box("B", 2, 3, 4, 5),
    ]
    assert render_boxes(boxes, GRID, "norm1000") == (
        "B <box>[[2, 3, 4, 5], [50, 0, 60, 9], [50, 1, 60, 9]]</box>, A <box>[[5, 8, 9, 9]]</box>"
    )
    assert render_boxes([], GRID, "norm1000") == ""
    assert format_boxes("WBC", [[1, 2, 3, 4], [5, 6, 7, 8]]) == (
        "WBC <box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>"
    )


def test_box_for_json() -> None:
    box = Box("WBC", 1 / 3, 2, 3, 4, 1)
    assert box.to_dict() == {"label": "WBC", "image": 1, "xyxy": [0.33, 2, 3, 4]}
    assert box.area == pytest.approx((3 - 1 / 3) * 2)
