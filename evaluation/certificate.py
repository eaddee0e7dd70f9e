"""The certificate: what a verification found, written into the artifact's manifest.

One entry per backend and device class; a newer one of the same kind replaces it, and all are
dropped when the artifact is no longer what they were measured on. A failed verification is written
too: an artifact that fails must say so. Whether an entry counts is for runtime.certified to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from medmo_edge import __version__
from medmo_edge.errors import ArtifactError
from medmo_edge.evaluation.gates import Gates
from medmo_edge.evaluation.stages import Stage, first_failure, overall
from medmo_edge.manifest import Manifest, read_manifest, write_manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.runtime.certified import (
    SCHEMA,
    libraries_of,
    run_key,
    subject_sha256,
    weights_sha256,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Where and with what a verification was made; everything in plain JSON values."""

    backend: str
    device: str
    device_class: str
    reference: dict[str, Any]
    unquantised: str | None


def make_run(
    manifest: Manifest,
    stages: Sequence[Stage],
    gates: Gates,
    where: Circumstances,
    samples: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """One entry of the certificate: verdict, what it is bound to, every figure and threshold.

    ``samples`` describes the sample set by its hash and counts.
    """
    return {
        "verdict": overall(stages),
        "failed_stage": first_failure(stages),
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "medmo_edge": __version__,
        "target": manifest.target,
        "weights_sha256": weights_sha256(manifest),
        "preprocessing_sha256": Preprocessing.from_dict(manifest.preprocessing).sha256,
        "coords": manifest.coords,
        "checkpoint": dict(manifest.checkpoint),
        "backend": where.backend,
        "libraries": libraries_of(where.backend),
        "device": where.device,
        "device_class": where.device_class,
        "reference": where.reference,
        "unquantised": where.unquantised,
        "samples": samples,
        "class": gates.class_of(manifest.target),
        "stages": [stage.to_dict() for stage in stages],
        "seconds": round(seconds, 1),
    }


def write_certificate(manifest: Manifest, run: dict[str, Any]) -> Manifest:
    """Put ``run`` into the manifest on disk by one rename; returns it as read back.

    Errors: ArtifactError when the artifact was changed meanwhile or its folder is read-only.
    """
    now = read_manifest(manifest.folder, verify=False)
    subject = subject_sha256(now)
    if subject != subject_sha256(manifest):
        raise ArtifactError(f"{manifest.folder} was changed while it was verified: verify it again")
    runs: dict[str, Any] = {}
    old = now.certificate
    if old is not None and old.get("subject_sha256") == subject and old.get("schema") == SCHEMA:
        runs = dict(old["runs"])
    runs[run_key(run["backend"], run["device_class"])] = run
    certificate = {"schema": SCHEMA, "subject_sha256": subject, "runs": runs}
    try:
        return write_manifest(manifest.folder, replace(now, certificate=certificate))
    except OSError as error:
        raise ArtifactError(
            f"{manifest.folder} cannot take its certificate: {error.strerror}"
        ) from error
