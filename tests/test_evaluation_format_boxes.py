"""Readers of box formats on tiny folders in the publishers' own form, and on the real BCCD."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.formats import Item, read_items


def picture(path: Path, width: int = 60, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width), 90, np.uint8)).save(path)
    return path


def found(item: Item) -> list[tuple[str, tuple[float, ...]]]:
    return [(box.label, box.xyxy) for box in item.boxes]


def broken_of(name: str, source: Path, **options: Any) -> tuple[list[Item], list[str]]:
    """What a run that skips broken items gives, and what it would have said."""
    errors: list[SampleError] = []
    items = list(read_items(name, source, broken=errors.append, **options))
    return items, [str(error) for error in errors]


# VOC -------------------------------------------------------------------------------------------

VOC = """<annotation><folder>x</folder><filename>{file}</filename>
<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = (
    "<object><name>{}</name><pose>Unspecified</pose><difficult>0</difficult><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def voc(
    folder: Path, name: str, *objects: str, size: tuple[int, int] = (60, 40), file: str = ""
) -> Path:
    notes = folder / "Annotations" / f"{name}.xml"
    notes.parent.mkdir(parents=True, exist_ok=True)
    text = VOC.format(file=file or f"{name}.jpg", size=size, objects="".join(objects))
    notes.write_text(text, encoding="utf-8")
    return notes


def test_voc_boxes_splits_and_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        voc(tmp_path, name, OBJECT.format("WBC", 1, 2, 30, 20), OBJECT.format(" RBC\n", 5, 5, 9, 9))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("c\na -1\n\n")
    items = list(read_items("voc", tmp_path))
    assert [item.id for item in items] == ["a", "b", "c"]
    assert found(items[0]) == [("WBC", (1, 2, 30, 20)), ("RBC", (5, 5, 9, 9))]
    assert items[0].images == (tmp_path / "JPEGImages" / "a.jpg",) and items[0].notes == ()
    assert [item.id for item in read_items("voc", tmp_path, split="val")] == ["c", "a"]
    with pytest.raises(SampleError, match=r"has no ImageSets/Main/test.txt or test.txt"):
        list(read_items("voc", tmp_path, split="test"))


def test_voc_dirt_is_put_right_and_noted(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "a.JPEG")  # another ending than the notes say
    voc(
        tmp_path,
        "a",
        OBJECT.format("RBC", 5, 5, 5, 9),  # no area
        OBJECT.format("RBC", 30, 20, 10, 10),  # corners swapped
        OBJECT.format("RBC", 50.5, 30, 61, 41),  # over the edge
        size=(0, 0),  # the notes do not know the size
        file="old name.png",
    )
    (item,) = read_items("voc", tmp_path)
    assert found(item) == [("RBC", (10, 10, 30, 20)), ("RBC", (50.5, 30, 60, 40))]
    assert item.notes == (
        "RBC box [5, 5, 5, 9] has no area: left out",
        "RBC box [30, 20, 10, 10] was cut or put in order",
        "RBC box [50.5, 30, 61, 41] was cut or put in order",
    )


@pytest.mark.parametrize(
    ("objects", "size", "message"),
    [
        (OBJECT.format("", 1, 1, 5, 5), (60, 40), r"box \[1, 1, 5, 5\] has no label"),
        (OBJECT.format("RBC", "", 1, 5, 5), (60, 40), "RBC has no bndbox of 4 numbers"),
        (OBJECT.format("RBC", "nan", 1, 5, 5), (60, 40), "a coordinate that is no number"),
        (OBJECT.format("RBC", 50, 30, 90, 80), (60, 40), "lies mostly outside its picture of 60"),
        ("<object><name>RBC</name></object>", (60, 40), "RBC has no bndbox"),
        ("", (120, 80), "boxes are of 120 x 80, the picture is 60 x 40"),
        ("<object>", (60, 40), "a.xml is not XML"),
    ],
)
def test_voc_items_that_mean_nothing_are_broken(
    tmp_path: Path, objects: str, size: tuple[int, int], message: str
) -> None:
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "good.png")
    voc(tmp_path, "a", objects, size=size)
    voc(tmp_path, "good", OBJECT.format("RBC", 1, 1, 5, 5))
    with pytest.raises(SampleError, match=message) as caught:
        list(read_items("voc", tmp_path))
    assert "a.xml" in str(caught.value) and "\n" not in str(caught.value)
    items, errors = broken_of("voc", tmp_path)
    assert [item.id for item in items] == ["good"] and len(errors) == 1


def test_voc_pictures_missing_damaged_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="does not exist"):
        list(read_items("voc", tmp_path / "nowhere"))
    with pytest.raises(SampleError, match="holds no .xml file"):
        list(read_items("voc", tmp_path))
    voc(tmp_path, "a")
    with pytest.raises(SampleError, match=r"a\.xml: picture 'a\.jpg' is missing below"):
        list(read_items("voc", tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(SampleError, match=r"a\.xml: picture .*a\.jpg"):
        list(read_items("voc", tmp_path))


def test_voc_turned_pictures_have_the_displayed_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (tmp_path / "images").mkdir()
    Image.new("L", (40, 60)).save(tmp_path / "images" / "a.jpg", exif=exif)
    voc(tmp_path, "a", OBJECT.format("RBC", 50, 5, 59, 9))
    (item,) = read_items("voc", tmp_path)
    assert found(item) == [("RBC", (50, 5, 59, 9))]


def test_the_real_bccd_reads_whole(data_dir: Path) -> None:
    items = list(read_items("voc", data_dir / "bccd"))
    assert len(items) == 292
    labels = Counter(box.label for item in items for box in item.boxes)
    assert labels == {"RBC": 3348, "WBC": 301, "Platelets": 292}  # 3350 RBC, two without area
    assert {item.id: item.notes for item in items if item.notes} == {
        "BloodImage_00338": ("RBC box [504, 337, 504, 337] has no area: left out",),
        "BloodImage_00343": ("RBC box [181, 329, 181, 329] has no area: left out",),
    }
    assert len(list(read_items("voc", data_dir / "bccd", split="val"))) == 87


# COCO ------------------------------------------------------------------------------------------


def coco(folder: Path, name: str = "annotations/instances_val2017.json", **changes: Any) -> Path:
    document: dict[str, Any] = {
        "info": {},
        "images": [
            {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 9, "file_name": "b.png", "width": 60, "height": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 30, 20], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "cell"}, {"id": 5, "name": "crowd"}],
    } | changes
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document).encode())  # with a byte order mark
    for image in ("a", "b"):
        picture(folder / "val2017" / f"{image}.png")
    return path


def test_coco_boxes_crowds_and_empty_pictures(tmp_path: Path) -> None:
    path = coco(tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").write_text('{"images": []}')
    for source in (tmp_path, path):
        first, second = read_items("coco", source)
        assert found(first) == [("cell", (1, 2, 31, 22))] and found(second) == []
        assert first.notes == ("1 crowd regions left out",)
        assert first.question == "Locate all of: cell, crowd." and first.id == "a.png"
    assert len(list(read_items("coco", tmp_path, split="val"))) == 2
    with pytest.raises(SampleError, match="no .json file with 'train' in its name"):
        list(read_items("coco", tmp_path, split="train"))


def test_coco_of_several_files_has_unique_ids(tmp_path: Path) -> None:
    for split in ("train", "valid"):  # as Roboflow writes it
        coco(tmp_path / split, "_annotations.coco.json")
        for name in ("a", "b"):  # beside its own file, under names that both splits have
            picture(tmp_path / split / f"{name}.png")
        shutil.rmtree(tmp_path / split / "val2017")
    items = list(read_items("coco", tmp_path))
    assert len({item.id for item in items}) == len(items) == 4
    assert [item.images[0].name for item in items] == ["a.png", "b.png"] * 2
    folders = [item.images[0].parent.name for item in items if isinstance(item.images[0], Path)]
    assert folders == ["train"] * 2 + ["valid"] * 2


def test_coco_mistakes(tmp_path: Path) -> None:
    annotation = {"id": 4, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"annotations": [annotation | {"category_id": 8}]}, "annotation 4: category 8 has no"),
        ({"annotations": [annotation | {"bbox": [1, 2, 3]}]}, "is not four numbers"),
        ({"annotations": [annotation | {"image_id": 1}]}, "annotation 4 has no image"),
        ({"annotations": {}}, "'annotations' is not a list of objects"),
        ({"images": [{"id": 7, "file_name": "c.png"}]}, "picture 'c.png' is missing"),
        (
            {"images": [{"id": 7, "file_name": "a.png", "width": 9, "height": 9}]},
            "belong to 9 x 9, a.png",
        ),
    ]
    for number, (changes, message) in enumerate(cases):
        with pytest.raises(SampleError, match=message):
            list(read_items("coco", coco(tmp_path / str(number), **changes)))


# YOLO ------------------------------------------------------------------------------------------


def yolo(folder: Path, labels: str | None = "1 0.5 0.5 0.2 0.5\n\n", data: str = "") -> Path:
    picture(folder / "images" / "train" / "a.png", 100, 40)
    (folder / "labels" / "train").mkdir(parents=True, exist_ok=True)
    if labels is not None:
        (folder / "labels" / "train" / "a.txt").write_text(labels)
    (folder / "data.yaml").write_text(data or "path: .\nnc: 2\nnames:\n  0: RBC\n  1: WBC\n")
    return folder


def test_yolo_boxes_polygons_and_empty_pictures(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="data.yaml needs PyYAML")
    text = "1 0.5 0.5 0.2 0.5\n0 0.1 0.1 0.3 0.1 0.3 0.4\n1 0.5 0.5 0.2 0.5 0.93\n0 1.0 0.5 0.1 0.5"
    (item,) = read_items("yolo", yolo(tmp_path / "a", text, "names: [RBC, WBC]"), split="train")
    rows = found(item)
    assert [label for label, _ in rows] == ["WBC", "RBC", "WBC", "RBC"]
    for (_, box), wanted in zip(
        rows, [(40, 10, 60, 30), (10, 4, 30, 16), (40, 10, 60, 30), (95, 10, 100, 30)], strict=True
    ):
        assert box == pytest.approx(wanted)
    assert "was cut" in item.notes[0]
    (empty,) = read_items("yolo", yolo(tmp_path / "b", None))
    assert found(empty) == [] and empty.notes == ("no text file: the picture shows nothing",)


def test_yolo_darknet_form(tmp_path: Path) -> None:
    picture(tmp_path / "obj" / "a.JPG", 100, 40)
    (tmp_path / "obj" / "a.txt").write_text("0 0.5 0.5 0.2 0.5")
    (tmp_path / "obj.names").write_text("cell\r\n")
    (item,) = read_items("yolo", tmp_path)
    assert [label for label, _ in found(item)] == ["cell"]


@pytest.mark.parametrize(
    ("labels", "data", "message"),
    [
        ("1 0.5 0.5 0.2\n", "", "a.txt:1: 3 numbers are neither a box nor a polygon"),
        ("\nWBC 0.5 0.5 0.2 0.1\n", "", "a.txt:2: 'WBC 0.5 0.5 0.2 0.1' is not a list of numbers"),
        ("7 0.5 0.5 0.2 0.1", "", "class 7 has no name"),
        ("0 50 20 20 10", "", "lies mostly outside"),  # pixels instead of parts
        ("0 0.5 0.5 0.2 0.1", "nc: 2\n", "data.yaml has no names"),
        ("0 0.5 0.5 0.2 0.1", "names: [", "data.yaml is not YAML"),
    ],
)
def test_yolo_mistakes(tmp_path: Path, labels: str, data: str, message: str) -> None:
    pytest.importorskip("yaml", reason="data.yaml needs PyYAML")
    with pytest.raises(SampleError, match=message):
        list(read_items("yolo", yolo(tmp_path, labels, data)))


def test_yolo_without_class_names(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(SampleError, match="no data.yaml or classes.txt"):
        list(read_items("yolo", tmp_path))


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'vco' is unknown: use one of voc, coco"):
        read_items("vco", tmp_path)
