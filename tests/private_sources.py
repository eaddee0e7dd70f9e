"""DICOM files in which every text is a sentinel that names its own element, for leak tests.

``Zqxj^00100010`` is the PatientName, and so on for every element of the standard with a text value.
What is found of them in a log or a message says where it came from.
"""

import re
from pathlib import Path

import pydicom
from pydicom._dicom_dict import DicomDictionary

INSTALLED = Path(pydicom.__file__).parent / "data" / "test_files"
TEXTS = frozenset("AE AS CS DA DT LO LT PN SH ST TM UC UI UR UT".split())
NUMBERS = frozenset(("DS", "IS"))
_LONG = frozenset(("UC", "UR", "UT"))
_SENTINEL = re.compile(r"ZQXJ\^?([0-9A-F]{8})?")
# Without these the file is no image that a node or a result can refer to.
_NEEDED = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("PhotometricInterpretation", "NumberOfFrames", "SpecificCharacterSet"),
    *("RescaleSlope", "RescaleIntercept", "PixelAspectRatio", "WindowCenter", "WindowWidth"),
)


def found_in(text: str) -> set[str]:
    """Keywords of the elements whose sentinel is in ``text``, in any case."""
    tags = {int(tag or "0", 16) for tag in _SENTINEL.findall(text.upper())}
    return {DicomDictionary[tag][4] if tag in DicomDictionary else hex(tag) for tag in tags}


def write_private(path: Path, *, uid: str, odd: tuple[str, ...] = ()) -> Path:
    """A CT image at ``path`` whose texts are sentinels.

    ``odd`` names elements out of those that an image needs which are sentinels, too; "NUMBERS":
    all decimal and integer strings are.
    """
    dataset = pydicom.dcmread(INSTALLED / "CT_small.dcm")
    dataset.SOPInstanceUID = pydicom.uid.UID(uid)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    kept = {pydicom.datadict.tag_for_keyword(keyword) for keyword in _NEEDED if keyword not in odd}
    kinds = TEXTS | NUMBERS if "NUMBERS" in odd else TEXTS
    elements = {
        int(element.tag): _element(int(element.tag), element.VR, _raw(dataset, element))
        for element in dataset
        if element.VR not in ("SQ", "UN") and not element.tag.is_private
    }
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        plain = vr in kinds and keyword and tag >> 16 not in (0, 2) and tag < 0x7FE00000
        if plain and tag not in kept:
            elements[tag] = _element(tag, vr, f"Zqxj^{tag:08X}".encode())
    head = path.with_suffix(".head")
    pydicom.dcmwrite(head, _only_meta(dataset), enforce_file_format=True)
    body = b"".join(elements[tag] for tag in sorted(elements))
    path.write_bytes(head.read_bytes() + body)
    head.unlink()
    return path


def _only_meta(dataset: pydicom.Dataset) -> pydicom.Dataset:
    empty = pydicom.Dataset()
    empty.file_meta = dataset.file_meta
    return empty


def _raw(dataset: pydicom.Dataset, element: pydicom.DataElement) -> bytes:
    """The value of ``element`` as it stands in an Explicit VR Little Endian file."""
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_data_element

    file = DicomBytesIO()
    file.is_little_endian, file.is_implicit_VR = True, True
    write_data_element(file, element)
    return file.getvalue()[8:]


def _element(tag: int, vr: str, value: bytes) -> bytes:
    value += (b"\0" if vr in ("UI", "OB") else b" ") * (len(value) % 2)
    head = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + vr.encode()
    if vr in _LONG or vr[0] == "O" or vr in ("SQ", "UN"):
        return head + bytes(2) + len(value).to_bytes(4, "little") + value
    return head + len(value).to_bytes(2, "little") + value
