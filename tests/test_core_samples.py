"""The JSONL schema of samples: what it carries, and the one line for what breaks it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.boxes import Box, Geometry, parse_boxes
from medmo_edge.errors import SampleError
from medmo_edge.samples import (
    Sample,
    count_samples,
    question_of,
    read_samples,
    target_text,
    write_samples,
)

QUESTION = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": "Where is the nodule?"}],
}
SQUARE = Geometry(
    width=1000,
    height=1000,
    frame_width=1000,
    frame_height=1000,
    resized_width=512,
    resized_height=512,
)


def line(**changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "id": "a",
        "task": "locate",
        "images": ["pictures/a.png"],
        "messages": [QUESTION],
        "boxes": [{"label": "nodule", "image": 0, "xyxy": [10, 20, 30.5, 40]}],
    }
    return value | changes


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in lines) + "\n")
    return path


def test_a_line_becomes_a_sample(tmp_path: Path) -> None:
    path = write(tmp_path, line(), line(id="b", answer="yes", choices=["yes", "no"], meta={"k": 1}))
    first, second = read_samples(path)
    assert first.images == (tmp_path.resolve() / "pictures/a.png",)
    assert first.boxes == (Box("nodule", 10, 20, 30.5, 40),)
    assert question_of(first) == "Where is the nodule?"
    assert (second.answer, second.choices, second.meta) == ("yes", ("yes", "no"), {"k": 1})
    assert (first.line, second.line, count_samples(path)) == (1, 2, 2)


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path, line(), "not an object")
    samples = read_samples(path)
    assert next(samples).id == "a"
    with pytest.raises(SampleError, match=re.escape(f"{path}:2: a sample is a JSON object")):
        next(samples)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"box": []}, "unknown key 'box'"),
        ({"id": ""}, "'id' must be a text"),
        ({"task": "chat"}, "task 'chat' is not one of caption, vqa"),
        ({"images": "a.png"}, "'images' must be a list of texts"),
        ({"images": []}, "messages show 1 images, 'images' lists 0"),
        ({"messages": []}, "at least the question"),
        ({"messages": [QUESTION, QUESTION]}, "must alternate"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "image and text parts"),
        ({"answer": 3}, "'answer' must be a text"),
        ({"meta": []}, "'meta' must be a JSON object"),
        ({"boxes": {}}, "'boxes' must be a list"),
        ({"boxes": ["x"]}, "four numbers xyxy"),
        ({"boxes": [{"label": "n", "xyxy": [1, 2, 3]}]}, "four numbers xyxy"),
        ({"boxes": [{"label": "", "xyxy": [1, 2, 3, 4]}]}, "label must be a text"),
        ({"boxes": [{"label": "n", "image": 1, "xyxy": [1, 2, 3, 4]}]}, "names image 1 of 1"),
        ({"boxes": [{"label": "n", "xyxy": [3, 2, 3, 4]}]}, "is not x1 < x2"),
        ({"boxes": [{"label": "n", "xyxy": [1, 2, float("nan"), 4]}]}, "is not x1 < x2"),
    ],
)
def test_what_breaks_the_schema_is_named_with_its_line(
    tmp_path: Path, broken: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, line(id="first"), line(**broken))
    with pytest.raises(SampleError) as raised:
        list(read_samples(path))
    assert str(raised.value).startswith(f"{path}:2: ")
    assert message in str(raised.value)


def test_files_that_hold_no_samples(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    twice = write(tmp_path, line(), line())
    for path, message in (
        (empty, "holds no sample"),
        (binary, "not UTF-8"),
        (tmp_path / "absent.jsonl", "No such file"),
        (twice, ":2: id 'a' was used before"),
    ):
        with pytest.raises(SampleError, match=message):
            list(read_samples(path))


def test_writing_is_the_inverse_of_reading(tmp_path: Path) -> None:
    path = write(tmp_path, line(), line(id="b", task="vqa", boxes=[], answer="yes"))
    samples = list(read_samples(path))
    (tmp_path / "out").mkdir()
    copy = tmp_path / "out" / "copy.jsonl"
    assert write_samples(copy, samples) == 2
    assert list(read_samples(copy)) == samples
    assert json.loads(copy.read_text().splitlines()[0])["images"] == ["../pictures/a.png"]
    with pytest.raises(SampleError, match="exists already"):
        write_samples(copy, samples)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield Sample(id="a", task="vqa", messages=[QUESTION])
        raise SampleError("stop")

    with pytest.raises(SampleError, match="stop"):
        write_samples(tmp_path / "out.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


corner = st.integers(0, 990)


@given(st.lists(st.tuples(corner, corner, corner, corner), max_size=5), st.integers(1, 3))
def test_the_answer_of_a_locate_sample_reads_back_as_its_boxes(
    corners: list[tuple[int, int, int, int]], num_images: int
) -> None:
    boxes = tuple(
        Box("nodule", min(x1, x2), min(y1, y2), max(x1, x2) + 5, max(y1, y2) + 5, k % num_images)
        for k, (x1, y1, x2, y2) in enumerate(corners)
    )
    sample = Sample(
        id="a",
        task="locate",
        images=(Path("x"),) * num_images,
        messages=[QUESTION],
        boxes=boxes,
    )
    text = target_text(sample, [SQUARE] * num_images)
    read = parse_boxes(text, [SQUARE] * num_images, "norm1000")
    assert sorted(read.boxes, key=repr) == sorted(boxes, key=repr)
    assert not read.rejected


def test_the_wanted_text_of_other_samples() -> None:
    said = {"role": "assistant", "content": "Normal."}
    assert target_text(Sample(id="a", task="vqa", messages=[QUESTION, said])) == "Normal."
    assert target_text(Sample(id="a", task="vqa", messages=[QUESTION], answer="yes")) == "yes"
    with pytest.raises(SampleError, match="has no answer"):
        target_text(Sample(id="a", task="vqa", messages=[QUESTION]))
