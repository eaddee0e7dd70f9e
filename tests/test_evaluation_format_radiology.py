"""Readers of NIH ChestX-ray14 and DeepLesion on tiny folders in the publishers' own form."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.formats import Embedded, Item, read_items


def found(item: Item) -> list[tuple[str, tuple[float, ...]]]:
    return [(box.label, box.xyxy) for box in item.boxes]


# NIH -------------------------------------------------------------------------------------------

NIH = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"


def nih(folder: Path, rows: str, side: int = 1024) -> Path:
    for name in ("00000013_005.png", "00000032_001.png"):
        path = folder / "images_001" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (side, side)).save(path)
    (folder / "BBox_List_2017.csv").write_text(NIH + rows)
    return folder


def test_nih_groups_boxes_by_picture_and_keeps_the_patient(tmp_path: Path) -> None:
    rows = (
        "00000013_005.png,Infiltrate,225.084745762712,547.019216763771,86.5,79.25,,,\n"
        "00000032_001.png,Mass,10,20,30,40,,,\n"
        "00000013_005.png,Effusion,600,100,100,200,,,\n"
    )
    first, second = read_items("nih", nih(tmp_path, rows))
    assert (first.id, first.group) == ("00000013_005", "nih/00000013")
    wanted = (225.084745762712, 547.019216763771, 311.584745762712, 626.269216763771)
    assert first.boxes[0].label == "Infiltrate" and first.boxes[0].xyxy == pytest.approx(wanted)
    assert found(first)[1] == ("Effusion", (600, 100, 700, 300)) and len(second.boxes) == 1
    (tmp_path / "test_list.txt").write_text("00000032_001.png\n00000099_000.png\n")
    assert [item.id for item in read_items("nih", tmp_path, split="test")] == ["00000032_001"]
    with pytest.raises(SampleError, match="has no split 'val': use train or test"):
        list(read_items("nih", tmp_path, split="val"))


def test_nih_boxes_follow_a_resized_copy(tmp_path: Path) -> None:
    folder = nih(tmp_path, "00000013_005.png,Mass,512,256,256,128,,,\n", side=256)
    (item,) = read_items("nih", folder / "BBox_List_2017.csv")
    assert found(item) == [("Mass", (128, 64, 192, 96))]
    assert item.notes == ("boxes scaled from 1024 to 256 x 256",)


def test_nih_mistakes(tmp_path: Path) -> None:
    rows = "00000013_005.png,Mass,x,2,3,4,,,\n00000001_000.png,Mass,1,2,3,4,,,\n"
    source = nih(tmp_path, rows + "00000032_001.png,Mass,1,2,3,4,,,\n")
    broken: list[SampleError] = []
    items = list(read_items("nih", source, broken=broken.append))
    errors = [str(error) for error in broken]
    assert [item.id for item in items] == ["00000032_001"]
    assert "BBox_List_2017.csv:2: ['x', '2', '3', '4'] is not four numbers" in errors[0]
    assert "BBox_List_2017.csv:3: picture '00000001_000.png' is missing" in errors[1]
    (tmp_path / "BBox_List_2017.csv").write_text("Image Index,Finding Label\n")
    with pytest.raises(SampleError, match=r"column 'Bbox \[x' is missing"):
        list(read_items("nih", tmp_path))
    (tmp_path / "BBox_List_2017.csv").write_text(NIH + "a,b\n")
    with pytest.raises(SampleError, match=r"csv:2: 2 cells under 9 columns"):
        list(read_items("nih", tmp_path))


# DeepLesion ------------------------------------------------------------------------------------

DL = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,"
    "Bounding_boxes,Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,"
    "Possibly_noisy,Slice_range,Spacing_mm_px_,Image_size,DICOM_windows,Patient_gender,"
    "Patient_age,Train_Val_Test\n"
)
DL_ROW = (
    '{name},000001,01,01,109,"233.5, 95.0, 234.5, 106.1","{box}","14.2, 8.9","0.4, 0.3, 0.7",'
    '{kind},0,"103, 115","0.49, 0.49, 5","512, 512","{window}",F,62,{split}\n'
)


def deeplesion(folder: Path, *rows: str) -> Path:
    """A ramp of -1000..1000 HU, stored with the publisher's offset."""
    ramp = np.linspace(-1000, 1000, 64).round().astype(np.int64)
    stored = (np.tile(ramp, (64, 1)) + 32768).astype(np.uint16)
    path = folder / "Images_png" / "000001_01_01" / "109.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(stored).save(path)
    (folder / "DL_info.csv").write_text(DL + "".join(rows))
    return folder


def dl_row(**changes: str) -> str:
    row = {"name": "000001_01_01_109.png", "box": "22.6, 9.0, 40, 31", "kind": "3"}
    return DL_ROW.format(**({"window": "-175,275", "split": "3"} | row | changes))


def test_deeplesion_slices_are_shown_in_the_window_of_their_row(tmp_path: Path) -> None:
    source = deeplesion(
        tmp_path,
        dl_row(),
        dl_row(box="1, 2, 3, 4", kind="-1"),
        dl_row(window="-1500, 500", split="1"),
    )
    items = list(read_items("deeplesion", source))
    assert [item.id for item in items] == [
        "000001_01_01_109_-175_275",
        "000001_01_01_109_-1500_500",
    ]
    assert found(items[0]) == [("lesion", (22.6, 9, 40, 31)), ("lesion", (1, 2, 3, 4))]
    assert items[0].group == "deeplesion/000001"
    assert items[0].meta == {"window": [-175.0, 275.0], "types": ["mediastinum", None]}
    (image,) = items[0].images
    assert isinstance(image, Embedded) and image.name == "000001_01_01_109_-175_275.png"
    grey = np.asarray(Image.open(BytesIO(image.data)))
    assert grey.dtype == np.uint8 and grey.shape == (64, 64)
    hounsfield = np.linspace(-1000, 1000, 64).round()
    wanted = [min(255, max(0, round((value + 175) / 450 * 255))) for value in hounsfield]
    assert grey[0].tolist() == wanted and wanted[0] == 0 and wanted[-1] == 255
    assert len(list(read_items("deeplesion", source, split="test"))) == 1
    with pytest.raises(SampleError, match="has no split 'x'"):
        list(read_items("deeplesion", source, split="x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "000001_01_01_110.png"}, "DL_info.csv:2: picture '000001_01_01/110.png' is miss"),
        ({"window": "275"}, "DICOM_windows '275' is not two numbers"),
        ({"window": "275,-175"}, "is empty"),
        ({"box": "1, 2, 3"}, "is not four numbers"),
    ],
)
def test_deeplesion_mistakes(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        list(read_items("deeplesion", deeplesion(tmp_path, dl_row(**changes))))


def test_deeplesion_wants_16_bit_slices(tmp_path: Path) -> None:
    source = deeplesion(tmp_path, dl_row())
    Image.new("L", (64, 64)).save(tmp_path / "Images_png" / "000001_01_01" / "109.png")
    with pytest.raises(SampleError, match="is no 16-bit slice"):
        list(read_items("deeplesion", source))
