"""Written radiographs: read back unchanged, valid for dciodvfy, obviously synthetic."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydicom import dcmread

from medmo_edge.dicom_process import IN_PROCESS
from medmo_edge.dicom_write import write_radiograph
from medmo_edge.errors import ImageError
from medmo_edge.images import read_image

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_PROCESS, "1")


@pytest.mark.parametrize("monochrome1", [False, True])
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pixels=arrays(np.uint8, SHAPES))
def test_eight_bits_are_read_back_unchanged(
    tmp_path: Path, pixels: NDArray[np.uint8], monochrome1: bool
) -> None:
    path = tmp_path / "image.dcm"
    write_radiograph(path, pixels, monochrome1=monochrome1)
    frame = read_image(path)
    np.testing.assert_array_equal(frame.pixels[..., 0], pixels)
    assert frame.source.notes == ()


def test_twelve_bits_are_stored_as_they_are(tmp_path: Path) -> None:
    pixels = np.array([[0, 1, 2048, 4095]], np.uint16)
    write_radiograph(tmp_path / "a.dcm", pixels)
    np.testing.assert_array_equal(dcmread(tmp_path / "a.dcm").pixel_array, pixels)
    write_radiograph(tmp_path / "b.dcm", pixels, monochrome1=True)
    np.testing.assert_array_equal(dcmread(tmp_path / "b.dcm").pixel_array, 4095 - pixels)


def test_the_identity_is_synthetic_and_new(tmp_path: Path) -> None:
    made = []
    for name in "ab":
        write_radiograph(tmp_path / name, np.zeros((4, 4), np.uint8))
        made.append(dcmread(tmp_path / name))
    assert str(made[0].PatientName) == "PHANTOM^DRAWN"
    assert "SYNTHETIC" in made[0].StudyDescription
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert made[0][keyword].value != made[1][keyword].value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("monochrome1", [False, True])
def test_dciodvfy_finds_no_error(tmp_path: Path, monochrome1: bool) -> None:
    tool = shutil.which("dciodvfy")
    if tool is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    path = tmp_path / "image.dcm"
    write_radiograph(path, np.full((5, 7), 9, np.uint8), monochrome1=monochrome1)
    run = subprocess.run([tool, "-new", str(path)], capture_output=True, text=True, check=False)
    complaints = [line for line in (run.stdout + run.stderr).splitlines() if ": " in line]
    assert "DXImageForPresentation" in run.stdout + run.stderr
    assert complaints == []
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((2, 2), np.float32), "no uint8 or uint16"),
        (np.zeros((2, 2, 3), np.uint8), "no uint8 or uint16"),
        (np.full((2, 2), 4096, np.uint16), "does not fit into 12 bits"),
        (np.zeros((0, 5), np.uint8), "empty"),
        (np.zeros((1, 70000), np.uint8), "65535"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, pixels: NDArray[np.uint8], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        write_radiograph(tmp_path / "image.dcm", pixels)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be written"):
        write_radiograph(tmp_path / "nowhere" / "image.dcm", np.zeros((2, 2), np.uint8))
