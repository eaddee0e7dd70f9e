"""Write a drawn picture as a valid DICOM radiograph, for the demo and for tests.

The object is a Digital X-Ray Image - For Presentation (PS3.3 A.26) of 12 bits with one window over
its full scale and an obviously synthetic identity. Not a general writer: no other modality, no
compression, no real patient.
"""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ImageError
from medmo_edge.image_budgets import check_pixels

BITS_STORED = 12
FULL_SCALE = 2**BITS_STORED - 1


def write_radiograph(
    path: str | os.PathLike[str],
    pixels: NDArray[Any],
    *,
    monochrome1: bool = False,
    pixel_spacing: tuple[float, float] = (0.4, 0.4),
) -> None:
    """Write ``pixels`` [H, W], uint8 or uint16 of at most 4095, as a synthetic DX file at ``path``.

    Bright stays bright: with ``monochrome1`` the stored values are inverted, so that both files are
    shown alike. uint8 is spread over 12 bits and read back unchanged. ``pixel_spacing`` is in mm
    (rows, columns) at the detector. An existing file is replaced.

    Errors: ImageError for another shape or type, or when the file cannot be written.
    """
    stored = _stored_values(pixels)
    dataset = _dataset(stored.shape[0], stored.shape[1], monochrome1, pixel_spacing)
    dataset.PixelData = (FULL_SCALE - stored if monochrome1 else stored).astype("<u2").tobytes()
    # Beside the target and renamed: nobody ever reads half a file.
    target = Path(path)
    staging = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        dataset.save_as(staging, enforce_file_format=True)
        staging.replace(target)
    except OSError as error:
        raise ImageError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        staging.unlink(missing_ok=True)


def _stored_values(pixels: NDArray[Any]) -> NDArray[np.uint16]:
    values = np.asarray(pixels)
    if values.ndim != 2 or values.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f"array of {values.dtype} {list(values.shape)} is no uint8 or uint16 [H, W]"
        )
    check_pixels(values.shape[1], values.shape[0])
    if max(values.shape) > 65535:
        raise ImageError(f"DICOM has at most 65535 rows and columns, this is {list(values.shape)}")
    if values.dtype == np.uint8:
        return np.asarray(np.rint(values * (FULL_SCALE / 255)), np.uint16)
    if int(values.max()) > FULL_SCALE:
        raise ImageError(f"value {int(values.max())} does not fit into {BITS_STORED} bits")
    return np.asarray(values, np.uint16)


def _dataset(rows: int, columns: int, monochrome1: bool, spacing: tuple[float, float]) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import (
        DigitalXRayImageStorageForPresentation,
        ExplicitVRLittleEndian,
        generate_uid,
    )

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = generate_uid()
    dataset.SeriesInstanceUID = generate_uid()
    _set(dataset, _IDENTITY | _TECHNIQUE | _times())
    dataset.AnatomicRegionSequence = [_code("51185008", "SCT", "Thorax")]
    dataset.ViewCodeSequence = [_code("399348003", "SCT", "antero-posterior")]
    dataset.AcquisitionContextSequence = []
    dataset.Rows, dataset.Columns = rows, columns
    dataset.PhotometricInterpretation = "MONOCHROME1" if monochrome1 else "MONOCHROME2"
    dataset.PresentationLUTShape = "INVERSE" if monochrome1 else "IDENTITY"
    dataset.ImagerPixelSpacing = list(spacing)
    return dataset


def _set(dataset: Any, values: dict[str, Any]) -> None:
    for keyword, value in values.items():
        setattr(dataset, keyword, value)


def _times() -> dict[str, str]:
    now = datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    parts = ("Study", "Series", "Content", "Acquisition")
    return {f"{part}Date": date for part in parts} | {f"{part}Time": time for part in parts}


def _code(value: str, scheme: str, meaning: str) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    _set(item, {"CodeValue": value, "CodingSchemeDesignator": scheme, "CodeMeaning": meaning})
    if meaning == "antero-posterior":
        item.ViewModifierCodeSequence = []
    return item


_IDENTITY: dict[str, Any] = {
    "SpecificCharacterSet": "ISO_IR 192",
    "PatientName": "PHANTOM^DRAWN",
    "PatientID": "SYNTHETIC",
    "PatientBirthDate": "",
    "PatientSex": "O",
    "ReferringPhysicianName": "",
    "StudyID": "1",
    "AccessionNumber": "",
    "StudyDescription": "SYNTHETIC, NOT A PATIENT",
    "SeriesNumber": 1,
    "SeriesDescription": "Drawn radiograph",
    "InstanceNumber": 1,
    "Manufacturer": "MedMO Edge",
    "ManufacturerModelName": "drawn phantom",
    "DeviceSerialNumber": "0",
    "SoftwareVersions": "0",
}
_TECHNIQUE: dict[str, Any] = {
    "Modality": "DX",
    "PresentationIntentType": "FOR PRESENTATION",
    "ImageType": ["DERIVED", "PRIMARY"],
    "DerivationDescription": "Drawn by a program",
    "BodyPartExamined": "CHEST",
    "ImageLaterality": "U",
    "ViewPosition": "AP",
    "PatientOrientation": ["L", "F"],
    "DetectorType": "DIRECT",
    "PositionerType": "NONE",
    "BurnedInAnnotation": "NO",
    "LossyImageCompression": "00",
    "PixelIntensityRelationship": "LOG",
    "PixelIntensityRelationshipSign": -1,
    "SamplesPerPixel": 1,
    "BitsAllocated": 16,
    "BitsStored": BITS_STORED,
    "HighBit": BITS_STORED - 1,
    "PixelRepresentation": 0,
    "RescaleIntercept": 0,
    "RescaleSlope": 1,
    "RescaleType": "US",
    # LINEAR over exactly 0..4095, PS3.3 C.11.2.1.2.1.
    "WindowCenter": 2048,
    "WindowWidth": 4096,
}
