"""What a data set says about one frame: functional groups, modality and VOI transformations.

A value is looked up in the frame's own functional group, then in the shared one, then at the top
of the data set (PS3.3 C.7.6.16). Broken optional elements are skipped with a note, never guessed
silently. Real-world value maps, overlays and presentation states are not applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.dicom_header import Header, Layout, value_of
from medmo_edge.dicom_window import FUNCTIONS, Function, Lut, Range, View, checked_window
from medmo_edge.errors import ImageError


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameAttributes:
    """Access to the elements that hold for one frame."""

    dataset: Any
    groups: tuple[Any, ...]  # the frame's own functional groups, then the shared ones
    little_endian: bool
    signed: bool
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, header: Header, layout: Layout, frame: int) -> "FrameAttributes":
        """The attributes of frame ``frame``."""
        own = _item(value_of(header.dataset, "PerFrameFunctionalGroupsSequence"), frame)
        shared = _item(value_of(header.dataset, "SharedFunctionalGroupsSequence"), 0)
        return cls(
            dataset=header.dataset,
            groups=tuple(group for group in (own, shared) if group is not None),
            little_endian=header.little_endian,
            signed=layout.signed,
            notes=header.notes,
        )

    def macro(self, sequence: str) -> Any:
        """First item of a functional group macro for this frame, None when there is none."""
        for group in self.groups:
            item = _item(value_of(group, sequence), 0)
            if item is not None:
                return item
        return None

    def get(self, keyword: str, sequence: str | None = None) -> Any:
        """Value of ``keyword`` in the macro ``sequence``, else at the top; None when absent."""
        macro = self.macro(sequence) if sequence else None
        value = value_of(macro, keyword) if macro is not None else None
        return value_of(self.dataset, keyword) if value is None else value

    def text(self, keyword: str, sequence: str | None = None) -> str:
        """Like ``get``, as stripped text; "" when absent."""
        value = self.get(keyword, sequence)
        return "" if value is None else str(value).strip()

    def numbers(self, keyword: str, sequence: str | None = None) -> tuple[float, ...]:
        """Like ``get``, as finite numbers; empty when absent or not numeric."""
        return numbers_of(self.get(keyword, sequence))


def numbers_of(value: Any) -> tuple[float, ...]:
    """One or several DICOM numbers as floats; empty when any of them is no finite number."""
    if value is None:
        return ()
    many = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    try:
        found = tuple(float(one) for one in many)
    except (TypeError, ValueError):
        return ()
    return found if all(np.isfinite(found)) else ()


def _item(sequence: Any, index: int) -> Any:
    try:
        return sequence[index] if sequence is not None else None
    except (IndexError, TypeError, KeyError):
        return None


@dataclass(frozen=True, slots=True)
class Rescale:
    """Modality transformation value * slope + intercept."""

    slope: float = 1.0
    intercept: float = 0.0
    stated: bool = False

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Modality values of stored ``values``."""
        return values * self.slope + self.intercept


@dataclass(frozen=True, slots=True)
class ModalityLut:
    """Modality transformation by table."""

    lut: Lut

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Modality values of stored ``values``."""
        return self.lut.look_up(values)


def modality_of(attributes: FrameAttributes) -> Rescale | ModalityLut:
    """The modality transformation: the LUT when there is one, else rescale (PS3.3 C.11.1)."""
    item = _item(attributes.get("ModalityLUTSequence"), 0)
    if item is not None:
        lut = _read_lut(item, attributes, signed_input=attributes.signed)
        if lut is not None:
            return ModalityLut(lut)
    macro = "PixelValueTransformationSequence"
    slope = attributes.numbers("RescaleSlope", macro)
    intercept = attributes.numbers("RescaleIntercept", macro)
    if not slope and not intercept:
        return Rescale()
    if not (slope and intercept):
        attributes.notes.append("only one of RescaleSlope and RescaleIntercept is stated")
    if slope and slope[0] == 0:
        attributes.notes.append("RescaleSlope 0 ignored")
        slope = ()
    return Rescale(slope[0] if slope else 1.0, intercept[0] if intercept else 0.0, True)


def views_of(attributes: FrameAttributes, signed_input: bool, is_float: bool) -> list[View]:
    """The VOI LUTs and then the windows of this frame, numbered from 0.

    ``signed_input``: modality values can be negative, so a LUT's first input may be.
    ``is_float``: the stored values are floats.
    """
    macro = attributes.macro("FrameVOILUTSequence")
    source = attributes.dataset if macro is None else macro
    views = _lut_views(source, attributes, signed_input)
    centers = numbers_of(value_of(source, "WindowCenter"))
    widths = numbers_of(value_of(source, "WindowWidth"))
    names = _texts(value_of(source, "WindowCenterWidthExplanation"))
    function = _function(source, attributes, is_float)
    # strict=False: files with two centres and one width exist; the pairs that are whole count.
    for number, (center, width) in enumerate(zip(centers, widths, strict=False)):
        try:
            curve = checked_window(center, width, function)
        except ImageError as error:
            attributes.notes.append(f"{error}: ignored")
            continue
        name = names[number] if number < len(names) else None
        views.append(View(curve=curve, origin="file window", explanation=name, index=len(views)))
    return views


def _function(source: Any, attributes: FrameAttributes, is_float: bool) -> Function:
    stated = str(value_of(source, "VOILUTFunction") or "LINEAR").strip().upper()
    function = next((name for name in FUNCTIONS if name == stated), None)
    if function is None:
        attributes.notes.append(f"VOILUTFunction {stated[:16]!r} is unknown: LINEAR used")
        function = "LINEAR"
    # LINEAR counts integers: its half steps would turn a window of 0..1 over floats into a step.
    return "LINEAR_EXACT" if is_float and function == "LINEAR" else function


def _lut_views(source: Any, attributes: FrameAttributes, signed_input: bool) -> list[View]:
    views: list[View] = []
    for item in value_of(source, "VOILUTSequence") or ():
        lut = _read_lut(item, attributes, signed_input)
        if lut is not None:
            name = str(value_of(item, "LUTExplanation") or "") or None
            views.append(View(curve=lut, origin="file LUT", explanation=name, index=len(views)))
    return views


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(one) for one in ([value] if isinstance(value, str) else value)]


def _read_lut(item: Any, attributes: FrameAttributes, signed_input: bool) -> Lut | None:
    """A Modality or VOI LUT item (PS3.3 C.11.1.1, C.11.2.1.1); None with a note when broken."""
    descriptor = numbers_of(value_of(item, "LUTDescriptor"))
    data = value_of(item, "LUTData")
    if len(descriptor) != 3 or data is None:
        attributes.notes.append("a LUT without descriptor or data is ignored")
        return None
    count, first, bits = (int(number) for number in descriptor)
    count = count % 2**16 or 2**16
    # The first input is unsigned or signed as the LUT's input is, whatever VR was written.
    first = first % 2**16
    if signed_input and first >= 2**15:
        first -= 2**16
    entries = lut_entries(data, count, attributes.little_endian)
    if entries is None or not 8 <= bits <= 16:
        attributes.notes.append("a LUT with wrong length or depth is ignored")
        return None
    return Lut(first, entries, bits)


def lut_entries(data: Any, count: int, little_endian: bool) -> NDArray[np.uint16] | None:
    """``count`` entries of LUT data (bytes of OW, 8 or 16 bits each, or numbers of US)."""
    if isinstance(data, bytes):
        if count <= len(data) < 2 * count:  # 8-bit entries, packed, padded to even length
            return np.frombuffer(data, np.uint8, count).astype(np.uint16)
        if len(data) < 2 * count:
            return None
        return np.frombuffer(data, "<u2" if little_endian else ">u2", count).astype(np.uint16)
    numbers = numbers_of(data)
    if len(numbers) < count:
        return None
    return np.asarray(numbers[:count], np.int64).astype(np.uint16)


def stored_bounds(layout: Layout) -> Range:
    """Smallest and largest integer a stored value can have."""
    if layout.signed:
        half = 2.0 ** (layout.bits_stored - 1)
        return Range(-half, half - 1)
    return Range(0.0, 2.0**layout.bits_stored - 1)


def padding_of(attributes: FrameAttributes, layout: Layout) -> tuple[int, int] | None:
    """Stored values (low, high) that mean "no pixel here" (PS3.3 C.7.5.1.1.2), None without."""
    first = attributes.numbers("PixelPaddingValue")
    if not first:
        return None
    limit = attributes.numbers("PixelPaddingRangeLimit") or first
    # US or SS is often written wrongly: read the 16 bits as the pixels are.
    ends = sorted(_as_stored(int(value[0]), layout) for value in (first, limit))
    return ends[0], ends[1]


def _as_stored(value: int, layout: Layout) -> int:
    bits = max(16, layout.bits_allocated)
    value %= 2**bits
    return value - 2**bits if layout.signed and value >= 2 ** (bits - 1) else value
