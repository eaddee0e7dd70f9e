"""Readers of question formats on tiny folders in the publishers' own form, and the real VQA-RAD."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from published_files import picture, png, write_json, write_parquet

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.formats import Embedded, read_items

# VQA-RAD ---------------------------------------------------------------------------------------


def rad_row(**changes: Any) -> dict[str, Any]:
    """A row of the published file, with its own spellings."""
    return {
        "qid": "12",
        "phrase_type": "freeform",
        "image_name": "synpic1.jpg",
        "image_organ": "CHEST",
        "question": "Is there  evidence of a pneumothorax",
        "question_type": "PRSE, ATRIB",
        "answer": "No",
        "answer_type": "CLOSED ",
    } | changes


def test_vqa_rad_answers_and_types_are_normalised(tmp_path: Path) -> None:
    picture(tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg")
    rows = [
        rad_row(),
        rad_row(qid=13, answer=5, answer_type="OPEN", phrase_type="test_freeform"),
        rad_row(qid=14, answer=" left  lung.\t", answer_type="OPEN", phrase_type="test_para"),
    ]
    write_json(tmp_path / "VQA_RAD Dataset Public.json", rows)
    first, second, third = read_items("vqa-rad", tmp_path)
    assert first.question == "Is there evidence of a pneumothorax" and first.id == "vqa-rad/12"
    assert (first.answer, second.answer, third.answer) == ("no", "5", "left lung")
    assert first.meta == {
        "answer_type": "CLOSED",
        "question_type": ["ATTRIB", "PRES"],
        "organ": "CHEST",
    }
    assert [item.id for item in read_items("vqa-rad", tmp_path, split="train")] == ["vqa-rad/12"]
    assert len(list(read_items("vqa-rad", tmp_path, split="test"))) == 2
    assert first.messages[-1] == {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([rad_row(answer="  ")], "entry 1: 'answer' is empty"),
        ([rad_row(), rad_row(answer=None)], "entry 2: 'answer' is missing"),
        ([rad_row(image_name="synpic2.jpg")], "'synpic2.jpg' is missing below"),
        (["x"], "entry 1: expected an object"),
        ({}, "expected a list of objects"),
    ],
)
def test_vqa_rad_mistakes(tmp_path: Path, rows: Any, message: str) -> None:
    picture(tmp_path / "images" / "synpic1.jpg")
    write_json(tmp_path / "train.json", rows)
    with pytest.raises(SampleError, match=message):
        list(read_items("vqa-rad", tmp_path))


def test_vqa_rad_needs_to_know_which_file(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_json(tmp_path / f"{name}.json", [rad_row()])
    with pytest.raises(SampleError, match="which .json file"):
        list(read_items("vqa-rad", tmp_path))


def test_the_real_vqa_rad_reads_whole(data_dir: Path) -> None:
    items = list(read_items("vqa-rad", data_dir / "vqa-rad"))
    assert len(items) == 3064
    assert Counter(item.meta["answer_type"] for item in items) == {"CLOSED": 1823, "OPEN": 1241}
    answers = Counter(item.answer for item in items)
    assert answers["no"] == 884 and answers["yes"] == 829 and not answers["Yes"]
    assert len({item.images for item in items}) == 314  # of 315 pictures one has no question
    names = {name for item in items for name in item.meta["question_type"]}
    assert len(names) == 11 and names >= {"PRES", "POS", "ATTRIB"} and "PRSE" not in names


# PathVQA and the Parquet copy of VQA-RAD -------------------------------------------------------


def test_path_vqa_and_its_splits(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": png(), "path": None}, "question": "where?", "answer": "in the canals"},
        {"image": {"bytes": png(), "path": "a.jpg"}, "question": "is it?", "answer": "Yes"},
    ]
    write_parquet(tmp_path / "data" / "test-00000-of-00001-abc.parquet", rows)
    write_parquet(tmp_path / "data" / "train-00000-of-00001-abc.parquet", rows[:1])
    for name in ("path-vqa", "vqa-rad"):
        first, second = read_items(name, tmp_path, split="test")
        assert (first.meta["answer_type"], second.meta["answer_type"]) == ("OPEN", "CLOSED")
        (image,) = second.images
        assert isinstance(image, Embedded) and image.data == png()
        assert image.name == f"{name}-test-00000-of-00001-abc-000002.png"
        assert second.answer == "yes" and len(list(read_items(name, tmp_path))) == 3
    with pytest.raises(SampleError, match="no split 'val': it has test, train"):
        list(read_items("path-vqa", tmp_path, split="val"))


def test_parquet_that_is_none_or_lacks_its_picture(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "test-0.parquet",
        [
            {"image": {"bytes": None, "path": "a.jpg"}, "question": "q", "answer": "a"},
            {"image": {"bytes": b"\x89PNG no", "path": "a.jpg"}, "question": "q", "answer": "a"},
        ],
    )
    errors: list[SampleError] = []
    assert list(read_items("path-vqa", tmp_path, broken=errors.append)) == []
    assert "test-0.parquet, row 1: the picture is not in the file" in str(errors[0])
    assert "row 2: picture path-vqa-test-0-000002.png" in str(errors[1])
    path.write_bytes(b"PAR1 but no")
    with pytest.raises(SampleError, match="cannot be read as Parquet"):
        list(read_items("path-vqa", tmp_path))
    write_parquet(path, [{"picture": "a", "answer": "a"}])
    with pytest.raises(SampleError, match="column 'image' is missing"):
        list(read_items("path-vqa", tmp_path))


# SLAKE -----------------------------------------------------------------------------------------


def slake_row(**changes: Any) -> dict[str, Any]:
    return {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "What modality is used to take this image?",
        "answer": "MRI",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Modality",
        "triple": ["vhead", "_", "_"],
        "qid": 0,
    } | changes


def test_slake_reads_both_languages(tmp_path: Path) -> None:
    for number in (1, 2):  # every picture is called source.jpg
        picture(tmp_path / "imgs" / f"xmlab{number}" / "source.jpg", value=number)
    chinese = "\u8fd9\u5f20\u56fe\u662f\u4ec0\u4e48\uff1f"
    write_json(tmp_path / "train.json", [slake_row(), slake_row(qid=1, q_lang="zh")])
    write_json(tmp_path / "validate.json", [slake_row(question=chinese, q_lang="zh", img_id=2)])
    items = list(read_items("slake", tmp_path))
    assert [item.id for item in items] == ["slake/train/0", "slake/train/1", "slake/validate/0"]
    (held,) = read_items("slake", tmp_path, split="val")
    assert held.question == chinese and held.meta["language"] == "zh" and held.group == "slake/2"
    assert items[0].images == (tmp_path / "imgs" / "xmlab1" / "source.jpg",)
    with pytest.raises(SampleError, match="has no test.json"):
        list(read_items("slake", tmp_path, split="test"))


# PMC-VQA ---------------------------------------------------------------------------------------

PMC = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
PMC_ROW = (
    '0,PMC1_Fig1_1.jpg,"A caption, with comma","What is it? "," A:Liver ",'
    " B: Lung , C. Heart ,D) Brain,{},test\n"
)


@pytest.mark.parametrize("answer", ["B", " B:Lung ", "lung"])
def test_pmc_vqa_choices_and_letter(tmp_path: Path, answer: str) -> None:
    picture(tmp_path / "figures" / "PMC1_Fig1_1.jpg")
    (tmp_path / "test_2.csv").write_text(PMC + PMC_ROW.format(answer))
    (tmp_path / "test.csv").write_text("the first version is not read beside the second\n")
    (item,) = read_items("pmc-vqa", tmp_path, split="test")
    assert item.choices == ("Liver", "Lung", "Heart", "Brain") and item.answer == "B"
    assert item.question == "What is it?" and item.group == "PMC1"
    assert item.meta == {"caption": "A caption, with comma"}
    assert item.messages[0]["content"][-1]["text"] == (
        "Question: What is it?\nOptions:\nA. Liver\nB. Lung\nC. Heart\nD. Brain\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_pmc_vqa_parquet_and_mistakes(tmp_path: Path) -> None:
    picture(tmp_path / "figures" / "PMC1_Fig1_1.jpg")
    (tmp_path / "test_2.csv").write_text(PMC + PMC_ROW.format("spleen") + PMC_ROW.format("A")[:40])
    errors: list[SampleError] = []
    with pytest.raises(SampleError, match="csv:3: 3 cells under 10 columns"):
        list(read_items("pmc-vqa", tmp_path, broken=errors.append))
    assert "test_2.csv:2: answer 'spleen' is none, or several, of the choices" in str(errors[0])
    row = {"Figure_path": "PMC1_Fig1_1.jpg", "Question": "q", "Answer": "D"}
    choices = {f"Choice {letter}": f"{letter}: {letter.lower()}1" for letter in "ABCD"}
    path = write_parquet(tmp_path / "x" / "train-0.parquet", [row | choices])
    with pytest.raises(SampleError, match="'PMC1_Fig1_1.jpg' is missing below"):
        list(read_items("pmc-vqa", path))
    picture(path.parent / "PMC1_Fig1_1.jpg")
    (item,) = read_items("pmc-vqa", path.parent, split="train")
    assert item.answer == "D" and item.choices[3] == "d1"
