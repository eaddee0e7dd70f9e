"""From modality values to grey: VOI windows and LUTs, CT presets, and which of them is used.

Order of preference without a request: the file's VOI LUTs, its windows (the first of them), for CT
in Hounsfield units the preset of the body part (DEFAULT_PRESETS, else "soft-tissue"), for 8 bits
and less the whole stored range, else the range of the frame without padding. Curves follow PS3.3
C.11.2.1 (LUT, LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT). Not done: contrast enhancement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ImageError

Function = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
FUNCTIONS: tuple[Function, ...] = ("LINEAR", "LINEAR_EXACT", "SIGMOID")

# (center, width) in HU; Radiopaedia, "Windowing (CT)", one value where it gives a range.
PRESETS: dict[str, tuple[float, float]] = {
    "abdomen": (50, 400),
    "bone": (400, 1800),
    "brain": (40, 80),
    "liver": (30, 150),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft-tissue": (40, 400),
    "spine": (50, 250),
    "stroke": (40, 40),
    "subdural": (75, 215),
    "temporal-bone": (600, 2800),
}
# BodyPartExamined -> preset for a CT that states no window of its own.
DEFAULT_PRESETS: dict[str, str] = {
    "BRAIN": "brain",
    "HEAD": "brain",
    "SKULL": "bone",
    "CHEST": "mediastinum",
    "THORAX": "mediastinum",
    "LUNG": "lung",
    "ABDOMEN": "abdomen",
    "PELVIS": "abdomen",
    "LIVER": "abdomen",
    "EXTREMITY": "bone",
    "SPINE": "spine",
    "CSPINE": "spine",
    "TSPINE": "spine",
    "LSPINE": "spine",
}


@dataclass(frozen=True, slots=True)
class Window:
    """A VOI window; ``shade`` maps modality values to 0..1."""

    center: float
    width: float
    function: Function = "LINEAR"

    def shade(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Grey in 0..1 of ``values``."""
        if self.function == "SIGMOID":
            # An exponent beyond 700 would overflow; there the curve is flat anyway.
            power = np.clip(-4 * (values - self.center) / self.width, -700, 700)
            return np.asarray(1 / (1 + np.exp(power)))
        center, width = self.center, self.width
        if self.function == "LINEAR":
            center, width = center - 0.5, width - 1
        low, high = center - width / 2, center + width / 2
        inner = np.where(values > high, 1.0, (values - center) / (width or 1) + 0.5)
        return np.asarray(np.where(values <= low, 0.0, inner))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for provenance."""
        return {"center": self.center, "width": self.width, "function": self.function}


@dataclass(frozen=True, slots=True)
class Range:
    """Linear grey from ``low`` (0) to ``high`` (1); a step above ``low`` when they are equal."""

    low: float
    high: float

    def shade(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Grey in 0..1 of ``values``; NaN is 0."""
        if self.high <= self.low:
            return (values > self.low).astype(np.float64)
        # Halves, because high - low of two huge doubles would overflow.
        unit = (values / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return np.asarray(np.clip(np.nan_to_num(unit, nan=0.0, posinf=1.0, neginf=0.0), 0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for provenance."""
        return {"low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Lut:
    """A lookup table of ``bits``-bit entries; the first belongs to input ``first``."""

    first: int
    entries: NDArray[np.uint16] = field(repr=False)
    bits: int

    def look_up(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Entries of ``values``; inputs beyond the ends take the end entries."""
        place = np.clip(np.floor(values) - self.first, 0, len(self.entries) - 1)
        return np.asarray(self.entries[np.nan_to_num(place).astype(np.intp)], np.float64)

    def shade(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Grey in 0..1 of ``values``."""
        return np.asarray(np.clip(self.look_up(values) / (2**self.bits - 1), 0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for provenance."""
        return {"lut_first": self.first, "lut_entries": len(self.entries), "lut_bits": self.bits}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One way to show a frame: a curve, where it comes from, the file's name and number for it."""

    curve: Window | Range | Lut
    origin: str
    explanation: str | None = None
    index: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``Source.window``."""
        values = self.curve.to_dict() | {"from": self.origin}
        if self.explanation:
            values["explanation"] = self.explanation
        if self.index is not None:
            values["index"] = self.index
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the choice of a view depends on besides the views the file offers."""

    hounsfield: bool
    modality: str
    body_part: str
    stored_range: Range | None
    frame_range: Range


def choose_view(
    request: str | int | tuple[float, float] | None, views: Sequence[View], subject: Subject
) -> View:
    """The view to use.

    Errors: ImageError when the request names a view this file does not have.
    """
    if request is None:
        return views[0] if views else _default_view(subject)
    if isinstance(request, str):
        return _named_view(request, views, subject)
    if isinstance(request, int):
        if 0 <= request < len(views):
            return views[request]
        raise ImageError(f"has {len(views)} window(s), counted from 0: no window {request}")
    return View(curve=checked_window(*request), origin="asked")


def checked_window(center: float, width: float, function: Function = "LINEAR") -> Window:
    """A window whose width its function can use (PS3.3 C.11.2.1.2.1, C.11.2.1.3).

    Errors: ImageError.
    """
    lowest = 1 if function == "LINEAR" else 0
    if not (np.isfinite(center) and np.isfinite(width)) or width < lowest or width <= 0:
        raise ImageError(f"window center {center:g} with width {width:g} cannot be used")
    return Window(float(center), float(width), function)


def _default_view(subject: Subject) -> View:
    if subject.hounsfield:
        name = DEFAULT_PRESETS.get(subject.body_part.replace(" ", "").upper(), "soft-tissue")
        return View(curve=Window(*PRESETS[name]), origin=f"default preset {name}")
    if subject.stored_range is not None:
        return View(curve=subject.stored_range, origin="stored range")
    return View(curve=subject.frame_range, origin="frame range")


def _named_view(name: str, views: Sequence[View], subject: Subject) -> View:
    wanted = _plain(name)
    for view in views:
        if view.explanation and _plain(view.explanation) == wanted:
            return view
    if wanted == "auto":
        return View(curve=subject.frame_range, origin="frame range")
    if wanted not in PRESETS:
        own = [view.explanation for view in views if view.explanation]
        raise ImageError(
            f"window {name!r} is unknown: one of {', '.join([*own, 'auto', *PRESETS])}"
        )
    if not subject.hounsfield:
        raise ImageError(
            f"window preset {name!r} is in Hounsfield units, this is "
            f"{subject.modality or 'an image of unknown modality'} without them"
        )
    return View(curve=Window(*PRESETS[wanted]), origin=f"preset {wanted}")


def _plain(name: str) -> str:
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())
