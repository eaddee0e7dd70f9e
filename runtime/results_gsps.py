"""An answer as a softcopy presentation state: the viewer draws the boxes, pixels stay untouched.

Grayscale for monochrome images, colour for colour ones and palettes. The grayscale state carries
the modality transformation of the source and the VOI window the model saw. Not done: presentation
states for a mixture of both, or of several studies (PS3.3 A.33 has one study per state).
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from medmo_edge.boxes import Box
from medmo_edge.dicom_attributes import Rescale, modality_of
from medmo_edge.dicom_render import is_inverted
from medmo_edge.errors import ResultError
from medmo_edge.images import Frame
from medmo_edge.runtime.results_origin import NOTICE, Origin, limited
from medmo_edge.runtime.results_source import Reference
from medmo_edge.runtime.results_sr import corners

if TYPE_CHECKING:
    from pydicom import Dataset

_PROFILE_CLASSES = (b"scnr", b"spac")  # input device and colour space, PS3.3 C.11.15.1.1
LAYER = "AI FINDINGS"
_MAX_SHORT_TEXT = 1024
_MAX_ANSWER = 300  # of a text without boxes: an overlay is no page


def build_gsps(
    frames: Sequence[Frame], references: tuple[Reference, ...], origin: Origin
) -> "Dataset":
    """The presentation state of ``frames``, shown as the model saw them.

    Errors: ResultError for a mixture of grey and colour images, or of studies.
    """
    _check_alike(references)
    images = _images(references)
    uids = sorted(str(image.SOPInstanceUID) for image in images)
    state: Dataset = _state_class(references)(
        referenced_images=images,
        series_instance_uid=origin.uid("gsps series", *uids),
        sop_instance_uid=origin.uid("gsps", *uids),
        **origin.described("gsps"),
        series_description="AI annotations, RESEARCH USE ONLY",
        content_label="AI_FINDINGS",
        content_description=limited(f"{NOTICE}, {origin.version}", 64),
        graphic_layers=[_layer()],
        graphic_annotations=_annotations(images, references, origin),
    )
    state.PresentationCreationDate = origin.moment.strftime("%Y%m%d")
    state.PresentationCreationTime = origin.moment.strftime("%H%M%S")
    state.ContentCreatorName = None
    state.DisplayedAreaSelectionSequence = [_displayed_area(each) for each in _distinct(references)]
    if not references[0].colour:
        _add_grayscale(state, frames, references)
    state.Laterality = references[0].laterality
    return state


def _check_alike(references: tuple[Reference, ...]) -> None:
    if len({reference.colour for reference in references}) > 1:
        raise ResultError(
            "--gsps cannot hold grey and colour images together: ask about them apart"
        )
    if len({reference.image.StudyInstanceUID for reference in references}) > 1:
        raise ResultError("--gsps cannot hold images of several studies: ask about them apart")


def _state_class(references: tuple[Reference, ...]) -> Any:
    import highdicom as hd

    if references[0].colour:
        profile = _colour_profile(references[0])
        return partial(hd.pr.ColorSoftcopyPresentationState, icc_profile=profile)
    return hd.pr.GrayscaleSoftcopyPresentationState


def _colour_profile(reference: Reference) -> bytes:
    """The source's own ICC profile, else sRGB, which is what viewers assume."""
    stated = reference.of_frame("ICCProfile")
    if isinstance(stated, bytes) and stated[12:16] in _PROFILE_CLASSES:
        return stated
    return (files("highdicom") / "_icc_profiles" / "sRGB_v4_ICC_preference.icc").read_bytes()


def _distinct(references: tuple[Reference, ...]) -> list[Reference]:
    """One reference per image: several frames of one file are one image."""
    return list({reference.uid: reference for reference in references}.values())


def _images(references: tuple[Reference, ...]) -> list["Dataset"]:
    """What highdicom refers to. It wants one size: the displayed areas below have each its own."""
    images = [deepcopy(reference.image) for reference in _distinct(references)]
    for image in images:
        image.Rows, image.Columns = (
            max(getattr(each, side) for each in images) for side in ("Rows", "Columns")
        )
        image.SamplesPerPixel = 3 if references[0].colour else 1
    return images


def _layer() -> Any:
    import highdicom as hd

    return hd.pr.GraphicLayer(
        layer_name=LAYER,
        order=1,
        description=limited(f"Boxes of an algorithm, {NOTICE}", 64),
    )


def _annotations(
    images: list["Dataset"], references: tuple[Reference, ...], origin: Origin
) -> list[Any]:
    import highdicom as hd

    by_uid = {str(image.SOPInstanceUID): image for image in images}
    annotations = []
    for index, reference in enumerate(references):
        boxes = [
            (number, box) for number, box in enumerate(origin.answer.boxes, 1) if box.image == index
        ]
        annotation = hd.pr.GraphicAnnotation(
            referenced_images=[by_uid[reference.uid]],
            graphic_layer=_layer(),
            graphic_objects=[_outline(box, n, reference, origin) for n, box in boxes] or None,
            text_objects=[
                _notice(reference, origin),
                *(_label(box, n, reference, origin) for n, box in boxes if box.label),
            ],
        )
        item = annotation.ReferencedImageSequence[0]
        if reference.number is not None:
            item.ReferencedFrameNumber = reference.number
        annotations.append(annotation)
    return annotations


def _outline(box: Box, number: int, reference: Reference, origin: Origin) -> Any:
    import highdicom as hd
    import numpy as np

    return hd.pr.GraphicObject(
        graphic_type=hd.pr.GraphicTypeValues.POLYLINE,
        graphic_data=np.array(corners(box)),
        units=hd.pr.AnnotationUnitsValues.PIXEL,
        tracking_id=_tracking_id(box, number),
        tracking_uid=_tracking_uid(box, number, reference, origin),
    )


def _label(box: Box, number: int, reference: Reference, origin: Origin) -> Any:
    import highdicom as hd

    return hd.pr.TextObject(
        text_value=limited(box.label, _MAX_SHORT_TEXT),
        units=hd.pr.AnnotationUnitsValues.PIXEL,
        anchor_point=(box.x1, box.y1),
        anchor_point_visible=False,
        tracking_id=_tracking_id(box, number),
        tracking_uid=_tracking_uid(box, number, reference, origin),
    )


def _tracking_id(box: Box, number: int) -> str:
    """As in the SR, with the UID below: a viewer can tell that both mean one finding."""
    return limited(f"{box.label or 'finding'} {number}", 64)


def _tracking_uid(box: Box, number: int, reference: Reference, origin: Origin) -> str:
    return origin.uid("box", number, reference.uid, *box.xyxy, box.label)


def _notice(reference: Reference, origin: Origin) -> Any:
    """What must be read with the boxes; without boxes, the answer's words too."""
    import highdicom as hd

    text = f"{NOTICE} ({limited(origin.name, 64)})"
    if not origin.answer.boxes and origin.words:
        text += f": {limited(origin.words, _MAX_ANSWER)}"
    width, height = reference.layout.columns, reference.layout.rows
    return hd.pr.TextObject(
        text_value=text,
        units=hd.pr.AnnotationUnitsValues.PIXEL,
        bounding_box=(0.0, height * 0.95, float(width), float(height)),
        text_justification=hd.pr.TextJustificationValues.LEFT,
    )


def _displayed_area(reference: Reference) -> "Dataset":
    from pydicom import Dataset

    area = Dataset()
    area.ReferencedImageSequence = [_referenced(reference, with_frame=False)]
    area.PixelOriginInterpretation = "FRAME"
    area.DisplayedAreaTopLeftHandCorner = [1, 1]
    area.DisplayedAreaBottomRightHandCorner = [reference.layout.columns, reference.layout.rows]
    area.PresentationSizeMode = "SCALE TO FIT"
    spacing = reference.attributes.numbers("PixelSpacing", "PixelMeasuresSequence")
    aspect = reference.attributes.numbers("PixelAspectRatio")
    if len(spacing) == 2 and min(spacing) > 0:
        area.PresentationPixelSpacing = list(spacing)
    elif len(aspect) == 2 and min(aspect) > 0:
        area.PresentationPixelAspectRatio = [int(value) for value in aspect]
    else:
        area.PresentationPixelAspectRatio = [1, 1]
    return area


def _referenced(reference: Reference, *, with_frame: bool) -> "Dataset":
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class
    item.ReferencedSOPInstanceUID = reference.image.SOPInstanceUID
    if with_frame and reference.number is not None:
        item.ReferencedFrameNumber = reference.number
    return item


def _add_grayscale(
    state: "Dataset", frames: Sequence[Frame], references: tuple[Reference, ...]
) -> None:
    """Modality transformation, the windows the model saw, and the polarity of the images."""
    shapes = {_shape(reference) for reference in references}
    modalities = {_modality_key(reference) for reference in references}
    if len(shapes) > 1 or len(modalities) > 1:
        raise ResultError(
            "--gsps cannot hold images of different polarity or rescale: ask about them apart"
        )
    state.PresentationLUTShape = shapes.pop()
    _add_modality(state, references[0])
    items = [_voi(*pair) for pair in zip(frames, references, strict=True)]
    windows = [item for item in items if item is not None]
    if windows:
        state.SoftcopyVOILUTSequence = windows


def _shape(reference: Reference) -> str:
    inverted = is_inverted(reference.layout.photometric, reference.attributes)
    return "INVERSE" if inverted else "IDENTITY"


def _modality_key(reference: Reference) -> object:
    transformation = modality_of(reference.attributes)
    return transformation if isinstance(transformation, Rescale) else reference.uid


def _add_modality(state: "Dataset", reference: Reference) -> None:
    transformation = modality_of(reference.attributes)
    if not isinstance(transformation, Rescale):
        state.ModalityLUTSequence = deepcopy(reference.of_frame("ModalityLUTSequence"))
    elif transformation.stated:
        state.RescaleSlope = _decimal(transformation.slope)
        state.RescaleIntercept = _decimal(transformation.intercept)
        stated = reference.attributes.text("RescaleType", "PixelValueTransformationSequence")
        modality = reference.attributes.text("Modality")
        state.RescaleType = stated or ("HU" if modality == "CT" else "US")


def _voi(frame: Frame, reference: Reference) -> "Dataset | None":
    """The curve that shaded the frame, as Source.window describes it."""
    from pydicom import Dataset

    shown = frame.source.window or {}
    item = Dataset()
    item.ReferencedImageSequence = [_referenced(reference, with_frame=True)]
    if "lut_entries" in shown:
        luts = reference.of_frame("VOILUTSequence", "FrameVOILUTSequence")
        item.VOILUTSequence = [deepcopy(luts[shown["index"]])]
        return item
    if "center" in shown:
        center, width, function = shown["center"], shown["width"], shown["function"]
    elif "low" in shown and shown["high"] > shown["low"]:
        # Halves first: the sum of two huge doubles would overflow.
        center, width = shown["low"] / 2 + shown["high"] / 2, shown["high"] - shown["low"]
        function = "LINEAR_EXACT"
    else:
        return None
    item.WindowCenter, item.WindowWidth = _decimal(center), _decimal(width)
    if function != "LINEAR":
        item.VOILUTFunction = function
    return item


def _decimal(value: float) -> Any:
    from pydicom.valuerep import DSfloat

    return DSfloat(value, auto_format=True)
