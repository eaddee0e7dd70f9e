"""What ``medmo-edge doctor`` reports: this machine, the backends, and why each can or cannot run.

It only looks: nothing is installed, repaired, measured or sent anywhere.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from medmo_edge import __version__
from medmo_edge.manifest import read_manifest
from medmo_edge.runtime.backends import BACKENDS, choose
from medmo_edge.runtime.certified import describe_certificate
from medmo_edge.runtime.choice import find_artifacts, rank
from medmo_edge.runtime.device import Device, library_versions, probe
from medmo_edge.runtime.llamacpp_native import openmp_spins

# Variables that keep libraries silent on the network, or OpenMP from spinning; see medmo_edge.
_SETTINGS = (
    "DO_NOT_TRACK",
    "GOMP_SPINCOUNT",
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_OFFLINE",
    "ORT_DISABLE_TELEMETRY",
    "ORT_TELEMETRY_DISABLED",
    "TRANSFORMERS_OFFLINE",
)


def doctor(artifact: str | Path | None = None) -> dict[str, Any]:
    """Findings as JSON values: version, device, libraries, settings, backends, artifact, warnings.

    ``artifact`` may be a folder of several artifacts of one checkpoint: ``candidates`` lists all,
    best first, and ``artifact`` is the one that load would take. ``backends`` are in the order in
    which they would be tried for it. Errors: ArtifactError when it is incomplete or changed.
    """
    device = probe()
    candidates = [] if artifact is None else rank(find_artifacts(artifact), device)
    manifest = read_manifest(candidates[0].manifest.folder) if candidates else None
    choices = choose(manifest, device)
    libraries = library_versions()
    for module in map(import_module, BACKENDS.values()):
        libraries.update(module.describe())
    return {
        "version": __version__,
        "device": device.to_dict(),
        "libraries": dict(sorted(libraries.items())),
        "settings": {name: os.environ.get(name) for name in _SETTINGS},
        "backends": [
            {"name": each.name, "can_run": each.obstacle is None, "reason": each.reason}
            for each in choices
        ],
        "candidates": [
            {
                "path": str(each.manifest.folder),
                "target": each.manifest.target,
                "backend": each.backend,
                "place": each.place or None,
                "can_run": each.obstacle is None,
                "certified": each.certified,
                "reason": each.reason,
            }
            for each in candidates
        ],
        "artifact": manifest
        and {
            "path": str(manifest.folder),
            "target": manifest.target,
            "model": manifest.model.get("name"),
            "manifest_sha256": manifest.sha256,
            "certificate": describe_certificate(manifest),
        },
        "warnings": _warnings(libraries, device),
    }


def _warnings(libraries: dict[str, str | None], device: Device) -> list[str]:
    found = []
    if libraries["onnxruntime"] and libraries["onnxruntime-gpu"]:
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "uninstall both, then install one"
        )
    if openmp_spins():
        found.append("GOMP_SPINCOUNT is not 0: on a busy machine answers can be very slow")
    if "avx2" not in device.features and "neon" not in device.features:
        found.append("the CPU has neither AVX2 nor NEON: answers will be slow")
    return found


def format_findings(findings: dict[str, Any]) -> str:
    """The findings as a table for people."""
    device, artifact = findings["device"], findings["artifact"]
    rows = [
        ("medmo-edge", findings["version"]),
        ("system", device["system"]),
        ("cpu", f"{device['cpu']}, {device['cores']} cores, {' '.join(device['features'])}"),
        ("memory", f"{_gb(device['ram_bytes'])}, {_gb(device['ram_available_bytes'])} available"),
        ("gpu", _gpus(device)),
    ]
    if device["jetson"]:
        jetson = device["jetson"]
        jetpack = f"JetPack {jetson['jetpack']}, L4T {jetson['l4t']}"
        rows.append(("jetson", f"{jetson['model']}, {jetpack}"))
    installed = [f"{name} {value}" for name, value in findings["libraries"].items() if value]
    rows.append(("libraries", ", ".join(installed)))
    settings = (f"{name}={value}" for name, value in findings["settings"].items())
    rows.append(("settings", " ".join(settings)))
    if artifact:
        rows.append(("artifact", f"{artifact['path']} ({artifact['model']}, {artifact['target']})"))
        rows += _certificate_rows(artifact["certificate"])
    if len(findings["candidates"]) > 1:
        rows += [_candidate(*each) for each in enumerate(findings["candidates"], start=1)]
    for backend in findings["backends"]:
        state = "yes" if backend["can_run"] else "no"
        rows.append((f"backend {backend['name']}", f"{state}: {backend['reason']}"))
    rows += [("warning", warning) for warning in findings["warnings"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _certificate_rows(certificate: dict[str, Any] | None) -> list[tuple[str, str]]:
    if certificate is None:
        return [("certificate", "none: see medmo-edge verify")]
    if not certificate["runs"]:
        return [("certificate", f"unreadable: {certificate['obstacle']}")]
    rows = []
    for key, run in certificate["runs"].items():
        state = f"does not count: {run['obstacle']}" if run["obstacle"] else "counts"
        text = f"{run['verdict']}, {key}, {run['samples']} samples, {run['issued']}; {state}"
        rows.append(("certificate", text))
    return rows


def _candidate(number: int, found: dict[str, Any]) -> tuple[str, str]:
    where = f"{found['backend']} on {found['place']}" if found["can_run"] else "no"
    return f"choice {number}", f"{found['target']}, {where}: {found['reason']}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _gpus(device: dict[str, Any]) -> str:
    if not device["cuda"]:
        return "no CUDA GPU"
    software = f"driver {device['driver'] or 'unknown'}, CUDA {device['cuda_version'] or 'unknown'}"
    return "; ".join([*map(_gpu, device["cuda"]), software])


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, SM {gpu['sm']}, {_gb(gpu['memory_bytes'])}"
