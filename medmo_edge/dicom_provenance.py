"""What a DICOM frame says about itself, as JSON values: technique and identity of the object.

Patient name, ID, birth date, accession number and every other personal element stay in the file.
The UIDs are there because results must refer to the image they are about.
"""

from typing import Any

from medmo_edge.dicom_attributes import FrameAttributes, ModalityLut, Rescale
from medmo_edge.dicom_decode import Stored
from medmo_edge.dicom_header import Header, Layout, describe_class

_TEXTS = {
    "modality": "Modality",
    "sop_class_uid": "SOPClassUID",
    "sop_instance_uid": "SOPInstanceUID",
    "series_instance_uid": "SeriesInstanceUID",
    "study_instance_uid": "StudyInstanceUID",
    "frame_of_reference_uid": "FrameOfReferenceUID",
    "body_part": "BodyPartExamined",
    "laterality": "ImageLaterality",
    "series_laterality": "Laterality",
    "view_position": "ViewPosition",
    "patient_position": "PatientPosition",
    "presentation_intent": "PresentationIntentType",
    "burned_in_annotation": "BurnedInAnnotation",
    "lossy": "LossyImageCompression",
}
_LISTS = {"image_type": "ImageType", "patient_orientation": "PatientOrientation"}
_MAX_TEXT = 128


def describe(
    header: Header,
    layout: Layout,
    stored: Stored,
    attributes: FrameAttributes,
    modality: Rescale | ModalityLut | None,
) -> dict[str, Any]:
    """The values of ``Source.dicom``; absent ones are left out."""
    values: dict[str, Any] = {
        name: attributes.text(keyword)[:_MAX_TEXT] for name, keyword in _TEXTS.items()
    }
    values["laterality"] = values["laterality"] or attributes.text(
        "FrameLaterality", "FrameAnatomySequence"
    )
    for name, keyword in _LISTS.items():
        values[name] = _texts(attributes.get(keyword))
    values |= {
        "sop_class": describe_class(header.dataset),
        "transfer_syntax": header.transfer_syntax,
        "decoder": stored.decoder,
        "photometric": layout.photometric,
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "signed": layout.signed,
        "presentation_lut_shape": attributes.text("PresentationLUTShape"),
        "rescale": _rescale(modality, attributes),
        "orientation": list(
            attributes.numbers("ImageOrientationPatient", "PlaneOrientationSequence")
        ),
    }
    values |= _spacing(attributes)
    return {name: value for name, value in values.items() if value not in ("", None, [])}


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    many = [value] if isinstance(value, str) else list(value)
    return [str(one)[:_MAX_TEXT] for one in many[:16]]


def _rescale(
    modality: Rescale | ModalityLut | None, attributes: FrameAttributes
) -> dict[str, Any] | None:
    if isinstance(modality, ModalityLut):
        return {"lut_entries": len(modality.lut.entries), "lut_bits": modality.lut.bits}
    if modality is None or not modality.stated:
        return None
    units = attributes.text("RescaleType", "PixelValueTransformationSequence")
    values = {"slope": modality.slope, "intercept": modality.intercept}
    return values | ({"type": units} if units else {})


def _spacing(attributes: FrameAttributes) -> dict[str, Any]:
    """Pixel spacing in mm (rows, columns) and the element it is from.

    On projection radiographs ImagerPixelSpacing is at the detector, not in the patient: the tag is
    part of the value's meaning.
    """
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = attributes.numbers(keyword, "PixelMeasuresSequence")
        if len(spacing) == 2:
            return {"pixel_spacing_mm": list(spacing), "pixel_spacing_from": keyword}
    return {}
