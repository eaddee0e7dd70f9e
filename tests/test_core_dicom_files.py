"""Real DICOM files: equal pictures from every encoding, and agreement with pydicom and DCMTK.

The files inside pydicom are always there; those of MEDMO_EDGE_DATA are skipped without it.
"""

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
    convert_color_space,
)

from medmo_edge.dicom_process import IN_PROCESS
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame, read_image

INSTALLED = Path(pydicom.data.__file__).parent / "test_files"

# Lossless encodings of one picture.
SAME_INSTALLED = [
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_expb.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_padded.dcm",
    ],
    [
        "SC_rgb_rle.dcm",
        "SC_rgb_rle_16bit.dcm",
        "SC_rgb_rle_16bit_2frame.dcm",
        "SC_rgb_rle_2frame.dcm",
        "SC_rgb_rle_32bit.dcm",
        "SC_rgb_rle_32bit_2frame.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
    ],
    [
        "rtdose.dcm",
        "rtdose_1frame.dcm",
        "rtdose_expb.dcm",
        "rtdose_rle.dcm",
        "rtdose_rle_1frame.dcm",
    ],
    ["liver_1frame.dcm", "liver_expb_1frame.dcm"],
    ["SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm"],
]
SAME_DATA = [
    [
        "pydicom-data/liver_expb.dcm",
        "pydicom-data/liver_deflate.dcm",
        "pydicom-data/liver_j2k.dcm",
        "pydicom-data/liver_rle.dcm",
    ],
    [
        "pydicom-data/liver_nonbyte_aligned.dcm",
        "pydicom-data/liver_nonbyte_aligned_deflate.dcm",
        "pydicom-data/liver_nonbyte_aligned_j2k.dcm",
        "pydicom-data/liver_nonbyte_aligned_rle.dcm",
    ],
    [
        "pydicom-data/SC_rgb_expb.dcm",
        "pydicom-data/SC_rgb_expb_16bit.dcm",
        "pydicom-data/SC_rgb_expb_16bit_2frame.dcm",
        "pydicom-data/SC_rgb_expb_32bit.dcm",
        "pydicom-data/SC_rgb_expb_32bit_2frame.dcm",
        "pydicom-data/SC_rgb_expb_2frame.dcm",
    ],
    [f"pydicom-data/JLSL_RGB_ILV{mode}.dcm" for mode in range(3)],
    [
        "highdicom/sm_image.dcm",
        "highdicom/sm_image_jpegls.dcm",
        "highdicom/sm_image_jpegls_nobot.dcm",
    ],
    ["pydicom-data/color-pl.dcm", "pydicom-data/color-px.dcm"],
    ["pydicom-data/gdcm-US-ALOKA-16.dcm", "pydicom-data/gdcm-US-ALOKA-16_big.dcm"],
    ["pydicom-data/OBXXXX1A_expb.dcm", "pydicom-data/OBXXXX1A_expb_2frame.dcm"],
]
# Compressed file -> the same file decompressed by the tool that made it.
TWINS = {
    "SC_rgb_dcmtk_+eb+cr.dcm": "SC_rgb_dcmtk_ebcr_dcmd.dcm",
    "SC_rgb_dcmtk_+eb+cy+n1.dcm": "SC_rgb_dcmtk_ebcyn1_dcmd.dcm",
    "SC_rgb_dcmtk_+eb+cy+n2.dcm": "SC_rgb_dcmtk_ebcyn2_dcmd.dcm",
    "SC_rgb_dcmtk_+eb+cy+np.dcm": "SC_rgb_dcmtk_ebcynp_dcmd.dcm",
    "SC_rgb_dcmtk_+eb+cy+s2.dcm": "SC_rgb_dcmtk_ebcys2_dcmd.dcm",
    "SC_rgb_dcmtk_+eb+cy+s4.dcm": "SC_rgb_dcmtk_ebcys4_dcmd.dcm",
    "SC_rgb_gdcm_KY.dcm": "SC_rgb_gdcm2k_uncompressed.dcm",
    "693_J2KI.dcm": "693_UNCI.dcm",
    "JPEG2000.dcm": "JPEG2000_UNC.dcm",
}


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_PROCESS, "1")


def frames_of(paths: list[Path]) -> list[NDArray[np.uint8]]:
    return [read_image(path).pixels for path in paths]


def assert_identical(paths: list[Path]) -> None:
    first, *others = frames_of(paths)
    assert first.std() > 0, f"{paths[0]} is blank: equality would mean nothing"
    for path, other in zip(paths[1:], others, strict=True):
        np.testing.assert_array_equal(other, first, err_msg=path.name)


@pytest.mark.parametrize("names", SAME_INSTALLED, ids=lambda names: names[0])
def test_lossless_encodings_give_the_identical_array(names: list[str]) -> None:
    assert_identical([INSTALLED / name for name in names])


@pytest.mark.parametrize("names", SAME_DATA, ids=lambda names: names[0])
def test_lossless_encodings_of_real_data_too(names: list[str], data_dir: Path) -> None:
    assert_identical([data_dir / "dicom" / name for name in names])


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_lossy_files_equal_what_their_own_tool_made_of_them(
    name: str, twin: str, data_dir: Path
) -> None:
    """Other JPEG libraries round and upsample chroma differently: a few levels at edges."""
    ours = read_image(INSTALLED / name).pixels.astype(int)
    theirs = read_image(data_dir / "dicom" / "pydicom-data" / twin).pixels.astype(int)
    difference = np.abs(ours - theirs)
    assert np.median(difference) <= 1
    assert difference.mean() < 1.5


def test_a_reversible_colour_transform_is_undone_exactly(data_dir: Path) -> None:
    compressed = INSTALLED / "examples_jpeg2k.dcm"  # YBR_RCT
    assert_identical([compressed, data_dir / "dicom" / "pydicom-data" / "US1_UNCR.dcm"])


def test_a_monochrome1_twin_is_the_negative(data_dir: Path) -> None:
    folder = data_dir / "dicom" / "torchxrayvision"
    plain = read_image(next(folder.glob("1.2.276*.dcm"))).pixels
    twin = read_image(folder / "Fake_MONOHR1.dcm").pixels
    np.testing.assert_array_equal(255 - twin, plain)


MONOCHROME = [
    "693_J2KI.dcm",
    "CT_small.dcm",
    "J2K_pixelrep_mismatch.dcm",
    "MR_small.dcm",
    "MR_small_RLE.dcm",
    "examples_overlay.dcm",
    "image_dfl.dcm",
    "JPEGLSNearLossless_16.dcm",
]
MONOCHROME_DATA = [
    "pydicom-data/693_UNCR.dcm",
    "pydicom-data/MR-SIEMENS-DICOM-WithOverlays.dcm",
    "pydicom-data/JLSL_16_15_1_1F.dcm",
    "pydicom-data/mlut_18.dcm",
    "pydicom-data/vlut_04.dcm",
    "pydicom-data/bad_sequence.dcm",
    "highdicom/dx_image.dcm",
]


def pydicom_grey(path: Path, window: dict[str, Any]) -> NDArray[np.float64]:
    """0..255 as pydicom's own functions make it, with the same window, LUT or range."""
    dataset = dcmread(path)
    values = np.asarray(apply_modality_lut(dataset.pixel_array, dataset), np.float64)
    if "low" in window:
        unit = (values - window["low"]) / (window["high"] - window["low"])
    elif "lut_bits" in window:
        unit = apply_voi(values.astype(np.int64), dataset) / (2 ** window["lut_bits"] - 1)
    else:
        unit = _pydicom_window(values, dataset, window)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        unit = 1 - unit
    return np.asarray(unit * 255, np.float64)


def _pydicom_window(
    values: NDArray[np.float64], dataset: Dataset, window: dict[str, Any]
) -> NDArray[np.float64]:
    dataset.WindowCenter, dataset.WindowWidth = str(window["center"]), str(window["width"])
    low, high = apply_windowing(np.array([-1e9, 1e9]), dataset)
    return np.asarray((apply_windowing(values, dataset) - low) / (high - low), np.float64)


def assert_as_pydicom(path: Path) -> None:
    frame = read_image(path)
    assert frame.source.window is not None
    expected = pydicom_grey(path, frame.source.window)
    assert np.abs(frame.pixels[..., 0] - expected).max() <= 0.5 + 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's remarks on these files
@pytest.mark.parametrize("name", MONOCHROME)
def test_grey_levels_agree_with_pydicom(name: str) -> None:
    assert_as_pydicom(INSTALLED / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MONOCHROME_DATA)
def test_grey_levels_of_real_data_agree_with_pydicom(name: str, data_dir: Path) -> None:
    assert_as_pydicom(data_dir / "dicom" / name)


def test_every_frame_of_a_colour_cine_agrees_with_pydicom() -> None:
    path = INSTALLED / "examples_ybr_color.dcm"
    dataset = dcmread(path)
    assert dataset.NumberOfFrames == 30
    for number in (0, 17, 29):
        frame = read_image(path, frame=number)
        expected = _pydicom_cine(path, number)
        assert np.abs(frame.pixels.astype(int) - expected).max() <= 1
        assert (frame.source.frame, frame.source.num_frames) == (number, 30)


@lru_cache(maxsize=1)
def _pydicom_cine_frames(path: Path) -> NDArray[np.uint8]:
    from pydicom.pixels.utils import pixel_array

    return np.asarray(pixel_array(path, raw=True))


def _pydicom_cine(path: Path, number: int) -> NDArray[np.int64]:
    raw = _pydicom_cine_frames(path)[number]
    return np.asarray(convert_color_space(raw, "YBR_FULL", "RGB"), np.int64)


def test_uncompressed_ybr_agrees_with_pydicom(data_dir: Path) -> None:
    from pydicom.pixels.utils import pixel_array

    path = data_dir / "dicom" / "pydicom-data" / "SC_ybr_full_uncompressed.dcm"
    difference = np.abs(read_image(path).pixels.astype(int) - pixel_array(path))
    assert difference.max() <= 1


def test_a_palette_agrees_with_pydicom() -> None:
    path = INSTALLED / "examples_palette.dcm"
    dataset = dcmread(path)
    expected = apply_color_lut(dataset.pixel_array, dataset)
    scale = 255 / (2 ** (8 * expected.dtype.itemsize) - 1)
    difference = np.abs(read_image(path).pixels - expected * scale)
    assert difference.max() <= 0.5 + 1e-6


DCMTK_OPTIONS: dict[str, list[str]] = {
    "CT_small.dcm": ["+Ww", "40", "400"],
    "MR_small.dcm": ["+Wi", "1"],
    "MR_small_bigendian.dcm": ["+Wi", "1"],
    "MR_small_RLE.dcm": ["+Wi", "1"],
    "examples_overlay.dcm": ["+Wi", "1", "-O"],
    "image_dfl.dcm": [],
    "examples_rgb_color.dcm": [],
    "SC_rgb_rle.dcm": [],
    "examples_palette.dcm": [],
}
DCMTK_DATA_OPTIONS = {
    "pydicom-data/693_UNCR.dcm": ["+Wi", "1"],
    "pydicom-data/MR-SIEMENS-DICOM-WithOverlays.dcm": ["+Wi", "1", "-O"],
    "pydicom-data/vlut_04.dcm": ["+Wl", "1"],
    "pydicom-data/mlut_18.dcm": ["+Wm"],
    "pydicom-data/JPEG2000_UNC.dcm": ["+Wm"],
    "highdicom/dx_image.dcm": ["+Wi", "1"],
    "highdicom/ct_image.dcm": ["+Ww", "40", "400"],
}


def assert_as_dcmtk(path: Path, options: list[str], tmp_path: Path) -> None:
    tool = shutil.which("dcm2pnm")
    if tool is None:
        pytest.skip("DCMTK's dcm2pnm is not installed")
    result = tmp_path / "frame.pnm"
    subprocess.run([tool, "-q", *options, str(path), str(result)], check=True)
    with Image.open(result) as image:
        theirs = np.asarray(image.convert("RGB")).astype(int)
    ours = read_image(path).pixels.astype(int)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(("name", "options"), DCMTK_OPTIONS.items())
def test_pictures_agree_with_dcmtk(name: str, options: list[str], tmp_path: Path) -> None:
    assert_as_dcmtk(INSTALLED / name, options, tmp_path)


@pytest.mark.parametrize(("name", "options"), DCMTK_DATA_OPTIONS.items())
def test_pictures_of_real_data_agree_with_dcmtk(
    name: str, options: list[str], tmp_path: Path, data_dir: Path
) -> None:
    assert_as_dcmtk(data_dir / "dicom" / name, options, tmp_path)


REFUSED = {
    "MR_truncated.dcm": "pixel data is truncated",
    "DICOMDIR-empty.dcm": "DICOMDIR",
    "reportsi.dcm": "no pixel data .it is a Basic Text SR",
    "rtplan.dcm": "no pixel data .it is a RT Plan",
    "rtstruct.dcm": "no pixel data .it is a RT Structure Set",
    "waveform_ecg.dcm": "no pixel data .it is a 12-lead ECG",
    "badVR.dcm": "NumberOfFrames",
    "zipMR.gz": "neither a DICOM file nor",
    "JPEG2000-embedded-sequence-delimiter.dcm": "compressed frame is 3722445056 x 1024",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_files_without_a_picture_are_refused_with_the_reason(name: str, reason: str) -> None:
    path = next(INSTALLED.rglob(name))
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_twelve_bit_jpeg_needs_imagecodecs_and_says_so() -> None:
    path = INSTALLED / "JPGExtended.dcm"
    try:
        import imagecodecs  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ImageError, match="imagecodecs: not installed, pip install imagecodecs"):
            read_image(path)
        return
    frame = read_image(path)
    assert frame.source.dicom is not None
    assert frame.source.dicom["decoder"] == "imagecodecs"
    # The JPEG 2000 file of the same study is another lossy copy of this picture.
    other: Frame = read_image(INSTALLED / "JPEG2000.dcm")
    pair = [one.pixels[..., 0].ravel().astype(float) for one in (frame, other)]
    assert np.corrcoef(pair)[0, 1] > 0.9
