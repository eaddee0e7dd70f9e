"""Gates: what an artifact may lose, read from TOML (gates.toml is the packaged default).

A file of the user's changes single values of the default; a key that the default does not have is
an error, so a misspelt gate cannot stay open. What is measured, and how it is judged, is elsewhere.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmo_edge.errors import UsageError

DEFAULT = Path(__file__).with_name("gates.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What one class of targets may lose; see the comments of gates.toml for every value."""

    max_weight_error: float
    max_mean_kl: float
    max_difference: float
    max_golden_difference: float
    min_top1: float
    stable_margin: float
    min_agreement: float
    min_answers_retained: float
    min_iou_retained: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """All gates: one mapping of limits per stage, and the losses of each class of targets."""

    limits: Mapping[str, Mapping[str, float]]
    classes: Mapping[str, Losses]
    targets: Mapping[str, str]

    def class_of(self, target: str) -> str:
        """The class of a target such as gguf-q8_0. Errors: UsageError when none is named."""
        precision = target.partition("-")[2]
        name = self.targets.get(precision)
        if name is None:
            raise UsageError(f"no gate is set for target {target}: name it under [targets]")
        return name

    def vision(self, *, quantised: bool) -> Mapping[str, float]:
        """Limits of the vision features, by whether the tower is stored in fewer than 16 bits."""
        return self.limits["vision_quantised" if quantised else "vision"]

    def losses(self, target: str) -> Losses:
        """What this target may lose."""
        return self.classes[self.class_of(target)]


def read_gates(path: Path | None = None) -> Gates:
    """The packaged gates, changed by the file at ``path``.

    Errors: UsageError for a file that cannot be read, an unknown key or a value of a wrong type.
    """
    values = tomllib.loads(DEFAULT.read_text(encoding="utf-8"))
    classes = set(values["targets"].values())
    if path is not None:
        _change(values, _read(path), path)
    unknown = set(values["targets"].values()) - classes
    if unknown:
        raise UsageError(
            f"{path}: class {min(unknown)!r} is not one of {', '.join(sorted(classes))}"
        )
    return Gates(
        targets=values.pop("targets"),
        classes={name: Losses(**values.pop(name)) for name in sorted(classes)},
        limits=values,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"gates {path} cannot be read: {reason}") from error


def _change(values: dict[str, Any], changes: Mapping[str, Any], path: Path) -> None:
    for section, entries in changes.items():
        if section not in values or not isinstance(entries, dict):
            raise UsageError(f"{path}: unknown section {section!r}: use {', '.join(values)}")
        for key, value in entries.items():
            known = values[section]
            if key not in known and section != "targets":
                raise UsageError(f"{path}: unknown key {section}.{key}: use {', '.join(known)}")
            wanted = str if section == "targets" else (int, float)
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise UsageError(f"{path}: {section}.{key} is {value!r}, not a number or class")
            known[key] = value
