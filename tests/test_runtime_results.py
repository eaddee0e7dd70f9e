"""Results against independent readers: dciodvfy, dsrdump, dcmp2pgm, highdicom and pydicom."""

import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_bench import tool
from PIL import Image
from result_objects import TWO_BOXES, ask, read

from medmo_edge.errors import ResultError, UsageError
from medmo_edge.images import read_image
from medmo_edge.runtime.results import (
    ResultOptions,
    make_gsps,
    make_sc,
    make_sr,
    write_results,
    write_sr,
)

hd = pytest.importorskip("highdicom", reason="DICOM results need the dicom extra")
pydicom = pytest.importorskip("pydicom")

WriteSource = Callable[..., Path]
KINDS = ("cr", "dx", "dx1", "ct", "mr", "us", "palette", "us-frames", "mr-frames")
pytestmark = pytest.mark.usefixtures("decode_here")


def _errors(content: bytes, path: Path) -> list[str]:
    path.write_bytes(content)
    run = subprocess.run([tool("dciodvfy"), "-new", path], capture_output=True, text=True)
    return [line for line in run.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("kind", KINDS)
def test_dciodvfy_finds_no_error(kind: str, write_source: WriteSource, tmp_path: Path) -> None:
    frame = read_image(write_source(kind, tmp_path / "source.dcm"))
    answer = ask([frame])
    plain = ResultOptions(plain_sr=True)
    for make, options in ((make_sr, None), (make_sr, plain), (make_gsps, None), (make_sc, None)):
        assert _errors(make([frame], answer, options), tmp_path / "result.dcm") == []


@pytest.mark.parametrize("text", ["", "No nodule is seen.\nLungs clear.", TWO_BOXES])
@pytest.mark.parametrize("kind", ["dx", "us-frames"])
def test_answers_with_and_without_boxes(
    text: str, kind: str, write_source: WriteSource, tmp_path: Path
) -> None:
    frame = read_image(write_source(kind, tmp_path / "source.dcm"))
    answer = ask([frame], text)
    for make in (make_sr, make_gsps, make_sc):
        assert _errors(make([frame], answer), tmp_path / "result.dcm") == []
    report = read(make_sr([frame], answer))
    comments = [
        str(item.TextValue)
        for item in _items(report)
        if item.ValueType == "TEXT" and item.ConceptNameCodeSequence[0].CodeValue == "121106"
    ]
    words = "The nodule lies above an odd looking long shadow." if text == TWO_BOXES else text
    assert comments[0] == (words or "(no text)")
    assert comments[2:] == ([f"As the model wrote it: {text}"] if answer.boxes else [])
    assert comments[1].startswith("RESEARCH USE ONLY")
    regions = [item for item in _items(report) if item.ValueType == "SCOORD"]
    assert len(regions) == len(answer.boxes)


def _items(item: Any) -> list[Any]:
    found = []
    for child in item.get("ContentSequence", ()):
        found += [child, *_items(child)]
    return found


@pytest.mark.parametrize("kind", ["ct", "us-frames"])
def test_dsrdump_and_highdicom_read_the_report_back(
    kind: str, write_source: WriteSource, tmp_path: Path
) -> None:
    path = write_source(kind, tmp_path / "source.dcm")
    number = 3 if kind == "us-frames" else None
    frame = read_image(path, frame=2 if number else 0)
    answer = ask([frame])
    file = tmp_path / "report.dcm"
    write_sr(file, [frame], answer)
    dump = subprocess.run([tool("dsrdump"), "+Pl", file], capture_output=True, text=True)
    assert dump.returncode == 0 and "Comprehensive 3D SR Document" in dump.stdout
    assert '(27925004,SCT,"Nodule")' in dump.stdout
    assert "Unverified" in dump.stdout and "Preliminary" in dump.stdout
    groups = hd.sr.srread(file).content.get_planar_roi_measurement_groups()
    assert len(groups) == 2
    source = pydicom.dcmread(path, stop_before_pixels=True)
    for group, box in zip(groups, answer.boxes, strict=True):
        x1, y1, x2, y2 = box.xyxy
        expected = [[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]]
        assert np.allclose(group.roi.value, expected, rtol=1e-6)
        (reference,) = group.roi.ContentSequence[0].ReferencedSOPSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
        assert reference.get("ReferencedFrameNumber") == number
    assert np.allclose(groups[0].roi.value[0], [source.Columns * 0.1, source.Rows * 0.2])


def test_the_report_says_who_made_it_and_of_whom(write_source: WriteSource, tmp_path: Path) -> None:
    path = write_source(
        "ct",
        tmp_path / "source.dcm",
        PatientID="A-1",
        AccessionNumber="ACC",
        StudyDescription="Thorax",
        IssuerOfPatientID="HOSPITAL",
    )
    frame = read_image(path)
    report = read(make_sr([frame], ask([frame]), ResultOptions(question="Where is it?")))
    source = pydicom.dcmread(path, stop_before_pixels=True)
    for keyword in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "IssuerOfPatientID"),
        *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyDescription", "AccessionNumber"),
    ):
        assert report[keyword].value == source[keyword].value, keyword
    equipment = report.ContributingEquipmentSequence[0]
    assert (equipment.Manufacturer, equipment.SoftwareVersions) == (
        "MedMO Edge",
        report.SoftwareVersions,
    )
    assert "Weights sha256" in equipment.ContributionDescription
    assert report.VerificationFlag == "UNVERIFIED" and report.PreliminaryFlag == "PRELIMINARY"
    assert "RESEARCH USE ONLY" in report.SeriesDescription
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    reference = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    texts = {
        (item.ConceptNameCodeSequence[0].CodeValue, str(item.TextValue))
        for item in _items(report)
        if item.ValueType == "TEXT"
    }
    assert ("111001", "MedMO Edge / fake") in texts
    assert ("111002", "question=Where is it?") in texts
    families = {
        item.ConceptCodeSequence[0].CodeMeaning
        for item in _items(report)
        if item.ValueType == "CODE" and item.ConceptNameCodeSequence[0].CodeValue == "111000"
    }
    assert families == {"Artificial Intelligence"}


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 144", "Люкceмбypг"),
    ],
)
def test_names_survive_their_character_set(
    charset: Any, name: str, write_source: WriteSource, tmp_path: Path
) -> None:
    path = write_source(
        "dx", tmp_path / "source.dcm", SpecificCharacterSet=charset, PatientName=name
    )
    frame = read_image(path)
    answer = ask([frame])
    for make in (make_sr, make_gsps, make_sc):
        result = read(make([frame], answer))
        assert str(result.PatientName) == name
        assert result.SpecificCharacterSet == "ISO_IR 192"


def test_boxes_of_several_images_refer_to_their_own(
    write_source: WriteSource, tmp_path: Path
) -> None:
    first = write_source("ct", tmp_path / "a.dcm", SOPInstanceUID="1.2.3.1")
    second = write_source("ct", tmp_path / "b.dcm", SOPInstanceUID="1.2.3.2")
    frames = [read_image(first), read_image(second)]
    text = (
        "Image 1: mass <box>[[0, 0, 500, 500]]</box> Image 2: nodule <box>[[0, 0, 100, 100]]</box>"
    )
    answer = ask(frames, text)
    report = read(make_sr(frames, answer))
    named = [
        item.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for item in _items(report)
        if item.ValueType == "SCOORD"
    ]
    assert named == ["1.2.3.1", "1.2.3.2"]
    state = read(make_gsps(frames, answer))
    drawn = [
        (each.ReferencedImageSequence[0].ReferencedSOPInstanceUID, len(each.GraphicObjectSequence))
        for each in state.GraphicAnnotationSequence
    ]
    assert drawn == [("1.2.3.1", 1), ("1.2.3.2", 1)]
    for make in (make_sr, make_gsps):
        assert _errors(make(frames, answer), tmp_path / "result.dcm") == []
    with pytest.raises(ResultError, match="one image at a time"):
        make_sc(frames, answer)


def test_two_frames_of_one_file_and_two_studies_of_one_patient(
    write_source: WriteSource, tmp_path: Path
) -> None:
    path = write_source("mr-frames", tmp_path / "source.dcm")
    frames = [read_image(path, frame=number) for number in (0, 2)]
    answer = ask(frames, "Image 2: nodule <box>[[0, 0, 100, 100]]</box>")
    for make in (make_sr, make_gsps):
        assert _errors(make(frames, answer), tmp_path / "result.dcm") == []
    state = read(make_gsps(frames, answer))
    numbers = [
        each.ReferencedImageSequence[0].ReferencedFrameNumber
        for each in state.GraphicAnnotationSequence
    ]
    assert numbers == [1, 3] and len(state.DisplayedAreaSelectionSequence) == 1
    centers = [item.WindowCenter for item in state.SoftcopyVOILUTSequence]
    assert centers == [300, 500]
    prior = read_image(
        write_source("mr", tmp_path / "b.dcm", StudyInstanceUID="1.2.9", SOPInstanceUID="1.2.10")
    )
    frames = [frames[0], prior]
    report = read(make_sr(frames, ask(frames)))
    assert _errors(make_sr(frames, ask(frames)), tmp_path / "result.dcm") == []
    assert report.PertinentOtherEvidenceSequence[0].StudyInstanceUID == "1.2.9"
    with pytest.raises(ResultError, match="several studies"):
        make_gsps(frames, answer)


def test_uids_stand_under_the_root_and_repeat_with_the_seed(
    write_source: WriteSource, tmp_path: Path
) -> None:
    frame = read_image(write_source("dx", tmp_path / "source.dcm"))
    answer = ask([frame])
    root = "1.2.826.0.1.3680043.10.999"
    options = ResultOptions(uid_root=root, seed="queue entry 1")
    one, two = (read(make_sr([frame], answer, options)) for _ in range(2))
    assert one.SOPInstanceUID == two.SOPInstanceUID
    assert one.SeriesInstanceUID == two.SeriesInstanceUID
    made = [one.SOPInstanceUID, one.SeriesInstanceUID]
    made += [item.UID for item in _items(one) if item.ValueType == "UIDREF"]
    assert all(uid.startswith(f"{root}.") and pydicom.uid.UID(uid).is_valid for uid in made)
    assert len(set(made)) == len(made)
    fresh = {str(read(make_sr([frame], answer)).SOPInstanceUID) for _ in range(2)}
    assert len(fresh) == 2 and all(uid.startswith("2.25.") for uid in fresh)
    kinds = {
        str(read(make([frame], answer, options)).SOPInstanceUID) for make in (make_gsps, make_sc)
    }
    assert len(kinds | {str(one.SOPInstanceUID)}) == 3


def test_what_cannot_be_referred_to_is_refused_in_one_line(
    write_source: WriteSource, tmp_path: Path
) -> None:
    path = tmp_path / "source.dcm"
    frame = read_image(write_source("ct", path))
    answer = ask([frame])
    picture = tmp_path / "picture.png"
    Image.fromarray(frame.pixels).save(picture)
    with pytest.raises(ResultError, match="is no DICOM file"):
        make_sr([read_image(picture)], answer)
    with pytest.raises(ResultError, match="none was given"):
        make_sr([], answer)
    other = read_image(write_source("ct", tmp_path / "other.dcm", PatientID="someone else"))
    with pytest.raises(ResultError, match="several patients") as error:
        make_sr([frame, other], answer)
    assert "someone" not in str(error.value)
    colour = write_source("us", tmp_path / "us.dcm", PatientID=pydicom.dcmread(path).PatientID)
    write_source("us", colour, PatientID="1CT1", PatientName="CompressedSamples^CT1")
    with pytest.raises(ResultError, match="grey and colour"):
        make_gsps([frame, read_image(colour)], answer)
    write_source("ct", path, SliceThickness="9")
    with pytest.raises(ResultError, match="has changed"):
        make_sr([frame], answer)
    path.unlink()
    with pytest.raises(ResultError, match="cannot be read again"):
        make_sr([frame], answer)
    broken = write_source("ct", tmp_path / "broken.dcm", StudyInstanceUID=None)
    with pytest.raises(ResultError, match="no usable StudyInstanceUID"):
        make_sr([read_image(broken)], answer)
    with pytest.raises(UsageError, match="UID root"):
        ResultOptions(uid_root="1.2.03")


def test_retired_classes_and_wrong_identities_are_kept(
    write_source: WriteSource, tmp_path: Path
) -> None:
    retired = "1.2.840.10008.5.1.4.1.1.6"
    path = tmp_path / "source.dcm"
    write_source("us", path)
    dataset = pydicom.dcmread(path)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = retired
    with warnings.catch_warnings(action="ignore"):
        dataset.StudyDate, dataset.PatientSex = "1994.11.05", "male"
        dataset.save_as(path)
    frame = read_image(path)
    answer = ask([frame])
    for make in (make_sr, make_gsps, make_sc):
        content = make([frame], answer)
        assert f"{retired}\0".encode() in content
        result = read(content)
        with warnings.catch_warnings(action="ignore"):
            assert (result.StudyDate, result.PatientSex) == ("1994.11.05", "male")


def test_files_appear_whole_and_replace_nothing(write_source: WriteSource, tmp_path: Path) -> None:
    frame = read_image(write_source("dx", tmp_path / "source.dcm"))
    answer = ask([frame])
    folder = tmp_path / "results"
    folder.mkdir()
    places = {kind: folder / f"r.{kind}" for kind in ("sr", "gsps", "sc", "fhir")}
    write_results(places, [frame], answer, ResultOptions())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 4
    with pytest.raises(ResultError, match="exists already"):
        write_sr(places["sr"], [frame], answer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_sr(places["sr"], [frame], answer, overwrite=True)
    assert places["sr"].read_bytes() != before["r.sr"]
    with pytest.raises(ResultError, match="folder does not exist"):
        write_sr(tmp_path / "nowhere" / "r.dcm", [frame], answer)
    with pytest.raises(ResultError, match="is a folder"):
        write_sr(folder, [frame], answer)
