"""FHIR results against the R4 definitions: required elements, types and bound codes by hand.

Also against the models of fhir.resources, which are generated from the published definitions. Its
R4B differs from R4 in none of the resources here.
"""

import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medmo_edge.errors import ResultError
from medmo_edge.images import read_image
from medmo_edge.runtime.results import ResultOptions, make_fhir
from medmo_edge.runtime.session import load

WriteSource = Callable[..., Path]
QUANTITY = {"value": float, "unit": str, "system": str, "code": str}
# hl7.org/fhir/R4/<resource>.html: elements that must be there, and codes of required bindings.
REQUIRED: dict[str, dict[str, type]] = {
    "DiagnosticReport": {"status": str, "code": dict},
    "Observation": {"status": str, "code": dict},
    "ImagingStudy": {"status": str, "subject": dict},
    "Device": {},
    "Patient": {},
}
CODES = {
    ("DiagnosticReport", "status"): {"registered", "partial", "preliminary", "final"},
    ("Observation", "status"): {"registered", "preliminary", "final", "amended"},
    ("ImagingStudy", "status"): {"registered", "available", "cancelled"},
    ("Device", "status"): {"active", "inactive", "entered-in-error", "unknown"},
    ("Patient", "gender"): {"male", "female", "other", "unknown"},
}
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
pytestmark = pytest.mark.usefixtures("decode_here")


def _bundle(path: Path, text: str, frame: int = 0) -> dict[str, Any]:
    picture = read_image(path, frame=frame)
    with load(f"fake:{text}") as session:
        answer = session.ask(picture, "Where?")
    bundle: dict[str, Any] = json.loads(make_fhir([picture], answer, ResultOptions(seed="s")))
    return bundle


def _resources(bundle: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    found = [entry["resource"] for entry in bundle["entry"]]
    return [resource for resource in found if resource["resourceType"] == kind]


def _check(bundle: dict[str, Any]) -> None:
    assert bundle["resourceType"] == "Bundle" and bundle["type"] == "collection"
    assert INSTANT.fullmatch(bundle["timestamp"])
    urls = [entry["fullUrl"] for entry in bundle["entry"]]
    assert len(set(urls)) == len(urls)
    for url in urls:
        assert url == f"urn:uuid:{uuid.UUID(url.removeprefix('urn:uuid:'))}"
    for entry in bundle["entry"]:
        resource = entry["resource"]
        kind = resource["resourceType"]
        for name, expected in REQUIRED[kind].items():
            assert isinstance(resource[name], expected), (kind, name)
        for (owner, name), allowed in CODES.items():
            assert owner != kind or name not in resource or resource[name] in allowed
        _check_values(resource, set(urls))


def _check_values(value: Any, urls: set[str]) -> None:
    """FHIR forbids empty values; references lead into the bundle; codings are whole."""
    if isinstance(value, dict):
        assert value
        if "reference" in value:
            assert value["reference"] in urls
        if "coding" in value:
            assert all({"system", "code"} <= coding.keys() for coding in value["coding"])
    if isinstance(value, list):
        assert value
    if isinstance(value, str):
        assert value.strip()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        _check_values(each, urls)


def _check_by_models(bundle: dict[str, Any]) -> None:
    """Every resource is accepted by its own model and comes out of it as it went in."""
    models = pytest.importorskip("fhir.resources.R4B", reason="fhir.resources is not installed")
    for value in (bundle, *(entry["resource"] for entry in bundle["entry"])):
        model = models.get_fhir_model_class(value["resourceType"])
        again = json.loads(model.model_validate(value).model_dump_json())
        assert again == json.loads(json.dumps(value).replace('+00:00"', 'Z"'))  # the same moment


def test_a_report_with_boxes(write_source: WriteSource, tmp_path: Path) -> None:
    path = write_source(
        "us-frames",
        tmp_path / "source.dcm",
        PatientName="Doe^Jane^Q^Dr^PhD",
        PatientID="7",
        PatientBirthDate="19700131",
        PatientSex="F",
        AccessionNumber="ACC1",
    )
    bundle = _bundle(path, "nodule <box>[[0, 250, 500, 1000]]</box>", frame=1)
    _check(bundle)
    _check_by_models(bundle)
    (report,) = _resources(bundle, "DiagnosticReport")
    assert report["status"] == "preliminary"
    assert report["conclusion"].startswith("RESEARCH USE ONLY - NOT FOR DIAGNOSIS. nodule")
    assert report["basedOn"][0]["identifier"]["value"] == "ACC1"
    (patient,) = _resources(bundle, "Patient")
    assert patient == {
        "resourceType": "Patient",
        "identifier": [{"value": "7"}],
        "name": [{"family": "Doe", "given": ["Jane", "Q"], "prefix": ["Dr"], "suffix": ["PhD"]}],
        "gender": "female",
        "birthDate": "1970-01-31",
    }
    (box,) = _resources(bundle, "Observation")
    quantities = [part["valueQuantity"] for part in box["component"] if "valueQuantity" in part]
    assert [quantity["value"] for quantity in quantities] == [0, 60, 160, 240]
    assert all(quantity["code"] == "{pixels}" for quantity in quantities)
    assert box["component"][0]["valueString"].endswith(", frame 2")
    (study,) = _resources(bundle, "ImagingStudy")
    (instance,) = study["series"][0]["instance"]
    assert instance["sopClass"]["code"] == "urn:oid:1.2.840.10008.5.1.4.1.1.3.1"
    assert f"urn:oid:{instance['uid']}" in box["component"][0]["valueString"]


@pytest.mark.parametrize("text", ["", "Nothing <seen> & nothing to see."])
def test_a_report_without_boxes(text: str, write_source: WriteSource, tmp_path: Path) -> None:
    path = write_source("dx", tmp_path / "source.dcm", PatientName="", PatientID="")
    bundle = _bundle(path, text)
    _check(bundle)
    _check_by_models(bundle)
    assert not _resources(bundle, "Observation")
    (report,) = _resources(bundle, "DiagnosticReport")
    assert "result" not in report and (text or "(no text)") in report["conclusion"]
    assert _resources(bundle, "Patient") == [{"resourceType": "Patient", "gender": "other"}]


KINDS = ("cr", "dx1", "ct", "mr", "us", "palette", "us-frames", "mr-frames")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_a_valid_report(
    kind: str, write_source: WriteSource, tmp_path: Path
) -> None:
    bundle = _bundle(write_source(kind, tmp_path / "s.dcm"), "a <box>[[1, 2, 300, 400]]</box> b")
    _check(bundle)
    _check_by_models(bundle)


@pytest.mark.parametrize(
    ("resource", "element", "value"),
    [
        ("DiagnosticReport", "status", None),
        ("Observation", "code", "nodule"),
        ("Observation", "effectiveDateTime", "yesterday"),
        ("ImagingStudy", "series", [{"uid": "1.2"}]),
        ("Patient", "birthdate", "1970-01-31"),
    ],
)
def test_the_models_find_what_is_wrong(
    resource: str, element: str, value: Any, write_source: WriteSource, tmp_path: Path
) -> None:
    """The check above can fail."""
    bundle = _bundle(write_source("ct", tmp_path / "s.dcm"), "a <box>[[1, 2, 300, 400]]</box>")
    broken = _resources(bundle, resource)[0]
    broken.pop(element, None)
    broken |= {} if value is None else {element: value}
    with pytest.raises(ValueError):
        _check_by_models(bundle)


def test_a_picture_belongs_to_no_patient(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    with pytest.raises(ResultError, match="p.png is no DICOM file: --fhir"):
        _bundle(tmp_path / "p.png", "text")
