"""DICOM sources for the tests of results and of the node: one file per kind of image.

Kinds: cr, dx, dx1 (MONOCHROME1), ct, mr, us (RGB), palette, us-frames, mr-frames.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UID

from medmo_edge.dicom_write import write_radiograph

INSTALLED = Path(pydicom.__file__).parent / "data" / "test_files"
US_MULTIFRAME = UID("1.2.840.10008.5.1.4.1.1.3.1")
ENHANCED_MR = UID("1.2.840.10008.5.1.4.1.1.4.1")
CR = UID("1.2.840.10008.5.1.4.1.1.1")


def write_source(kind: str, path: Path, **changes: Any) -> Path:
    """A DICOM file of ``kind`` at ``path``; ``changes`` are elements by keyword, None deletes."""
    dataset = _dataset(kind, path)
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def _dataset(kind: str, path: Path) -> Any:
    if kind in ("cr", "dx", "dx1"):
        return _radiograph(kind, path)
    names = {"ct": "CT_small.dcm", "mr": "MR_small.dcm", "palette": "examples_palette.dcm"}
    if kind in names:
        return pydicom.dcmread(INSTALLED / names[kind])
    if kind == "mr-frames":
        return _enhanced(pydicom.dcmread(INSTALLED / "MR_small.dcm"))
    dataset = pydicom.dcmread(INSTALLED / "examples_rgb_color.dcm")
    if kind == "us-frames":
        dataset.PixelData = dataset.PixelData * 3
        dataset.NumberOfFrames = 3
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = US_MULTIFRAME
        dataset.FrameTime = 40
        dataset.FrameIncrementPointer = 0x00181063
    return dataset


def _radiograph(kind: str, path: Path) -> Any:
    rows, columns = np.mgrid[:160, :240]
    pixels = (rows + columns * 0.5).astype(np.uint8)
    write_radiograph(path, pixels, monochrome1=kind == "dx1")
    dataset = pydicom.dcmread(path)
    if kind == "cr":
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CR
        dataset.Modality = "CR"
    return dataset


def _enhanced(dataset: Any) -> Any:
    """Four frames whose windows stand in their functional groups."""
    frames = [dataset.pixel_array + 50 * index for index in range(4)]
    dataset.PixelData = np.stack(frames).astype("<i2").tobytes()
    dataset.NumberOfFrames = 4
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ENHANCED_MR
    groups = []
    for index in range(4):
        window = pydicom.Dataset()
        window.WindowCenter, window.WindowWidth = 300 + 100 * index, 600
        group = pydicom.Dataset()
        group.FrameVOILUTSequence = [window]
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    for keyword in ("WindowCenter", "WindowWidth"):
        if keyword in dataset:
            delattr(dataset, keyword)
    return dataset
