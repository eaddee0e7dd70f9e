"""Pixels of synthetic DICOM files against values worked out by hand, step by step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medmo_edge.dicom_process import IN_PROCESS
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame, read_image


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process has its own tests; here it would only cost half a second a file."""
    monkeypatch.setenv(IN_PROCESS, "1")


def dataset(stored: NDArray[Any], **elements: Any) -> Dataset:
    """A minimal image object around ``stored`` [H, W], [H, W, 3] or, with NumberOfFrames, more."""
    made = Dataset()
    made.SOPClassUID = SecondaryCaptureImageStorage
    made.SOPInstanceUID = generate_uid()
    colour = stored.ndim == 3 and "NumberOfFrames" not in elements
    frames = "NumberOfFrames" in elements
    made.Rows, made.Columns = stored.shape[frames : frames + 2]
    made.SamplesPerPixel = 3 if colour else 1
    made.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        made.PlanarConfiguration = 0
    made.BitsAllocated = stored.dtype.itemsize * 8
    made.BitsStored = made.BitsAllocated
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(stored.dtype.kind == "i")
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    if "BitsStored" in elements and "HighBit" not in elements:
        made.HighBit = made.BitsStored - 1
    made.PixelData = stored.tobytes() + bytes(stored.nbytes % 2)
    made["PixelData"].VR = "OW" if stored.dtype.itemsize > 1 else "OB"
    return made


def show(
    path: Path, made: Dataset, *, syntax: str = ExplicitVRLittleEndian, **options: Any
) -> Frame:
    return read_image(write(path, made, syntax), **options)


def write(path: Path, made: Dataset, syntax: str) -> Path:
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = UID(syntax)
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    file = path / "image.dcm"
    made.save_as(file, enforce_file_format=True)
    return file


def grey(frame: Frame) -> list[Any]:
    """One channel as lists; all three must be equal."""
    pixels = frame.pixels
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return [list(map(int, row)) for row in pixels[..., 0]]


MPEG2 = "1.2.840.10008.1.2.4.100"
U8 = np.array([[0, 1, 128, 255]], np.uint8)
U16 = np.array([[0, 1000, 2000, 4000]], np.uint16)


def test_eight_bits_without_window_are_shown_as_they_are(tmp_path: Path) -> None:
    frame = show(tmp_path, dataset(U8))
    assert grey(frame) == [[0, 1, 128, 255]]
    assert frame.source.window == {"low": 0.0, "high": 255.0, "from": "stored range"}


def test_deeper_values_without_window_take_the_range_of_the_frame(tmp_path: Path) -> None:
    assert grey(show(tmp_path, dataset(U16))) == [[0, 64, 128, 255]]


def test_padding_does_not_widen_the_range(tmp_path: Path) -> None:
    stored = np.array([[-2000, 0, 50, 100]], np.int16)
    made = dataset(stored, PixelPaddingValue=-2000)
    made["PixelPaddingValue"].VR = "SS"
    assert grey(show(tmp_path, made)) == [[0, 0, 128, 255]]
    # The same as US, a common mistake, and with a range of padding values.
    made = dataset(stored, PixelPaddingValue=65536 - 2000, PixelPaddingRangeLimit=65536 - 1)
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        made[keyword].VR = "US"
    assert grey(show(tmp_path, made, window="auto")) == [[0, 0, 128, 255]]


def test_padding_stays_black_in_an_inverted_frame(tmp_path: Path) -> None:
    made = dataset(U16, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0, BitsStored=12)
    made["PixelPaddingValue"].VR = "US"
    assert grey(show(tmp_path, made)) == [[0, 255, 170, 0]]


def test_the_window_works_on_rescaled_values(tmp_path: Path) -> None:
    stored = np.array([[0, 1024, 1064, 2000]], np.uint16)
    made = dataset(stored, RescaleSlope="1", RescaleIntercept="-1024")
    made.WindowCenter, made.WindowWidth = "40", "400"
    # 40 HU: ((40 - 39.5) / 399 + 0.5) * 255 = 127.8; 0 HU: ((0 - 39.5) / 399 + 0.5) * 255 = 102.3
    frame = show(tmp_path, made)
    assert grey(frame) == [[0, 102, 128, 255]]
    assert frame.source.dicom is not None
    assert frame.source.dicom["rescale"] == {"slope": 1.0, "intercept": -1024.0}


def test_a_missing_slope_is_one_and_said(tmp_path: Path) -> None:
    made = dataset(np.array([[1024, 1124]], np.uint16), RescaleIntercept="-1024")
    frame = show(tmp_path, made, window=(50, 101))
    assert grey(frame) == [[1, 255]]  # (0 - 49.5) / 100 + 0.5 of 255
    assert "only one of RescaleSlope and RescaleIntercept is stated" in frame.source.notes


@pytest.mark.parametrize("shape", [None, "INVERSE", "IDENTITY"])
def test_monochrome1_is_inverted_once(tmp_path: Path, shape: str | None) -> None:
    made = dataset(U8, PhotometricInterpretation="MONOCHROME1")
    if shape:
        made.PresentationLUTShape = shape
    assert grey(show(tmp_path, made)) == [[255, 254, 127, 0]]


def test_an_inverse_shape_alone_inverts_after_the_window(tmp_path: Path) -> None:
    made = dataset(U8, PresentationLUTShape="INVERSE", WindowCenter="128", WindowWidth="2")
    # LINEAR 128/2 runs from 127 to 128: before the inversion 0, 0, 1, 1.
    assert grey(show(tmp_path, made)) == [[255, 255, 0, 0]]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR", [0, 64, 191, 255]),
        ("LINEAR_EXACT", [0, 64, 191, 255]),
        ("SIGMOID", [30, 69, 186, 225]),
    ],
)
def test_the_three_functions(tmp_path: Path, function: str, expected: list[int]) -> None:
    stored = np.array([[0, 2500, 7500, 10000]], np.uint16)
    made = dataset(stored, VOILUTFunction=function, WindowCenter="5000", WindowWidth="10000")
    assert grey(show(tmp_path, made)) == [expected]


def test_several_windows_are_numbered_and_named(tmp_path: Path) -> None:
    made = dataset(U16, WindowCenter=["500", "3000"], WindowWidth=["1000", "2000"])
    made.WindowCenterWidthExplanation = ["NARROW", "HIGH VALUES"]
    first = show(tmp_path, made)
    assert first.source.window == {
        "center": 500.0,
        "width": 1000.0,
        "function": "LINEAR",
        "from": "file window",
        "explanation": "NARROW",
        "index": 0,
    }
    second = show(tmp_path, made, window=1)
    assert grey(second) == [[0, 0, 0, 255]]
    assert grey(show(tmp_path, made, window="high values")) == grey(second)
    with pytest.raises(ImageError, match="no window 2"):
        show(tmp_path, made, window=2)


def test_a_window_of_width_zero_is_skipped_with_a_note(tmp_path: Path) -> None:
    made = dataset(U16, WindowCenter=["500", "3000"], WindowWidth=["0", "2000"])
    frame = show(tmp_path, made)
    assert frame.source.window is not None
    assert frame.source.window["center"] == 3000
    assert any("ignored" in note for note in frame.source.notes)


def lut(entries: list[int], first: int, bits: int, *, vr: str = "US") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    data = np.array(entries, "<u2").tobytes() if vr == "OW" else entries
    item.add_new("LUTData", vr, data)
    return item


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_a_voi_lut_comes_before_windows(tmp_path: Path, vr: str) -> None:
    stored = np.array([[9, 10, 11, 12, 13]], np.uint16)
    made = dataset(stored, WindowCenter="500", WindowWidth="1000")
    made.VOILUTSequence = [lut([0, 1023, 4095], 10, 12, vr=vr)]
    made.VOILUTSequence[0].LUTExplanation = "S CURVE"
    frame = show(tmp_path, made)
    assert grey(frame) == [[0, 0, 64, 255, 255]]
    assert frame.source.window is not None
    assert frame.source.window["explanation"] == "S CURVE"
    by_number = show(tmp_path, made, window=1)
    assert by_number.source.window is not None
    assert by_number.source.window["center"] == 500


def test_a_modality_lut_replaces_rescale(tmp_path: Path) -> None:
    made = dataset(np.array([[-2, -1, 0, 1]], np.int16), RescaleSlope="5", RescaleIntercept="0")
    made.ModalityLUTSequence = [lut([0, 100, 300], -1, 16)]
    made.ModalityLUTSequence[0].ModalityLUTType = "US"
    frame = show(tmp_path, made, window=(150, 301))
    assert grey(frame) == [[0, 0, 85, 255]]
    assert frame.source.dicom is not None
    assert frame.source.dicom["rescale"] == {"lut_entries": 3, "lut_bits": 16}


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, ImplicitVRLittleEndian])
def test_byte_order_and_implicit_vr(tmp_path: Path, syntax: str) -> None:
    stored = U16.astype(">u2") if syntax == ExplicitVRBigEndian else U16
    assert grey(show(tmp_path, dataset(stored), syntax=syntax)) == [[0, 64, 128, 255]]


def test_deep_colour_is_scaled_by_its_depth(tmp_path: Path) -> None:
    rgb = np.array([[[0, 2048, 4095]]], np.uint16)
    assert show(tmp_path, dataset(rgb, BitsStored=12)).pixels.tolist() == [[[0, 128, 255]]]


def palette(made: Dataset, tables: list[list[int]], *, first: int = 0, bits: int = 8) -> Dataset:
    made.PhotometricInterpretation = "PALETTE COLOR"
    for colour, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        name = f"{colour}PaletteColorLookupTable"
        made.add_new(f"{name}Descriptor", "US", [len(table), first, bits])
        made.add_new(f"{name}Data", "OW", np.array(table, "u1" if bits == 8 else "<u2").tobytes())
    return made


def test_palettes_of_both_depths(tmp_path: Path) -> None:
    stored = np.array([[4, 5, 6, 7]], np.uint8)
    shallow = palette(dataset(stored), [[0, 255], [10, 20], [30, 40]], first=5)
    expected = [[[0, 10, 30], [0, 10, 30], [255, 20, 40], [255, 20, 40]]]
    assert show(tmp_path, shallow).pixels.tolist() == expected
    deep = palette(dataset(stored), [[0, 65535], [2570, 5140], [7710, 10280]], first=5, bits=16)
    assert show(tmp_path, deep).pixels.tolist() == expected
    low = palette(dataset(stored), [[0, 255], [10, 20], [30, 40]], first=5, bits=16)
    frame = show(tmp_path, low)
    assert frame.pixels.tolist() == expected
    assert "palette states 16 bits but holds 8-bit colours" in frame.source.notes


def group(**elements: Any) -> Dataset:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def test_functional_groups_of_the_frame_come_before_shared_ones(tmp_path: Path) -> None:
    stored = np.array([[[0, 100]], [[0, 100]]], np.uint16)
    made = dataset(stored, NumberOfFrames=2, WindowCenter="1", WindowWidth="1")
    spacing = group(PixelSpacing=["0.5", "0.25"])
    made.SharedFunctionalGroupsSequence = [
        group(
            PixelValueTransformationSequence=[group(RescaleSlope="2", RescaleIntercept="0")],
            FrameVOILUTSequence=[group(WindowCenter="100", WindowWidth="201")],
            PixelMeasuresSequence=[spacing],
        )
    ]
    own = [group(WindowCenter="200", WindowWidth="401", VOILUTFunction="LINEAR")]
    made.PerFrameFunctionalGroupsSequence = [group(), group(FrameVOILUTSequence=own)]
    first, second = (show(tmp_path, made, frame=number) for number in (0, 1))
    # 100 * 2 = 200: the top of the first window (-0.5 .. 199.5), the middle of the second one.
    assert grey(first) == [[1, 255]]
    assert grey(second) == [[0, 128]]
    assert first.source.dicom is not None
    assert first.source.dicom["pixel_spacing_mm"] == [0.5, 0.25]
    assert any("0.5 x 0.25 mm" in note for note in first.source.notes)
    assert (second.source.frame, second.source.num_frames) == (1, 2)


def test_frames_beyond_the_last_are_refused(tmp_path: Path) -> None:
    made = dataset(np.zeros((2, 1, 4), np.uint8), NumberOfFrames=2)
    with pytest.raises(ImageError, match=r"has 2 frame\(s\), counted from 0: no frame 2"):
        show(tmp_path, made, frame=2)
    with pytest.raises(ImageError, match="frame -1 does not exist"):
        show(tmp_path, made, frame=-1)


@pytest.mark.parametrize(
    ("dtype", "keyword"), [("<f4", "FloatPixelData"), ("<f8", "DoubleFloatPixelData")]
)
def test_float_pixel_data(tmp_path: Path, dtype: str, keyword: str) -> None:
    values = np.array([[0.0, 0.25, 1.0, np.nan]], dtype)
    made = dataset(values)
    del made.PixelData
    for name in ("BitsStored", "HighBit", "PixelRepresentation"):
        delattr(made, name)
    setattr(made, keyword, values.tobytes())
    assert grey(show(tmp_path, made)) == [[0, 64, 255, 0]]
    made.WindowCenter, made.WindowWidth = "0.5", "1"  # would be a step if LINEAR counted integers
    assert grey(show(tmp_path, made)) == [[0, 64, 255, 0]]


def test_thirty_two_bit_integers(tmp_path: Path) -> None:
    values = np.array([[-(2**31), 0, 2**31 - 1]], np.int32)
    assert grey(show(tmp_path, dataset(values))) == [[0, 128, 255]]


def ct(**elements: Any) -> Dataset:
    stored = np.array([[24, 1024, 1064, 3000]], np.uint16)
    made = dataset(stored, Modality="CT", RescaleSlope="1", RescaleIntercept="-1024")
    made.SOPClassUID = CTImageStorage
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def origin(frame: Frame) -> str:
    assert frame.source.window is not None
    return str(frame.source.window["from"])


def test_ct_without_window_takes_the_preset_of_the_body_part(tmp_path: Path) -> None:
    assert origin(show(tmp_path, ct())) == "default preset soft-tissue"
    assert origin(show(tmp_path, ct(BodyPartExamined="HEAD"))) == "default preset brain"
    assert origin(show(tmp_path, ct(), window="lung")) == "preset lung"
    assert origin(show(tmp_path, ct(RescaleType="US"))) == "frame range"
    localizer = ct(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert origin(show(tmp_path, localizer)) == "frame range"
    with pytest.raises(ImageError, match="Hounsfield"):
        show(tmp_path, dataset(U16, Modality="MR"), window="lung")


def test_oblong_pixels_are_made_square(tmp_path: Path) -> None:
    frame = show(tmp_path, dataset(np.full((6, 6), 200, np.uint8), PixelAspectRatio=["4", "3"]))
    assert frame.pixels.shape == (8, 6, 3)
    assert (frame.pixels == 200).all()
    assert (frame.source.width, frame.source.height) == (6, 6)
    assert any("resampled" in note for note in frame.source.notes)


def test_a_window_on_colour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="monochrome"):
        show(tmp_path, dataset(np.zeros((2, 2, 3), np.uint8)), window=(1, 2))


@pytest.mark.parametrize("photometric", ["HSV", "CMYK", "ARGB", "NONSENSE"])
def test_unknown_colour_spaces_are_refused(tmp_path: Path, photometric: str) -> None:
    made = dataset(np.zeros((2, 2, 3), np.uint8), PhotometricInterpretation=photometric)
    with pytest.raises(ImageError, match=photometric):
        show(tmp_path, made)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.110", "JPEG XL"),
        ("1.2.840.10008.1.2.4.102", "MPEG-4"),
        ("1.2.840.10008.1.2.4.107", "HEVC"),
        ("1.2.3.4", "1.2.3.4"),
    ],
)
def test_syntaxes_without_decoder_are_named(tmp_path: Path, syntax: str, name: str) -> None:
    made = dataset(U8)
    made.PixelData = encapsulate([b"1234"])
    made["PixelData"].is_undefined_length = True
    file = write(tmp_path, made, MPEG2)
    # pydicom writes only syntaxes it knows.
    padded = MPEG2.encode() + b"\0", syntax.encode().ljust(len(MPEG2) + 1, b"\0")
    file.write_bytes(file.read_bytes().replace(*padded))
    with pytest.raises(ImageError, match=rf"transfer syntax .*{name}.* is not supported"):
        read_image(file)


def test_provenance_names_the_object_and_never_the_patient(tmp_path: Path) -> None:
    made = ct(PatientName="SECRET^NAME", PatientID="SECRET", PatientBirthDate="19000101")
    made.BodyPartExamined, made.Laterality, made.ViewPosition = "CHEST", "R", "AP"
    made.ImagerPixelSpacing = ["0.1", "0.1"]
    made.StudyDescription = "SECRET TOO"
    facts = show(tmp_path, made).source.to_dict()
    assert "SECRET" not in str(facts)
    assert "19000101" not in str(facts)
    assert facts["dicom"]["sop_instance_uid"] == made.SOPInstanceUID
    assert facts["dicom"]["sop_class"] == "CT Image Storage"
    assert facts["dicom"]["pixel_spacing_from"] == "ImagerPixelSpacing"
    assert (facts["dicom"]["series_laterality"], facts["dicom"]["view_position"]) == ("R", "AP")


def test_any_character_set_is_read(tmp_path: Path) -> None:
    made = dataset(U8, PatientName="x")
    made.SpecificCharacterSet = "ISO_IR 100"
    file = write(tmp_path, made, ExplicitVRLittleEndian)
    file.write_bytes(file.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 999"))
    assert grey(read_image(file)) == [[0, 1, 128, 255]]
