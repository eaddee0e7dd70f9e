"""An answer as FHIR R4 JSON: a Bundle with a DiagnosticReport and one Observation per box.

Made by hand after hl7.org/fhir/R4; status preliminary throughout. Identifiers, not server ids, name
patient, study and images: the receiver matches them to its own resources. Not done: profiles of a
country, coded findings beyond those of the SR, sending.
"""

import json
import uuid
from typing import Any

from medmo_edge.boxes import Box
from medmo_edge.runtime.results_origin import MANUFACTURER, NOTICE, Origin
from medmo_edge.runtime.results_source import Reference

_DICOM_UID_SYSTEM = "urn:dicom:uid"
_DCM = "http://dicom.nema.org/resources/ontology/DCM"
_GENDERS = {"M": "male", "F": "female", "O": "other"}
_CORNERS = ("x1", "y1", "x2", "y2")


def build_fhir(references: tuple[Reference, ...], origin: Origin) -> bytes:
    """The Bundle as UTF-8 JSON."""
    first = references[0]
    patient = _patient(first)
    device = _device(origin)
    study = _study(references, origin)
    observations = [
        _observation(box, number, references, origin)
        for number, box in enumerate(origin.answer.boxes, 1)
    ]
    names = {name: _urn(origin, name, first.uid) for name in ("patient", "device", "study")}
    urns = [_urn(origin, "observation", number) for number in range(1, len(observations) + 1)]
    for observation in observations:
        observation["subject"] = {"reference": names["patient"]}
        observation["device"] = {"reference": names["device"]}
        observation["derivedFrom"] = [{"reference": names["study"]}]
    study["subject"] = {"reference": names["patient"]}
    report = _report(first, origin)
    report["subject"] = {"reference": names["patient"]}
    report["performer"] = [{"display": f"{MANUFACTURER} (software, not a person)"}]
    report["imagingStudy"] = [{"reference": names["study"]}]
    if urns:
        report["result"] = [{"reference": urn} for urn in urns]
    entries = [(_urn(origin, "report", first.uid), report)]
    entries += list(zip(urns, observations, strict=True))
    entries += [(names["study"], study), (names["device"], device), (names["patient"], patient)]
    bundle = {
        "resourceType": "Bundle",
        "type": "collection",
        "timestamp": _moment(origin),
        "entry": [{"fullUrl": urn, "resource": resource} for urn, resource in entries],
    }
    return json.dumps(bundle, ensure_ascii=False, indent=2).encode() + b"\n"


def _report(reference: Reference, origin: Origin) -> dict[str, Any]:
    report: dict[str, Any] = {
        "resourceType": "DiagnosticReport",
        "text": _narrative(f"{NOTICE}. Unverified output of {origin.name} {origin.version}."),
        "identifier": [_identifier(origin.uid("report", reference.uid))],
        "status": "preliminary",
        "category": [_concept("http://terminology.hl7.org/CodeSystem/v2-0074", "RAD", "Radiology")],
        "code": {
            **_concept("http://loinc.org", "18748-4", "Diagnostic imaging study"),
            "text": "AI answer, research use only",
        },
        "issued": _moment(origin),
        "conclusion": _conclusion(origin.words),
    }
    accession = str(reference.identity.AccessionNumber or "").strip()
    if accession:
        kind = _concept("http://terminology.hl7.org/CodeSystem/v2-0203", "ACSN", "Accession ID")
        report["basedOn"] = [{"identifier": {"type": kind, "value": accession}}]
    return report


def _conclusion(text: str) -> str:
    return f"{NOTICE}. {text}" if text else f"{NOTICE}. (no text)"


def _observation(
    box: Box, number: int, references: tuple[Reference, ...], origin: Origin
) -> dict[str, Any]:
    reference = references[box.image]
    uid = origin.uid("box", number, reference.uid, *box.xyxy, box.label)
    image = {"valueString": f"urn:oid:{reference.uid}"}
    if reference.number is not None:
        image["valueString"] += f", frame {reference.number}"
    components = [
        {
            "code": {"text": f"{corner}, image pixels from the upper left corner"},
            "valueQuantity": {
                "value": round(value, 2),
                "unit": "pixels",
                "system": "http://unitsofmeasure.org",
                "code": "{pixels}",
            },
        }
        for corner, value in zip(_CORNERS, box.xyxy, strict=True)
    ]
    image_code = {
        **_concept(_DCM, "121112", "Source of Measurement"),
        "text": "SOP instance (and frame)",
    }
    return {
        "resourceType": "Observation",
        "identifier": [_identifier(uid)],
        "status": "preliminary",
        "code": {**_concept(_DCM, "111030", "Image Region"), "text": box.label or "finding"},
        "effectiveDateTime": _moment(origin),
        "valueString": box.label or "finding",
        "component": [{"code": image_code, **image}, *components],
        "note": [{"text": NOTICE}],
    }


def _study(references: tuple[Reference, ...], origin: Origin) -> dict[str, Any]:
    """The study of the first image, with the images that were looked at."""
    first = references[0]
    uid = str(first.image.StudyInstanceUID)
    by_series: dict[str, dict[str, Any]] = {}
    for reference in references:
        if reference.image.StudyInstanceUID != uid:
            continue
        series = by_series.setdefault(str(reference.image.SeriesInstanceUID), _series(reference))
        instance = {
            "uid": reference.uid,
            "sopClass": {
                "system": "urn:ietf:rfc:3986",
                "code": f"urn:oid:{reference.sop_class}",
            },
        }
        if instance not in series["instance"]:
            series["instance"].append(instance)
    return {
        "resourceType": "ImagingStudy",
        "identifier": [_identifier(uid)],
        "status": "available",
        "series": list(by_series.values()),
    }


def _series(reference: Reference) -> dict[str, Any]:
    modality = reference.attributes.text("Modality") or "OT"
    return {
        "uid": str(reference.image.SeriesInstanceUID),
        "modality": {"system": _DCM, "code": modality},
        "instance": [],
    }


def _device(origin: Origin) -> dict[str, Any]:
    properties = [
        {"type": {"text": name}, "valueCode": [{"text": value}]}
        for name, _, value in (parameter.partition("=") for parameter in origin.parameters)
        if name != "question"
    ]
    return {
        "resourceType": "Device",
        "identifier": [_identifier(origin.uid("device", origin.name, origin.weights))],
        "status": "active",
        "manufacturer": MANUFACTURER,
        "deviceName": [{"name": origin.name, "type": "model-name"}],
        "version": [{"value": origin.version}],
        "property": properties,
        "note": [{"text": NOTICE}],
    }


def _patient(reference: Reference) -> dict[str, Any]:
    identity = reference.identity
    patient: dict[str, Any] = {"resourceType": "Patient"}
    number = str(identity.PatientID or "").strip()
    if number:
        issuer = str(identity.get("IssuerOfPatientID") or "").strip()
        patient["identifier"] = [
            {"value": number, **({"assigner": {"display": issuer}} if issuer else {})}
        ]
    name = _human_name(str(identity.PatientName or ""))
    if name:
        patient["name"] = [name]
    gender = _GENDERS.get(str(identity.PatientSex or "").strip())
    if gender:
        patient["gender"] = gender
    born = str(identity.PatientBirthDate or "").strip()
    if len(born) == 8 and born.isdecimal():
        patient["birthDate"] = f"{born[:4]}-{born[4:6]}-{born[6:]}"
    return patient


def _human_name(text: str) -> dict[str, Any]:
    """FHIR's form of family^given^middle^prefix^suffix; its first representation is enough."""
    family, given, middle, prefix, suffix = (
        *(part.strip() for part in text.partition("=")[0].split("^")[:5]),
        *[""] * 5,
    )[:5]
    name: dict[str, Any] = {"family": family} if family else {}
    given_names = [part for part in (given, middle) if part]
    for key, values in (("given", given_names), ("prefix", [prefix]), ("suffix", [suffix])):
        if any(values):
            name[key] = values
    return name


def _narrative(text: str) -> dict[str, str]:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {
        "status": "generated",
        "div": f'<div xmlns="http://www.w3.org/1999/xhtml">{escaped}</div>',
    }


def _concept(system: str, code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code, "display": display}]}


def _identifier(uid: str) -> dict[str, str]:
    return {"system": _DICOM_UID_SYSTEM, "value": f"urn:oid:{uid}"}


def _urn(origin: Origin, *parts: object) -> str:
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, origin.uid('fhir', *parts))}"


def _moment(origin: Origin) -> str:
    return origin.moment.isoformat(timespec="seconds")
