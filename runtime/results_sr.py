"""An answer as a DICOM Structured Report: TID 1500 with one planar region per box.

Comprehensive 3D SR by default, as IHE AIR asks for findings; Comprehensive SR on request, which
more archives accept and which is as valid for regions in image coordinates. The whole text is a
comment of a first measurement group about the images, so it is there when nothing was located. No
3D coordinates and no measurements are derived: a box is what the model said, not a size.
"""

import hashlib
from typing import TYPE_CHECKING, Any

from medmo_edge.boxes import Box
from medmo_edge.runtime.results_origin import MANUFACTURER, NOTICE, Origin, limited
from medmo_edge.runtime.results_source import Reference

if TYPE_CHECKING:
    from pydicom import Dataset

CODING_SCHEME = "99MEDMOEDGE"
_MAX_CODE_VALUE, _MAX_MEANING = 16, 64
# Imaging procedures by modality: what CID 100 has, the general one otherwise.
_PROCEDURES = {
    "CT": "CTUnspecifiedBodyRegion",
    "MR": "MRIUnspecifiedBodyRegion",
    "CR": "XRUnspecifiedBodyRegion",
    "DX": "XRUnspecifiedBodyRegion",
    "RF": "XRUnspecifiedBodyRegion",
    "XA": "Angiography",
    "PT": "PETUnspecifiedBodyRegion",
    "NM": "NMUnspecifiedBodyRegion",
}


def build_sr(references: tuple[Reference, ...], origin: Origin) -> "Dataset":
    """The report on ``references``, in the first one's study; unverified and preliminary."""
    import highdicom as hd

    images = {reference.uid: reference.image for reference in references}
    kind = hd.sr.ComprehensiveSR if origin.options.plain_sr else hd.sr.Comprehensive3DSR
    uids = sorted(images)
    return kind(
        evidence=list(images.values()),
        content=_content(references, origin),
        series_instance_uid=origin.uid("sr series", *uids),
        sop_instance_uid=origin.uid("sr", origin.options.plain_sr, *uids),
        **origin.described("sr"),
        series_description="AI findings, RESEARCH USE ONLY",
        is_complete=True,
        content_date=origin.moment.date(),
        content_time=origin.moment.time(),
        coding_schemes=_coding_schemes(origin),
    )


def _coding_schemes(origin: Origin) -> Any:
    """What our private codes are: the model's own words."""
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    codes = [finding_code(box.label) for box in origin.answer.boxes]
    if all(code.scheme_designator != CODING_SCHEME for code in codes):
        return None
    return [
        CodingSchemeIdentificationItem(
            designator=CODING_SCHEME,
            name="Labels as written by the model, not a controlled vocabulary",
            responsible_organization=MANUFACTURER,
        )
    ]


def _content(references: tuple[Reference, ...], origin: Origin) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=origin.uid("device", origin.name, origin.weights),
        name=limited(origin.name, 1024),
        manufacturer_name=MANUFACTURER,
        model_name=limited(origin.version, 1024),
        serial_number=origin.weights,
    )
    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device, observer_identifying_attributes=device
    )
    boxes = origin.answer.boxes
    groups = [_text_group(references, origin)]
    groups += [_region_group(box, index, references, origin) for index, box in enumerate(boxes, 1)]
    return hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_procedure(references[0]),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )


def _text_group(references: tuple[Reference, ...], origin: Origin) -> Any:
    """The images as a whole: question, answer, and what the reader must know of both."""
    import highdicom as hd

    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=origin.uid("text", references[0].uid), identifier="Answer"
        ),
        algorithm_id=_algorithm(origin),
        source_images=[
            hd.sr.SourceImageForMeasurementGroup(
                referenced_sop_class_uid=reference.image.SOPClassUID,
                referenced_sop_instance_uid=reference.image.SOPInstanceUID,
                referenced_frame_numbers=_frames(reference),
            )
            for reference in references
        ],
    )
    answer = origin.answer
    notes = [NOTICE, f"Unverified output of {origin.name} {origin.version}."]
    if answer.finish_reason != "stop":
        notes.append(f"The answer is not complete: it was ended by {answer.finish_reason}.")
    if answer.rejected_boxes:
        notes.append(f"{len(answer.rejected_boxes)} box(es) of the answer could not be read.")
    _comment(group, origin.words or ("(regions only)" if answer.boxes else "(no text)"))
    _comment(group, " ".join(notes))
    if origin.words != _text(answer.text):
        _comment(group, f"As the model wrote it: {_text(answer.text)}")
    return group


def _region_group(box: Box, number: int, references: tuple[Reference, ...], origin: Origin) -> Any:
    """One box: a closed polyline of five points in pixels of its image (TID 1410)."""
    import highdicom as hd
    import numpy as np
    from pydicom.sr.codedict import codes

    reference = references[box.image]
    source = hd.sr.SourceImageForRegion(
        referenced_sop_class_uid=reference.image.SOPClassUID,
        referenced_sop_instance_uid=reference.image.SOPInstanceUID,
        referenced_frame_numbers=_frames(reference),
    )
    region = hd.sr.ImageRegion(
        graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.array(corners(box)),
        source_image=source,
    )
    if reference.of_frame("TotalPixelMatrixRows") is not None:  # a tiled slide
        region.PixelOriginInterpretation = "FRAME"
    group = hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=origin.uid("box", number, reference.uid, *box.xyxy, box.label),
            identifier=limited(f"{box.label or 'finding'} {number}", 64),
        ),
        referenced_region=region,
        finding_type=finding_code(box.label),
        geometric_purpose=codes.SCT.BoundedBy,
        algorithm_id=_algorithm(origin),
    )
    if len(limited(box.label, 10_000)) > _MAX_MEANING:
        _comment(group, _text(box.label))
    return group


def corners(box: Box) -> list[tuple[float, float]]:
    """The closed outline of ``box``: five (column, row) points, (0, 0) the image's outer corner."""
    x1, y1, x2, y2 = box.xyxy
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]


def finding_code(label: str) -> Any:
    """SNOMED CT where DICOM's own context groups have a concept of exactly this name, else ours."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    words = label.replace("-", " ").lower().split()
    words = words[1:] if words[:1] in (["the"], ["a"], ["an"]) else words
    keyword = "".join(word.capitalize() for word in words)
    try:
        code = getattr(codes.SCT, keyword) if keyword else None
    except (AttributeError, RuntimeError):  # unknown, or several concepts of one name
        code = None
    meaning = limited(label, _MAX_MEANING) or "finding"
    if code is not None and code.meaning.lower().replace("-", " ").split() == words:
        return code
    value = meaning
    if len(meaning) > _MAX_CODE_VALUE:
        value = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:_MAX_CODE_VALUE]
    return CodedConcept(value=value, scheme_designator=CODING_SCHEME, meaning=meaning)


def _procedure(reference: Reference) -> Any:
    """The imaging procedure as the modality coded it, else by modality: never the algorithm."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    for item in reference.of_frame("ProcedureCodeSequence") or ():
        value, scheme, meaning = (
            str(item.get(keyword) or "").strip()
            for keyword in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
        )
        if value and scheme and meaning and len(value) <= _MAX_CODE_VALUE:
            return CodedConcept(value, scheme, limited(meaning, _MAX_MEANING))
    modality = str(reference.of_frame("Modality") or "")
    keyword = _PROCEDURES.get(modality, "ImagingProcedure")
    return getattr(codes.cid100, keyword)


def _algorithm(origin: Origin) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    return hd.sr.AlgorithmIdentification(
        name=limited(origin.name, 1024),
        version=limited(origin.version, 1024),
        parameters=[_text(parameter) for parameter in origin.parameters],
        family=codes.DCM.ArtificialIntelligence,
        manufacturer=MANUFACTURER,
    )


def _comment(group: Any, text: str) -> None:
    """TID 1500 is extensible: highdicom's groups take text as one more item."""
    from highdicom.sr import RelationshipTypeValues, TextContentItem
    from pydicom.sr.codedict import codes

    item = TextContentItem(
        name=codes.DCM.Comment, value=text, relationship_type=RelationshipTypeValues.CONTAINS
    )
    group[0].ContentSequence.append(item)


def _frames(reference: Reference) -> list[int] | None:
    return None if reference.number is None else [reference.number]


def _text(text: str) -> str:
    """Text of an answer as UT allows it: lines kept, control characters gone."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t").strip()
