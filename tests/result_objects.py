"""Answers with boxes, and the DICOM objects made of them, for the tests of results."""

import io
from collections.abc import Sequence
from typing import Any

import pydicom

from medmo_edge.images import Frame
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.session import load

TWO_BOXES = (
    "The nodule <box>[[100, 200, 300, 400]]</box> lies above an odd looking long shadow "
    "<box>[[500, 500, 700, 900]]</box>."
)


def ask(frames: Sequence[Frame], text: str = TWO_BOXES) -> Answer:
    """An answer about ``frames`` that reads ``text``."""
    with load(f"fake:{text}") as session:
        return session.ask(frames, "Locate the nodule.")


def read(content: bytes) -> Any:
    """The data set in the bytes of a result."""
    return pydicom.dcmread(io.BytesIO(content))
