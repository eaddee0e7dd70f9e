"""The DICOM image behind a frame, as result objects refer to it: identity, references, display.

The header is read again from the frame's file, after the decoding child has parsed it within its
limits and only when the file is unchanged; no pixel is decoded here. Patient and study identity are
copied as text, whatever their value: a result that a PACS cannot match to its patient is lost. Not
done: de-identification, or repair of wrong identities.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.dicom_attributes import FrameAttributes
from medmo_edge.dicom_header import Header, Layout, read_header, read_layout, value_of
from medmo_edge.errors import ImageError, ResultError
from medmo_edge.images import Frame

if TYPE_CHECKING:
    from pydicom import Dataset

# Patient, Patient Study, General Study and Clinical Trial modules: who this is about.
IDENTITY = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "PatientSpeciesDescription",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianName",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
)
# Type 2 in every result object: present, if empty.
_ALWAYS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
# Highdicom holds references against what it knows of a SOP class, and refuses retired and private
# ones: it gets this class (Secondary Capture), the finished object the real one.
STAND_IN_CLASS = "1.2.840.10008.5.1.4.1.1.7"
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_MAX_UID = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One source frame. ``number`` is its DICOM frame number, None for a single-frame image.

    ``identity`` holds the elements of IDENTITY; ``image`` the UIDs and sizes that highdicom needs,
    with an empty identity and STAND_IN_CLASS; ``attributes`` gives what holds for the frame.
    """

    identity: "Dataset"
    image: "Dataset"
    attributes: FrameAttributes
    layout: Layout
    number: int | None
    sop_class: str

    @property
    def colour(self) -> bool:
        """Whether the stored pixels are colour, palettes included."""
        return not self.layout.photometric.startswith("MONOCHROME")

    @property
    def uid(self) -> str:
        """SOP Instance UID of the image."""
        return str(self.image.SOPInstanceUID)

    @property
    def laterality(self) -> str:
        """L or R as series or image state it, else "": the element is type 2C."""
        stated = (self.attributes.text(each) for each in ("Laterality", "ImageLaterality"))
        return next((value for value in stated if value in ("L", "R")), "")

    def of_frame(self, keyword: str, sequence: str | None = None) -> Any:
        """An element that holds for the frame; None when absent."""
        return self.attributes.get(keyword, sequence)


def read_references(frames: Sequence[Frame], kind: str) -> tuple[Reference, ...]:
    """The references of ``frames``, for a result of ``kind`` (a word for messages).

    Errors: ResultError when a frame is no DICOM image, its file has changed, its UIDs cannot be
    referred to, or the frames are of different patients.
    """
    if not frames:
        raise ResultError(f"{kind} needs a DICOM image that the answer is about: none was given")
    references = tuple(_read_reference(frame, kind) for frame in frames)
    patients = {(str(one.identity.PatientID), str(one.identity.PatientName)) for one in references}
    if len(patients) > 1:
        raise ResultError(
            f"{kind} cannot hold several patients: ask about one patient's images at a time"
        )
    return references


def _read_reference(frame: Frame, kind: str) -> Reference:
    source = frame.source
    name = source.path or "the image"
    if source.dicom is None:
        raise ResultError(
            f"{name} is no DICOM file: {kind} belongs to a patient and a study, which only a DICOM "
            "image names; use --json or --overlay"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _parse(Path(source.path), source.sha256, source.frame)
    except (ResultError, ImageError) as error:
        raise ResultError(f"{name}: {error}") from error
    except OSError as error:
        raise ResultError(f"{name}: cannot be read again ({error.strerror})") from error
    # pydicom raises nearly anything on damaged elements.
    except Exception as error:
        raise ResultError(
            f"{name}: its header cannot be used for {kind} ({type(error).__name__})"
        ) from error


def _parse(path: Path, sha256: str | None, frame: int) -> Reference:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ResultError("has changed since it was read: ask again")
        header = read_header(file)
        layout = read_layout(header)
        attributes = FrameAttributes.of(header, layout, frame)
        number = frame + 1 if layout.num_frames > 1 else None
        return Reference(
            identity=_identity(header.dataset),
            image=_image(header, layout),
            attributes=attributes,
            layout=layout,
            number=number,
            sop_class=_uid(header.dataset, "SOPClassUID"),
        )


def _identity(dataset: Any) -> "Dataset":
    from pydicom import Dataset

    found = Dataset()
    found.SpecificCharacterSet = "ISO_IR 192"
    for keyword in IDENTITY:
        value = value_of(dataset, keyword)
        if value is None or not _copy(found, keyword, value):
            if keyword in _ALWAYS:
                setattr(found, keyword, "")
    found.StudyInstanceUID = _uid(dataset, "StudyInstanceUID")
    return found


def _copy(found: "Dataset", keyword: str, value: Any) -> bool:
    """Copy one element; False for what cannot be written, such as a weight of "70,5" kg."""
    try:
        setattr(found, keyword, _plain(value))
    except (ArithmeticError, TypeError, ValueError):
        return False
    return True


def _plain(value: Any) -> Any:
    """A value free of its file's character set; sequences decoded in depth."""
    from pydicom import Sequence as Items
    from pydicom.valuerep import PersonName

    if isinstance(value, PersonName):
        return str(value)
    if isinstance(value, Items):
        for item in value:
            item.decode()
            if "SpecificCharacterSet" in item:
                del item.SpecificCharacterSet
    return value


def _image(header: Header, layout: Layout) -> "Dataset":
    from pydicom import Dataset

    image = Dataset()
    image.SOPClassUID = STAND_IN_CLASS
    for keyword in _UIDS:
        setattr(image, keyword, _uid(header.dataset, keyword))
    for keyword in _ALWAYS:
        setattr(image, keyword, "")
    image.StudyDate = image.StudyTime = image.PatientBirthDate = None
    image.SpecificCharacterSet = "ISO_IR 192"
    image.Rows, image.Columns = layout.rows, layout.columns
    image.SamplesPerPixel = 1
    return image


def _uid(dataset: Any, keyword: str) -> str:
    value = str(value_of(dataset, keyword) or "").strip()
    if len(value) > _MAX_UID or not _UID.fullmatch(value):
        raise ResultError(f"has no usable {keyword}: a result could not refer to it")
    return value
