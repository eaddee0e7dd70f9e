"""An answer as a secondary capture: the frame the model saw, with boxes and notice burned in.

The last resort that every viewer shows. Its pixels are 8-bit RGB of the rendered frame, so nothing
can be measured on it; no pixel spacing is stated.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medmo_edge.errors import ResultError
from medmo_edge.images import Frame
from medmo_edge.overlay import draw_overlay
from medmo_edge.runtime.results_origin import NOTICE, Origin, limited
from medmo_edge.runtime.results_source import Reference

if TYPE_CHECKING:
    from pydicom import Dataset

MIN_LONG_SIDE = 512  # smaller frames are enlarged, so that labels can be read
# Body parts without sides; others are not repeated, since a side would have to go with them.
_UNPAIRED = (
    *("ABDOMEN", "BRAIN", "CHEST", "CSPINE", "HEAD", "HEART", "LIVER", "LSPINE", "NECK"),
    *("PELVIS", "SKULL", "SPINE", "TSPINE"),
)
_LARGEST_SIDE = 65535


def build_sc(
    frames: Sequence[Frame], references: tuple[Reference, ...], origin: Origin
) -> "Dataset":
    """The capture of one frame. Errors: ResultError for more than one."""
    import highdicom as hd

    if len(frames) != 1:
        raise ResultError("--sc captures one image: ask about one image at a time")
    notice = f"{NOTICE} - {limited(origin.name, 24)}"  # one line of the narrowest picture
    pixels = draw_overlay(
        frames[0], origin.answer.boxes, notice=notice, min_long_side=MIN_LONG_SIDE
    )
    if max(pixels.shape[:2]) > _LARGEST_SIDE:
        raise ResultError("--sc: the picture has more rows or columns than DICOM can hold")
    reference = references[0]
    capture = hd.sc.SCImage(
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),  # replaced below by what the source states
        study_instance_uid=reference.image.StudyInstanceUID,
        series_instance_uid=origin.uid("sc series", reference.uid),
        sop_instance_uid=origin.uid("sc", reference.uid, reference.number),
        **origin.described("sc"),
        series_description="AI overlay, RESEARCH USE ONLY",
        content_date=origin.moment.date(),
        content_time=origin.moment.time(),
    )
    _describe(capture, reference, origin)
    return capture


def _describe(capture: "Dataset", reference: Reference, origin: Origin) -> None:
    from pydicom import Dataset

    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.BurnedInAnnotation = "YES"
    capture.ConversionType = "WSD"
    orientation = reference.of_frame("PatientOrientation")
    capture.PatientOrientation = orientation if orientation is not None else ""
    body_part = reference.attributes.text("BodyPartExamined")
    if body_part in _UNPAIRED:
        capture.BodyPartExamined = body_part
    else:  # may be paired: then the side is type 2, and empty when not stated
        capture.Laterality = reference.laterality
    capture.DerivationDescription = limited(
        f"Boxes drawn by {origin.name} {origin.version}, weights sha256 {origin.weights}", 1024
    )
    boxes = len(origin.answer.boxes)
    capture.ImageComments = limited(f"{NOTICE}. {boxes} box(es). {origin.words}", 10_000)
    source = Dataset()
    source.ReferencedSOPClassUID = reference.sop_class
    source.ReferencedSOPInstanceUID = reference.image.SOPInstanceUID
    if reference.number is not None:
        source.ReferencedFrameNumber = reference.number
    capture.SourceImageSequence = [source]
    _say_lossy(capture, reference)


def _say_lossy(capture: "Dataset", reference: Reference) -> None:
    """Once lossy, always lossy (PS3.3 C.7.6.1.1.5): the source's history goes on."""
    lossy = reference.attributes.text("LossyImageCompression") == "01"
    capture.LossyImageCompression = "01" if lossy else "00"
    for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        value = reference.of_frame(keyword)
        if lossy and value is not None:
            setattr(capture, keyword, value)
