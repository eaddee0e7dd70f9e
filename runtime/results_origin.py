"""Who made a result object, when, and under which UIDs: the same words in SR, GSPS, SC and FHIR.

UIDs are made from what they identify: with the same seed, image and kind they are the same again,
so that a result which is made twice is one object. Without a seed every call makes new ones.
Nothing here knows a patient.
"""

import hashlib
import re
import secrets
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from medmo_edge import __version__
from medmo_edge.errors import UsageError
from medmo_edge.runtime.answers import Answer

MANUFACTURER = "MedMO Edge"
NOTICE = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
SERIES_NUMBERS = {"sr": 9001, "gsps": 9002, "sc": 9003}
_MAX_UID = 64
_MAX_ROOT = 40  # leaves 24 digits for what is identified
_ROOT = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
UUID_ROOT = "2.25"
# Linear in the length of the text: no repetition inside another.
_BOXES = re.compile(r"[ \t]?<box>[^<]*(?:</box>)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultOptions:
    """How results are made.

    ``uid_root``: root of all new UIDs; 2.25 needs no registration (PS3.5 B.2). ``plain_sr``: a
    Comprehensive SR instead of a Comprehensive 3D SR, for older archives. ``seed``: results with
    the same seed, images and kind get the same UIDs; "" makes new ones. ``moment``: when the answer
    was made, default now. ``question``: what was asked.
    """

    uid_root: str = UUID_ROOT
    plain_sr: bool = False
    seed: str = ""
    moment: datetime | None = None
    question: str = ""

    def __post_init__(self) -> None:
        """Errors: UsageError for a root that is no UID prefix of at most 40 characters."""
        if len(self.uid_root) > _MAX_ROOT or not _ROOT.fullmatch(self.uid_root):
            raise UsageError(
                f"UID root {self.uid_root[:80]!r} is no UID prefix of at most {_MAX_ROOT} "
                "characters: give the root your institution was assigned, or leave it out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The algorithm behind one answer, and the moment and UIDs of its results."""

    answer: Answer
    options: ResultOptions
    moment: datetime
    seed: str = field(repr=False)

    @classmethod
    def of(cls, answer: Answer, options: ResultOptions) -> "Origin":
        """The origin of results of ``answer``."""
        seed = options.seed or secrets.token_hex(16)
        moment = options.moment or datetime.now().astimezone()
        return cls(answer=answer, options=options, moment=moment, seed=seed)

    @property
    def words(self) -> str:
        """The answer for people: its coordinates, which are on no image's grid, left out."""
        text = _BOXES.sub("", self.answer.text)
        return "".join(c for c in text if c.isprintable() or c in "\n\t").strip()

    @property
    def name(self) -> str:
        """Algorithm name with the checkpoint's, e.g. "MedMO Edge / nano"."""
        origin = self.answer.provenance
        checkpoint = "fake" if origin.target == "fake" else origin.checkpoint
        return f"{MANUFACTURER} / {checkpoint}" if checkpoint else MANUFACTURER

    @property
    def version(self) -> str:
        """Version of the software and target of the artifact."""
        return f"{__version__} {self.answer.provenance.target}"

    @property
    def weights(self) -> str:
        """sha256 of the artifact's manifest, which holds the sha256 of every weight file."""
        return self.answer.provenance.manifest_sha256 or "none"

    @property
    def parameters(self) -> tuple[str, ...]:
        """What else decides the answer, as "name=value"."""
        origin = self.answer.provenance
        values = {
            "weights sha256": self.weights,
            "checkpoint sha256": origin.checkpoint_sha256,
            "backend": origin.backend,
            "question": self.options.question,
        }
        return tuple(f"{name}={value}" for name, value in values.items() if value)

    def described(self, kind: str) -> dict[str, Any]:
        """What DICOM objects of every ``kind`` say alike, as keywords of highdicom's classes."""
        return {
            "series_number": SERIES_NUMBERS[kind],
            "instance_number": 1,
            "manufacturer": MANUFACTURER,
            "manufacturer_model_name": limited(self.name, 64),
            "software_versions": limited(self.version, 64),
            "device_serial_number": self.weights[:64],
        }

    def uid(self, *parts: object) -> str:
        """The UID of what ``parts`` name, under the configured root."""
        text = "\0".join([self.seed, *map(str, parts)])
        return make_uid(self.options.uid_root, text)


def make_uid(root: str, text: str) -> str:
    """The UID below ``root`` that belongs to ``text``: always the same, at most 64 characters."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    if root == UUID_ROOT:
        return f"{root}.{uuid.UUID(bytes=digest[:16], version=5).int}"
    digits = str(int.from_bytes(digest) | 1 << 255)  # 77 digits, never a leading zero
    return f"{root}.{digits[: min(39, _MAX_UID - len(root) - 1)]}"


def limited(text: str, length: int) -> str:
    """``text`` on one line of at most ``length`` characters, without backslashes."""
    line = " ".join(text.replace("\\", "/").split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= length else f"{line[: length - 3].rstrip()}..."
