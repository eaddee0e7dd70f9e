"""Answers as objects that hospital systems keep: DICOM SR, GSPS, secondary capture, and FHIR R4.

``make_*`` give bytes, ``write_*`` a file by atomic rename. All say that they are unverified output
of an algorithm for research use, name it with the hash of its weights, and carry the identity of
the source's patient and study. None is a diagnosis, and none is sent anywhere from here.
"""

import errno
import io
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medmo_edge.errors import MedmoError, ResultError
from medmo_edge.images import Frame
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.results_origin import (
    MANUFACTURER,
    NOTICE,
    Origin,
    ResultOptions,
    limited,
)
from medmo_edge.runtime.results_source import IDENTITY, Reference, read_references

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "KINDS",
    "ResultOptions",
    "check_result_path",
    "check_sources",
    "make_fhir",
    "make_gsps",
    "make_sc",
    "make_sr",
    "write_fhir",
    "write_gsps",
    "write_results",
    "write_sc",
    "write_sr",
]


def make_sr(frames: Sequence[Frame], answer: Answer, options: ResultOptions | None = None) -> bytes:
    """A Structured Report (TID 1500) with every box as a region of its image.

    ``frames`` are the images the answer is about, in order. Errors: ResultError.
    """
    from medmo_edge.runtime.results_sr import build_sr

    return _dicom(frames, answer, options, "--sr", lambda refs, origin: build_sr(refs, origin))


def make_gsps(
    frames: Sequence[Frame], answer: Answer, options: ResultOptions | None = None
) -> bytes:
    """A grayscale or colour softcopy presentation state that draws the boxes.

    It shows the window the model saw. Errors: ResultError, also when images of several studies,
    or grey and colour ones, are mixed.
    """
    from medmo_edge.runtime.results_gsps import build_gsps

    return _dicom(
        frames, answer, options, "--gsps", lambda refs, origin: build_gsps(frames, refs, origin)
    )


def make_sc(frames: Sequence[Frame], answer: Answer, options: ResultOptions | None = None) -> bytes:
    """A secondary capture of one frame with boxes and notice burned in.

    Errors: ResultError, also for more than one frame.
    """
    from medmo_edge.runtime.results_sc import build_sc

    return _dicom(
        frames, answer, options, "--sc", lambda refs, origin: build_sc(frames, refs, origin)
    )


def make_fhir(
    frames: Sequence[Frame], answer: Answer, options: ResultOptions | None = None
) -> bytes:
    """A FHIR R4 Bundle as JSON: DiagnosticReport, Observations, ImagingStudy, Device, Patient.

    Errors: ResultError.
    """
    from medmo_edge.runtime.results_fhir import build_fhir

    references = read_references(frames, "--fhir")
    return build_fhir(references, Origin.of(answer, options or ResultOptions()))


def write_sr(
    path: str | os.PathLike[str],
    frames: Sequence[Frame],
    answer: Answer,
    options: ResultOptions | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write ``make_sr`` to ``path``. Errors: ResultError, also for a path that is taken."""
    _write(path, make_sr, frames, answer, options, overwrite)


def write_gsps(
    path: str | os.PathLike[str],
    frames: Sequence[Frame],
    answer: Answer,
    options: ResultOptions | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write ``make_gsps`` to ``path``. Errors: ResultError, also for a path that is taken."""
    _write(path, make_gsps, frames, answer, options, overwrite)


def write_sc(
    path: str | os.PathLike[str],
    frames: Sequence[Frame],
    answer: Answer,
    options: ResultOptions | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write ``make_sc`` to ``path``. Errors: ResultError, also for a path that is taken."""
    _write(path, make_sc, frames, answer, options, overwrite)


def write_fhir(
    path: str | os.PathLike[str],
    frames: Sequence[Frame],
    answer: Answer,
    options: ResultOptions | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write ``make_fhir`` to ``path``. Errors: ResultError, also for a path that is taken."""
    _write(path, make_fhir, frames, answer, options, overwrite)


Make = Callable[[Sequence[Frame], Answer, ResultOptions | None], bytes]
KINDS: dict[str, Make] = {
    "sr": make_sr,
    "gsps": make_gsps,
    "sc": make_sc,
    "fhir": make_fhir,
}


def check_result_path(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse early, before a model has run for a minute, what ``write_*`` would refuse.

    Errors: ResultError.
    """
    place = Path(path)
    if place.is_dir():
        raise ResultError(f"{place} is a folder: name a file for the result")
    if os.path.lexists(place) and not overwrite:
        raise ResultError(f"{place} exists already: choose another name or add --overwrite")
    if not place.absolute().parent.is_dir():
        raise ResultError(f"{place}: its folder does not exist")


def check_sources(frames: Sequence[Frame], kinds: Sequence[str]) -> None:
    """Refuse early what ``make_*`` of ``kinds`` would refuse of ``frames``. Errors: ResultError."""
    if any(kind != "fhir" for kind in kinds):
        check_dicom_extra()
    for kind in kinds:
        read_references(frames, f"--{kind}")
        if kind == "sc" and len(frames) > 1:
            raise ResultError("--sc captures one image: ask about one image at a time")


def write_results(
    places: Mapping[str, Path],
    frames: Sequence[Frame],
    answer: Answer,
    options: ResultOptions,
    *,
    overwrite: bool = False,
) -> None:
    """Write several kinds (keys of KINDS) of one answer: all are made before any is written.

    They share one seed, so that a finding has the same tracking UID in each. Errors: ResultError.
    """
    options = replace(options, seed=options.seed or secrets.token_hex(16))
    made = {kind: KINDS[kind](frames, answer, options) for kind in places}
    for kind, content in made.items():
        check_result_path(places[kind], overwrite=overwrite)
        store(places[kind], content, overwrite=overwrite)


def check_dicom_extra() -> None:
    """Errors: ResultError when the libraries for DICOM results are not installed."""
    try:
        import highdicom  # noqa: F401
    except ModuleNotFoundError as error:
        raise ResultError(
            f"DICOM results need {error.name}: pip install 'medmo-edge[dicom]'"
        ) from error


def _write(
    path: str | os.PathLike[str],
    make: Make,
    frames: Sequence[Frame],
    answer: Answer,
    options: ResultOptions | None,
    overwrite: bool,
) -> None:
    check_result_path(path, overwrite=overwrite)
    store(Path(path), make(frames, answer, options), overwrite=overwrite)


def store(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write ``content`` so that ``path`` is never seen half-written. Errors: ResultError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite or not _link(partial, path):
            partial.replace(path)
    except FileExistsError:
        raise ResultError(
            f"{path} exists already: choose another name or add --overwrite"
        ) from None
    except OSError as error:
        raise ResultError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> bool:
    """Publish by a link, which unlike a rename never replaces what came meanwhile.

    False on file systems without links. Errors: FileExistsError and other OSError.
    """
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return False
    return True


Build = Callable[[tuple[Reference, ...], Origin], "Dataset"]


def _dicom(
    frames: Sequence[Frame],
    answer: Answer,
    options: ResultOptions | None,
    kind: str,
    build: Build,
) -> bytes:
    check_dicom_extra()
    references = read_references(frames, kind)
    origin = Origin.of(answer, options or ResultOptions())
    try:
        with warnings.catch_warnings():
            # Odd values of the source, which are copied as they are.
            warnings.simplefilter("ignore")
            result = build(references, origin)
            _restore_classes(result, references)
            return _encode(result, references[0], origin)
    except MedmoError:
        raise
    # highdicom holds its input against the standard and raises what it finds; the texts may name
    # values of the source.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        about = (frames[0].source.dicom or {}).get("sop_class", "no SOP class")
        raise ResultError(
            f"{frames[0].source.path}: {kind} cannot refer to this kind of image ({about})"
        ) from error


def _add_equipment(dataset: "Dataset", origin: Origin) -> None:
    """The algorithm among the equipment that contributed, where archives look for it."""
    from highdicom import ContributingEquipment
    from pydicom.sr.codedict import codes

    equipment = ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=codes.DCM.ProcessingEquipment,
        manufacturer_model_name=limited(origin.name, 64),
        software_versions=limited(origin.version, 64),
        device_serial_number=origin.weights[:64],
        contribution_datetime=origin.moment.replace(tzinfo=None),
        contribution_description=f"{NOTICE}. Unverified. Weights sha256 {origin.weights}",
    )
    others = list(dataset.get("ContributingEquipmentSequence", ()))
    dataset.ContributingEquipmentSequence = [equipment, *others]


def _restore_classes(dataset: "Dataset", references: tuple[Reference, ...]) -> None:
    """Every reference names its image's own SOP class, in place of STAND_IN_CLASS."""
    classes = {reference.uid: reference.sop_class for reference in references}
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _restore_classes(item, references)
                if item.get("ReferencedSOPInstanceUID") in classes:
                    item.ReferencedSOPClassUID = classes[item.ReferencedSOPInstanceUID]


def _encode(dataset: "Dataset", reference: Reference, origin: Origin) -> bytes:
    """The object as a DICOM file, with the identity of the source's patient and study."""
    from pydicom.uid import ExplicitVRLittleEndian

    for keyword in (*IDENTITY, "StudyInstanceUID", "SpecificCharacterSet"):
        if keyword in reference.identity:
            setattr(dataset, keyword, reference.identity[keyword].value)
    _add_equipment(dataset, origin)
    dataset.SeriesDate = origin.moment.strftime("%Y%m%d")
    dataset.SeriesTime = origin.moment.strftime("%H%M%S")
    dataset.InstanceCreationDate = dataset.SeriesDate
    dataset.InstanceCreationTime = dataset.SeriesTime
    dataset.TimezoneOffsetFromUTC = origin.moment.strftime("%z") or "+0000"
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
