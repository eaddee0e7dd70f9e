"""Where results put the boxes and what viewers then show: pixels, checked with DCMTK and Pillow."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_bench import tool
from PIL import Image
from result_objects import ask, read

from medmo_edge.images import read_image
from medmo_edge.runtime.results import ResultOptions, make_gsps, make_sc, make_sr

pytest.importorskip("highdicom", reason="DICOM results need the dicom extra")
pydicom = pytest.importorskip("pydicom")

WriteSource = Callable[..., Path]
GREY_WITH_NAME = ("cr", "dx", "dx1", "ct", "mr", "mr-frames")
pytestmark = pytest.mark.usefixtures("decode_here")


def _items(item: Any) -> list[Any]:
    found = []
    for child in item.get("ContentSequence", ()):
        found += [child, *_items(child)]
    return found


@pytest.mark.parametrize("kind", GREY_WITH_NAME)
def test_dcmtk_shows_the_presentation_state_as_the_model_saw_it(
    kind: str, write_source: WriteSource, tmp_path: Path
) -> None:
    path = write_source(kind, tmp_path / "source.dcm")
    number = 3 if kind == "mr-frames" else 1
    window = (400.0, 700.0) if kind in ("ct", "mr") else None
    frame = read_image(path, frame=number - 1, window=window)
    state, shown = tmp_path / "state.dcm", tmp_path / "shown.pgm"
    state.write_bytes(make_gsps([frame], ask([frame])))
    command: list[str | Path] = [tool("dcmp2pgm"), "-f", str(number), "-p", state, path, shown]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with Image.open(shown) as picture:
        values = np.asarray(picture, np.int16)
    assert np.abs(values - frame.pixels[:, :, 0]).max() <= 1
    assert frame.pixels.max() > frame.pixels.min()


def test_the_presentation_state_draws_the_boxes(write_source: WriteSource, tmp_path: Path) -> None:
    frame = read_image(write_source("us-frames", tmp_path / "source.dcm"), frame=1)
    answer = ask([frame])
    options = ResultOptions(seed="one")
    state = read(make_gsps([frame], answer, options))
    report = read(make_sr([frame], answer, options))
    assert state.SOPClassUID.name == "Color Softcopy Presentation State Storage"
    (annotation,) = state.GraphicAnnotationSequence
    assert annotation.ReferencedImageSequence[0].ReferencedFrameNumber == 2
    for drawn, box in zip(annotation.GraphicObjectSequence, answer.boxes, strict=True):
        points = np.array(drawn.GraphicData).reshape(5, 2)
        assert np.allclose((*points.min(axis=0), *points.max(axis=0)), box.xyxy)
        assert drawn.GraphicAnnotationUnits == "PIXEL"
    texts = [item.UnformattedTextValue for item in annotation.TextObjectSequence]
    assert texts[1:] == [box.label for box in answer.boxes] and "RESEARCH USE ONLY" in texts[0]
    tracked = {item.UID for item in _items(report) if item.ValueType == "UIDREF"}
    assert {drawn.TrackingUID for drawn in annotation.GraphicObjectSequence} <= tracked


def test_the_capture_holds_the_frame_and_its_boxes(
    write_source: WriteSource, tmp_path: Path
) -> None:
    frame = read_image(write_source("dx", tmp_path / "source.dcm"))
    capture = read(make_sc([frame], ask([frame], "nodule <box>[[250, 250, 500, 750]]</box>")))
    assert capture.BurnedInAnnotation == "YES" and capture.Modality == "OT"
    assert list(capture.ImageType) == ["DERIVED", "SECONDARY"]
    pixels = capture.pixel_array
    scale = pixels.shape[1] // frame.pixels.shape[1]
    height, width = frame.pixels.shape[0] * scale, frame.pixels.shape[1] * scale
    expected = np.asarray(Image.fromarray(frame.pixels).resize((width, height)), np.int16)
    changed = np.abs(pixels[:height] - expected).max(axis=2) > 0
    rows, columns = np.nonzero(changed)
    left, top = width // 4, height // 4
    right, bottom = width // 2, height * 3 // 4
    assert (columns.min(), columns.max(), rows.max()) == (left, right - 1, bottom - 1)
    assert rows.min() < top  # the label stands above its box
    inside = changed[top + 3 : bottom - 3, left + 3 : right - 3]
    assert not inside.any()
    orange = tuple(int("E69F00"[i : i + 2], 16) for i in (0, 2, 4))
    assert tuple(pixels[bottom - 1, (left + right) // 2]) == orange
    assert tuple(pixels[(top + bottom) // 2, left]) == orange
    assert pixels[height:].any()  # the notice below the picture


def test_boxes_of_oblong_pixels_are_in_stored_columns_and_rows(
    write_source: WriteSource, tmp_path: Path
) -> None:
    path = write_source("ct", tmp_path / "source.dcm", PixelAspectRatio=[2, 1], PixelSpacing=None)
    frame = read_image(path)
    assert frame.pixels.shape[:2] == (256, 128)
    answer = ask([frame], "nodule <box>[[500, 500, 1000, 1000]]</box>")
    report, state = read(make_sr([frame], answer)), read(make_gsps([frame], answer))
    (region,) = [item for item in _items(report) if item.ValueType == "SCOORD"]
    assert list(region.GraphicData) == [64, 64, 128, 64, 128, 128, 64, 128, 64, 64]
    (drawn,) = state.GraphicAnnotationSequence[0].GraphicObjectSequence
    assert list(drawn.GraphicData) == list(region.GraphicData)
    area = state.DisplayedAreaSelectionSequence[0]
    assert list(area.PresentationPixelAspectRatio) == [2, 1]
