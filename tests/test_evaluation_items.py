"""Items: sizes of pictures, boxes made to fit, prompts, and rows of files in odd encodings."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medmo_edge.boxes import Box
from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import Pictures, csv_rows, embedded, json_rows, read_text
from medmo_edge.evaluation.items import (
    Embedded,
    Item,
    choice_prompt,
    detect_prompt,
    fit_boxes,
    per_label,
    picture_size,
)

NUMBERS = st.floats(-50, 150, allow_nan=False)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def item(*boxes: Box, task: str = "locate") -> Item:
    return Item(id="a", task=task, question="q", where="here", boxes=boxes)


# Pictures --------------------------------------------------------------------------------------


def test_sizes_of_files_and_of_embedded_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(30, 20))
    assert picture_size(path, "x") == picture_size(Embedded("a.png", png(30, 20)), "x") == (30, 20)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 99])
def test_a_quarter_turn_swaps_the_sides(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    wanted = (20, 30) if orientation in (6, 8) else (30, 20)
    assert picture_size(tmp_path / "a.jpg", "x") == wanted


def test_dicom_pictures_have_their_own_size() -> None:
    from pydicom.data import get_testdata_file

    path = get_testdata_file("CT_small.dcm", download=False)
    assert picture_size(Path(str(path)), "x") == (128, 128)


def test_pictures_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(30, 20)[:40])
    (tmp_path / "b.png").write_text("no")
    wide = np.zeros((1, 1), np.uint8)
    Image.fromarray(wide).save(tmp_path / "c.bmp")
    header = bytearray((tmp_path / "c.bmp").read_bytes())
    header[18:26] = (60_000).to_bytes(4, "little") * 2  # claims 60000 x 60000 pixels
    (tmp_path / "c.bmp").write_bytes(header)
    for name in ("a.png", "b.png", "c.bmp", "d.png"):
        with pytest.raises(SampleError, match=f"^notes:7: picture .*{name}"):
            picture_size(tmp_path / name, "notes:7")
    with pytest.raises(SampleError, match="notes:7: picture x.png is not a picture"):
        picture_size(Embedded("x.png", b"no"), "notes:7")
    with pytest.raises(SampleError, match="row 1: the picture is not in the file"):
        embedded({"bytes": b""}, "x", "row 1")


def test_pictures_are_found_by_the_names_that_notes_use(tmp_path: Path) -> None:
    for name in ("deep/er/A.PNG", "deep/b.jpg", "other/b.jpg", "c.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(2, 2))
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)  # os.walk would go round for ever
    pictures = Pictures(tmp_path)
    for name in ("deep/er/A.PNG", "a.png", "A", "er\\a.png", "/home/me/set/a.jpg"):
        assert pictures.find(name, "x") == tmp_path / "deep/er/A.PNG"
    assert pictures.find("c.png", "x") == tmp_path / "c.jpeg"
    assert pictures.find("other/b.jpg", "x") == tmp_path / "other/b.jpg"
    assert pictures.find("b.jpg", "x", ("other",)) == tmp_path / "other/b.jpg"
    for name, message in (("b.jpg", "fits 2 files"), ("d.jpg", "is missing"), ("", "is missing")):
        with pytest.raises(SampleError, match=f"x: picture '{name}' {message} below"):
            pictures.find(name, "x")
    with pytest.raises(SampleError, match="is missing"):
        Pictures(tmp_path / "other").find("../c.jpeg", "x")


# Boxes -----------------------------------------------------------------------------------------


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_what_is_kept_lies_inside_with_an_area(x1: float, y1: float, x2: float, y2: float) -> None:
    try:
        boxes, notes = fit_boxes([("WBC", (x1, y1, x2, y2))], (100, 80), "x")
    except SampleError as error:
        assert "lies mostly outside" in str(error)
        return
    width, height = abs(x2 - x1), abs(y2 - y1)
    assert len(boxes) == (width * height > 0)
    for box in boxes:
        assert 0 <= box.x1 < box.x2 <= 100 and 0 <= box.y1 < box.y2 <= 80
        assert box.area >= 0.5 * width * height * (1 - 1e-9)
        assert bool(notes) == (box.xyxy != (x1, y1, x2, y2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_coordinate_that_is_no_number(bad: float) -> None:
    with pytest.raises(
        SampleError, match=r"x: WBC box \[1, .*, 5, 6\] has a coordinate that is no"
    ):
        fit_boxes([("WBC", (1, bad, 5, 6))], (100, 80), "x")


def test_questions_by_label() -> None:
    cells = [Box("WBC", 0, 0, 5, 5), Box("RBC", 1, 1, 5, 5), Box("WBC", 2, 2, 5, 5)]
    whole = item(*cells)
    first, second, third = per_label(whole, ["Platelets", "RBC"])
    assert [one.id for one in (first, second, third)] == ["a/WBC", "a/RBC", "a/Platelets"]
    assert first.boxes == (cells[0], cells[2]) and third.boxes == ()
    assert third.question == "Locate the Platelets."
    assert list(per_label(item(task="vqa"), ["RBC"])) == [item(task="vqa")]
    assert list(per_label(item())) == []  # nothing shown and nothing asked for


def test_prompts() -> None:
    assert detect_prompt(["a", "b"]) == "Locate all of: a, b."
    assert choice_prompt("Which?", ["x", "y"]).splitlines()[1:4] == ["Options:", "A. x", "B. y"]
    asked = Item(id="a", task="vqa", question="Which?", where="", choices=("x",), answer="A")
    assert asked.messages[0]["content"][-1]["text"] == choice_prompt("Which?", ["x"])
    assert asked.messages[1]["content"] == "A"


# Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_in_the_encodings_that_occur(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\u00c4tiologie, "b, c"\r\nx,"two\nlines"\r\n\r\ny , z'.encode(encoding))
    assert read_text(path).startswith("\u00c4tiologie")
    rows = list(csv_rows(path, ["\u00c4tiologie"]))
    assert [place for place, _ in rows] == [f"{path}:2", f"{path}:5"]
    assert rows[0][1]["\u00c4tiologie"] == "x" and rows[1][1]["\u00c4tiologie"] == "y"


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data, message in (
        (b'{"a":\n [1,}', r"a.json:2: not JSON"),
        (b"[1]", "entry 1: expected an object"),
        (b"{}", "expected a list of objects"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["\xe9"]', "a.json:1 is not UTF-8 text"),
    ):
        path.write_bytes(data)
        with pytest.raises(SampleError, match=message):
            list(json_rows(path))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": }\n')
    with pytest.raises(SampleError, match="a.jsonl:3: not JSON"):
        list(json_rows(lines))
    with pytest.raises(SampleError, match="cannot be read: No such file"):
        read_text(tmp_path / "none")
