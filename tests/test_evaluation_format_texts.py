"""Readers of caption, report and multi-image formats on tiny folders in the published form."""

from pathlib import Path
from typing import Any

import pytest
from published_files import picture, png, write_json, write_parquet

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.format_medsg import named_image
from medmo_edge.evaluation.formats import Embedded, read_items

# MedTrinity ------------------------------------------------------------------------------------


def test_medtrinity_with_and_without_pictures(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(), "path": "x"}, "id": "0a-1b.jpg", "caption": "A CT."}]
    write_parquet(tmp_path / "a" / "train-0.parquet", rows)
    (item,) = read_items("medtrinity", tmp_path / "a")
    assert isinstance(item.images[0], Embedded) and item.images[0].name == "0a-1b.png"
    assert item.target == "A CT." and item.task == "caption"
    write_parquet(tmp_path / "b" / "train-0.parquet", [{"id": "0a-1b", "caption": "A CT."}] * 2)
    with pytest.raises(SampleError, match="row 1: picture '0a-1b' is missing"):
        list(read_items("medtrinity", tmp_path / "b"))
    path = picture(tmp_path / "b" / "deep" / "0a-1b.jpg")
    assert [item.images for item in read_items("medtrinity", tmp_path / "b")] == [(path,)] * 2


# MedSG -----------------------------------------------------------------------------------------


def test_medsg_tasks_conversations_and_parquet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.png")
    row = {
        "task": "object_tracking",
        "images": ["images/a.png", "images/b.png"],
        "question": "<image><image>Track the organ.",
        "answer": [10, 5, 30, 20],
    }
    first = row | {"question": "Where is it in the first image?"}
    write_json(tmp_path / "Task4.json", [row, first])
    last, stated = read_items("medsg", tmp_path, split="task4")
    assert [(box.image, box.xyxy) for box in last.boxes] == [(1, (10, 5, 30, 20))]
    assert last.meta == {"task": "object_tracking", "image_stated": False}
    assert last.question == "Track the organ." and last.id == "medsg/Task4/1"
    assert stated.boxes[0].image == 0 and stated.meta["image_stated"]
    answer = "It's in the first image. <|box_start|>(12,6),(30,20)<|box_end|>"
    talk = [{"from": "human", "value": "<image>Find it."}, {"from": "gpt", "value": answer}]
    path = write_json(
        tmp_path / "MedSG-188K.json", [{"conversations": talk, "images": row["images"]}]
    )
    (item,) = read_items("medsg", path)
    assert (item.boxes[0].image, item.boxes[0].xyxy) == (0, (12, 6, 30, 20))
    cells = {f"image_bytes_{n}": png() if n < 3 else None for n in range(1, 7)}
    packed = {"split": "test", "task": "referring", "question": "q", "num_images": 2}
    write_parquet(
        tmp_path / "p" / "test-0.parquet", [packed | cells | {"answer_xyxy": [1, 2, 3, 4]}]
    )
    (item,) = read_items("medsg", tmp_path / "p")
    assert len(item.images) == 2 and item.boxes[0].xyxy == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": [1, 2, 3]}, r"\[1, 2, 3\] is not four numbers"),
        ({"answer": [5, 5, 5, 9]}, "the one box of the answer has no area"),
        ({"answer": [1, 1, 300, 300]}, "lies mostly outside"),
        ({"images": []}, "entry 1: names no image"),
        ({"conversations": [{"value": "only one"}]}, "not one question and answer"),
        ({"conversations": [{"value": "q"}, {"value": "no box"}]}, "no <|box_start|>"),
    ],
)
def test_medsg_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    picture(tmp_path / "a.png")
    row = {"task": "referring", "images": ["a.png"], "question": "q", "answer": [1, 2, 3, 4]}
    write_json(tmp_path / "Task8.json", [row | changes])
    with pytest.raises(SampleError) as caught:
        list(read_items("medsg", tmp_path))
    assert message.replace("\\", "") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "num_images", "wanted"),
    [
        ("in the third image", 3, 2),
        ("from the first image to Image 2", 3, 1),
        ("in the third image", 2, None),
        ("the first one", 2, None),
        ("Frame-6", 6, 5),
    ],
)
def test_which_image_a_question_names(text: str, num_images: int, wanted: int | None) -> None:
    assert named_image(text, num_images) == wanted


# IU-Xray ---------------------------------------------------------------------------------------

IU = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><meta type="rr"/><uId id="CXR1"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>
<AbstractText Label="INDICATION">Positive TB test</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation><MeSH><major>normal</major></MeSH>{images}</eCitation>"""
IU_IMAGE = (
    '<parentImage id="{0}"><figureId>F1</figureId><caption>PA</caption>'
    "<url>/hadoop/storage/radiology/extract/{0}.jpg</url></parentImage>"
)


def iu(folder: Path, name: str = "1", images: str | None = None, **sections: str) -> Path:
    pair = "".join(IU_IMAGE.format(f"CXR1_1_IM-0001-{n}") for n in (3001, 4001))
    text = IU.format(
        images=pair if images is None else images,
        findings=sections.get("findings", "Heart size is  normal. XXXX"),
        impression=sections.get("impression", "Normal chest."),
    )
    path = folder / "ecgen-radiology" / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for number in (3001, 4001):
        picture(folder / "NLMCXR_png" / f"CXR1_1_IM-0001-{number}.png")
    return path


def test_iu_xray_reports_with_both_views(tmp_path: Path) -> None:
    iu(tmp_path)
    (item,) = read_items("iu-xray", tmp_path)
    assert item.id == item.group == "iu-xray/CXR1" and item.task == "report"
    assert item.target == "Findings: Heart size is normal. XXXX Impression: Normal chest."
    names = [path.name for path in item.images if isinstance(path, Path)]
    assert names == ["CXR1_1_IM-0001-3001.png", "CXR1_1_IM-0001-4001.png"]
    assert item.meta["mesh"] == ["normal"] and item.meta["findings"].startswith("Heart")
    iu(tmp_path, findings="")
    (item,) = read_items("iu-xray", tmp_path)
    assert item.target == "Impression: Normal chest."


def test_iu_xray_json_of_medevalkit(tmp_path: Path) -> None:
    iu(tmp_path)
    row = {"id": "CXR1", "image": ["CXR1_1_IM-0001-3001.png"], "findings": "F.", "impression": ""}
    write_json(tmp_path / "test.json", [row])
    (item,) = read_items("iu-xray", tmp_path, split="test")
    assert item.target == "Findings: F." and len(item.images) == 1
    with pytest.raises(SampleError, match="has no train.json: the XML reports have no split"):
        list(read_items("iu-xray", tmp_path, split="train"))


def test_iu_xray_mistakes(tmp_path: Path) -> None:
    iu(tmp_path, "1", images="")
    iu(tmp_path, "2", findings=" ", impression="")
    iu(tmp_path, "3", images=IU_IMAGE.format("CXR9"))
    iu(tmp_path, "4").write_text("<eCitation>")
    iu(tmp_path, "10")
    errors: list[SampleError] = []
    items = list(read_items("iu-xray", tmp_path, broken=errors.append))
    assert [item.where.rpartition("/")[2] for item in items] == ["10.xml"]
    for error, message in zip(
        errors,
        ("1.xml: the report names no picture", "2.xml: neither", "'CXR9' is missing", "not XML"),
        strict=True,
    ):
        assert message in str(error)
    with pytest.raises(SampleError, match="holds no .xml report"):
        list(read_items("iu-xray", tmp_path / "NLMCXR_png"))


# Plain folders ---------------------------------------------------------------------------------


def test_pictures_with_texts(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "a.txt").write_bytes("\ufeffCaf\u00e9 au lait spot.\r\n".encode())
    picture(tmp_path / "b.PNG")
    (tmp_path / "b.txt").write_text("Wide", encoding="utf-16")
    first, second = read_items("folder", tmp_path)
    assert (first.id, first.target) == ("b.PNG", "Wide")
    assert (second.id, second.target) == ("train/a.png", "Caf\u00e9 au lait spot.")
    assert [item.id for item in read_items("folder", tmp_path, split="train")] == ["train/a.png"]
    (tmp_path / "b.txt").write_bytes(b"first\nCaf\xe9")
    with pytest.raises(SampleError, match=r"b.txt:2 is not UTF-8 text: convert the file"):
        list(read_items("folder", tmp_path))
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(SampleError, match="b.txt is empty"):
        list(read_items("folder", tmp_path))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(SampleError, match="b.PNG has no text: b.txt is missing"):
        list(read_items("folder", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match="holds no picture"):
        list(read_items("folder", tmp_path / "empty"))
