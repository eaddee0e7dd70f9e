"""Blood smears: VOC files as they are found, and the real set when it is at hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmo_edge.errors import SampleError
from medmo_edge.train.blood import read_blood, read_names, read_scene

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


def smear(folder: Path, *objects: str, picture: bytes | None = None) -> Path:
    """A data set of one picture with these objects."""
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    if picture is None:
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / "images" / "a.jpg")
    else:
        (folder / "images" / "a.jpg").write_bytes(picture)
    notes = f"<annotation>{''.join(objects)}</annotation>"
    (folder / "annotations" / "a.xml").write_text(notes, encoding="utf-8")
    return folder


def test_boxes_are_read_and_empty_ones_left_out(tmp_path: Path) -> None:
    whole, flat = OBJECT.format("WBC", 1, 2, 30, 20), OBJECT.format("RBC", 5, 5, 5, 9)
    scene = read_scene(smear(tmp_path, whole, flat), "a")
    assert scene.pixels.shape == (40, 60, 3)
    assert [(box.label, box.xyxy) for box in scene.boxes] == [("WBC", (1, 2, 30, 20))]


@pytest.mark.parametrize(
    "notes",
    [
        OBJECT.format("cat", 1, 2, 3, 4),
        OBJECT.format("WBC", "", 2, 3, 4),
        "<object><name>WBC</name></object>",
        "<object>",
    ],
)
def test_notes_that_mean_nothing_are_named(tmp_path: Path, notes: str) -> None:
    with pytest.raises(SampleError, match="blood smear a in .* cannot be read"):
        read_scene(smear(tmp_path, notes), "a")


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="blood smear a in"):
        read_scene(smear(tmp_path, picture=b"no jpeg"), "a")


def test_a_missing_set_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="set MEDMO_EDGE_DATA or --data"):
        read_blood(tmp_path, "train")


def test_the_real_splits_are_apart_and_whole(data_dir: Path) -> None:
    train, val = (set(read_names(data_dir / "bccd", split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (205, 87) and not train & val
    scenes = read_blood(data_dir, "val")
    assert sum(scene.count("WBC") for scene in scenes) == 87
    for scene in scenes:
        height, width = scene.pixels.shape[:2]
        assert scene.boxes and all(box.area > 0 for box in scene.boxes)
        assert all(0 <= box.x1 < box.x2 <= width + 1 for box in scene.boxes)
        assert all(0 <= box.y1 < box.y2 <= height + 1 for box in scene.boxes)
