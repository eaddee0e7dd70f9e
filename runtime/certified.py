"""Certificates, the reading side: does this artifact carry a passing one for where it runs now?

``medmo-edge verify`` writes certificates into the manifest, one per backend and device class. One
counts only while the artifact is byte for byte what was measured, and while the backend's libraries
are the ones it was measured with. A certificate is not signed: it protects from mix-ups and
forgotten steps, not from somebody who rewrites the manifest.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.backends import BACKENDS, Backend
from medmo_edge.runtime.device import Device

SCHEMA = 1
_WEIGHT_ROLES = ("decoder", "decoder_data", "embeddings", "language", "vision", "vision_data")


@dataclass(frozen=True, slots=True)
class Coverage:
    """Whether an artifact may be used where a certificate is required; ``obstacle`` says why not.

    ``run`` is the certificate's entry for the backend and device class, if there is one.
    """

    obstacle: str | None
    run: Mapping[str, Any] | None = None


def device_class(device: Device, running_on: str) -> str:
    """What a certificate is bound to, e.g. "cpu x86_64" or "cuda sm90".

    ``running_on`` is ``Backend.device``, which begins with the kind of device.
    """
    kind = running_on.split(" ")[0].split(":")[0]
    if kind == "cuda" and device.cuda:
        return f"cuda sm{device.cuda[0].sm}"
    return f"{kind} {platform.machine().lower()}"


def run_key(backend: str, device_class: str) -> str:
    """Under which name the certificate keeps a run."""
    return f"{backend} on {device_class}"


def subject_sha256(manifest: Manifest) -> str:
    """Hash of everything the manifest says but the certificate: files, preprocessing, coords."""
    values = manifest.to_dict() | {"certificate": None}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def weights_sha256(manifest: Manifest) -> str:
    """Hash over the sha256 of the files that hold weights, in the order of their names."""
    lines = [
        f"{name} {record['sha256']}"
        for name, record in sorted(manifest.files.items())
        if record["role"] in _WEIGHT_ROLES
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def has_quantised_tower(manifest: Manifest) -> bool:
    """Whether any matrix of the vision tower is stored in fewer than 16 bits."""
    types = manifest.weights.get("vision", {}).get("types", {})
    return any(name.lower().startswith(("fp8", "int", "iq", "q")) for name in types)


def libraries_of(backend: str) -> dict[str, str | None]:
    """Versions of the libraries that compute in this backend."""
    found: dict[str, str | None] = import_module(BACKENDS[backend]).describe()
    return {name: found[name] for name in sorted(found) if found[name]}


def coverage(manifest: Manifest, backend: str, device_class: str) -> Coverage:
    """Judge the certificate for one backend on one device class."""
    certificate = manifest.certificate
    if certificate is None:
        return Coverage("it has no certificate")
    if certificate.get("schema") != SCHEMA or not isinstance(certificate.get("runs"), dict):
        return Coverage("its certificate is of a form that this version cannot read")
    if certificate.get("subject_sha256") != subject_sha256(manifest):
        return Coverage("it was changed after it was certified")
    run = certificate["runs"].get(run_key(backend, device_class))
    if run is None:
        known = ", ".join(certificate["runs"]) or "nothing"
        return Coverage(f"its certificate covers {known}, not {run_key(backend, device_class)}")
    if run.get("verdict") != "pass":
        return Coverage(f"its verification ended with {run.get('verdict')!r}", run)
    here = libraries_of(backend)
    if run.get("libraries") != here:
        there = ", ".join(f"{name} {value}" for name, value in run.get("libraries", {}).items())
        mine = ", ".join(f"{name} {value}" for name, value in here.items())
        return Coverage(f"it was certified with {there}, here is {mine}", run)
    return Coverage(None, run)


def check_certificate(manifest: Manifest, backend: Backend, device: Device) -> None:
    """Errors: ArtifactError when no passing certificate covers this backend here."""
    found = coverage(manifest, backend.name, device_class(device, backend.device))
    if found.obstacle is not None:
        raise ArtifactError(
            f"{manifest.folder} is not certified here: {found.obstacle}; run `medmo-edge verify "
            "ARTIFACT --against CHECKPOINT --samples FILE` on a machine of this kind"
        )


def describe_certificate(manifest: Manifest) -> dict[str, Any] | None:
    """For doctor: verdict, date and samples of every run, and what would keep it from counting.

    None without a certificate. A run of another device class than this machine's is judged as if
    it were here.
    """
    if manifest.certificate is None:
        return None
    runs = manifest.certificate.get("runs")
    if not isinstance(runs, dict):
        return {"runs": {}, "obstacle": coverage(manifest, manifest.backend, "").obstacle}
    return {
        "runs": {
            key: {
                "verdict": run.get("verdict"),
                "issued": run.get("issued"),
                "samples": run.get("samples", {}).get("count"),
                "obstacle": coverage(manifest, *key.split(" on ", 1)).obstacle,
            }
            for key, run in runs.items()
        },
        "obstacle": None,
    }
