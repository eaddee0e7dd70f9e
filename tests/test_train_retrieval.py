"""Retrieval questions made while training: both ways, from one file, with one right answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.errors import SampleError
from medmo_edge.samples import Sample
from medmo_edge.train.retrieval import CANDIDATES, captioned, overlap, retrieval_sample
from medmo_edge.train.sample_index import SampleIndex, index_samples

TEXTS = [
    f"{organ} {view} with {finding}"
    for organ in ("chest", "knee", "brain")
    for view in ("seen from the front", "seen from behind")
    for finding in ("a fracture", "no finding", "a large mass")
]


def caption(number: int, text: str, image: str = "") -> dict[str, Any]:
    messages = [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": text}]
    images = [image or f"{number}.png"]
    return {"id": f"c{number}", "task": "caption", "images": images, "messages": messages}


def write(path: Path, values: list[dict[str, Any]]) -> SampleIndex:
    """The file and its pictures, whose bytes are their names unless they are there already."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    for value in values:
        for name in value["images"]:
            if not (path.parent / name).exists():
                (path.parent / name).write_bytes(name.encode())
    return index_samples(path)


@pytest.fixture()
def index(tmp_path: Path) -> SampleIndex:
    return write(tmp_path / "set.jsonl", [caption(n, text) for n, text in enumerate(TEXTS)])


def make(index: SampleIndex, place: int, seed: int = 0) -> Sample:
    return retrieval_sample(index, captioned(index), place, np.random.default_rng(seed))


def test_both_ways_have_one_right_answer(index: SampleIndex) -> None:
    for number, text in enumerate(TEXTS):
        which_text, which_image = make(index, 2 * number), make(index, 2 * number + 1)
        letter = "ABCD".index(str(which_text.answer))
        assert which_text.choices[letter] == text and len(set(which_text.choices)) == CANDIDATES
        assert [image.name for image in which_text.images] == [f"{number}.png"]
        place = "ABCD".index(str(which_image.answer))
        assert which_image.images[place].name == f"{number}.png"
        assert len(set(which_image.images)) == CANDIDATES
        assert text in str(which_image.messages[0]["content"])
        for one in (which_text, which_image):
            assert one.task == "retrieval" and one.line == number + 1
            assert one.messages[-1] == {"role": "assistant", "content": one.answer}


def test_it_depends_on_its_numbers_alone(index: SampleIndex) -> None:
    assert make(index, 3, seed=1) == make(index, 3, seed=1)
    drawn = {make(index, 3, seed=seed).images for seed in range(9)}
    assert len(drawn) > 3
    answers = {make(index, 3, seed=seed).answer for seed in range(40)}
    assert answers == set("ABCD")


def test_rivals_are_the_alike_ones(index: SampleIndex) -> None:
    """More words in common than the rivals of a blind draw, which is what makes them hard."""
    right = frozenset(TEXTS[0].split())
    chosen = [
        overlap(right, frozenset(choice.split()))
        for seed in range(20)
        for choice in make(index, 0, seed).choices
        if choice != TEXTS[0]
    ]
    blind = [overlap(right, frozenset(text.split())) for text in TEXTS[1:]]
    assert np.mean(chosen) > np.mean(blind) + 0.1


def test_what_could_also_be_right_is_no_rival(tmp_path: Path) -> None:
    """The same picture under another name, and the same words in another order."""
    (tmp_path / "copy.png").write_bytes(b"0.png")
    texts = ["lungs are clear today", "heart is big", "bone is broken", "skin is red"]
    values = [caption(number, text) for number, text in enumerate(texts)]
    values += [caption(8, "another text", "copy.png"), caption(9, "today clear are lungs")]
    index = write(tmp_path / "set.jsonl", values)
    for seed in range(10):
        shown = make(index, 1, seed)
        assert {image.name for image in shown.images} == {"0.png", "1.png", "2.png", "3.png"}


def test_a_split_by_picture_stays_one(tmp_path: Path) -> None:
    """Questions of the training part never show a picture or a text of the held-out part."""
    parts = {
        name: write(tmp_path / f"{name}.jsonl", [caption(n, TEXTS[n]) for n in numbers])
        for name, numbers in (("train", range(0, 18, 2)), ("val", range(1, 18, 2)))
    }
    shown = {
        name: {image for place in range(18) for image in make(part, place).images}
        for name, part in parts.items()
    }
    assert shown["train"] and shown["val"] and shown["train"].isdisjoint(shown["val"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([caption(n, "same text") for n in range(5)], "the file has 0 beside this one"),
        ([caption(n, text, "a.png") for n, text in enumerate(TEXTS)], "has 0 beside this one"),
        ([caption(0, "one") | {"images": []}] * 4, "a captioned sample needs an image"),
    ],
)
def test_a_set_that_is_too_uniform(
    tmp_path: Path, values: list[dict[str, Any]], message: str
) -> None:
    index = write(tmp_path / "set.jsonl", values)
    with pytest.raises(SampleError, match=message) as caught:
        make(index, 0)
    assert str(caught.value).startswith(f"{tmp_path / 'set.jsonl'}:1: ")


def test_too_few_captions_make_no_questions(tmp_path: Path) -> None:
    assert not len(captioned(write(tmp_path / "a.jsonl", [caption(0, "one"), caption(1, "two")])))


def test_an_index_reads_any_line(tmp_path: Path) -> None:
    lines = [caption(0, 'a "task": "vqa" in a text'), caption(1, "one")]
    text = json.dumps(lines[0]) + "\r\n\n  \n" + json.dumps(lines[1])
    path = tmp_path / "set.jsonl"
    path.write_bytes(text.encode())
    index = index_samples(path)
    assert index.lines.tolist() == [1, 4] and index.rows("caption").tolist() == [0, 1]
    assert [index.read(row).id for row in (1, 0)] == ["c1", "c0"]


def test_an_index_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(SampleError, match="empty.jsonl holds no sample"):
        index_samples(tmp_path / "empty.jsonl")
    nested = caption(0, "one") | {"meta": {"task": "vqa"}}
    (tmp_path / "meta.jsonl").write_text(json.dumps(nested))
    assert index_samples(tmp_path / "meta.jsonl").rows("caption").tolist() == [0]
    (tmp_path / "bad.jsonl").write_bytes(b'{"id": "a", "task": "none"}\n{"task": "vqa"\xff}')
    broken: list[str] = []
    with pytest.raises(SampleError, match="bad.jsonl:1: task 'none' is not one of"):
        index_samples(tmp_path / "bad.jsonl")
    index = index_samples(tmp_path / "bad.jsonl", lambda error: broken.append(str(error)))
    assert len(broken) == 1  # the other is found when it is read
    with pytest.raises(SampleError, match="bad.jsonl:2: cannot be read"):
        index.read(0)
