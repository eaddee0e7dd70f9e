"""Which of several artifacts, on which backend: one order, with a reason for every one refused.

An artifact that carries a passing certificate for where it would run goes before one that does not;
then ``ORDER`` decides, which is a plain table: a new backend or target is a new row. On a GPU
TensorRT comes first where an engine was built, and wide weights before narrow ones, since every
target is fast enough there. On a CPU what ends a short answer about a picture soonest comes first:
int8 where the processor multiplies it fast, as most of that time is the prompt's
(benchmarks/first_token.py), then mostly the fewest bytes per token (benchmarks/decode_speed.py).
Nothing is measured here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmo_edge.errors import ArtifactError, BackendUnavailable
from medmo_edge.manifest import MANIFEST_NAME, Manifest, read_manifest
from medmo_edge.runtime.backends import Backend, Choice, choose, open_backend
from medmo_edge.runtime.certified import coverage, device_class
from medmo_edge.runtime.combined import Combined
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.llamacpp import LlamaCpp
from medmo_edge.runtime.model_facts import file_bytes, memory_obstacle
from medmo_edge.runtime.ort_fit import default_threads


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run a model: backend, place ("cuda" or "cpu"), target, and what speaks for it.

    ``needs``: features of which the processor must have one, else the row does not count.
    """

    backend: str
    place: str
    target: str
    merit: str
    needs: tuple[str, ...] = ()


# With them int8 products are three times as fast as those of 4-bit blocks.
_FAST_INT8 = ("avx512_vnni", "avx_vnni")
_SOONEST = "8-bit weights, measured to answer soonest about a picture on CPUs like this"

#: best first
ORDER: tuple[Row, ...] = (
    Row("trt", "cuda", "trt-bf16", "16-bit weights in a TensorRT engine"),
    Row("trt", "cuda", "trt-fp16", "16-bit weights in a TensorRT engine"),
    Row("trt", "cuda", "trt-fp8", "8-bit weights in a TensorRT engine"),
    Row("trt", "cuda", "trt-int4-awq", "4-bit weights in a TensorRT engine"),
    Row("trt", "cuda", "trt-nvfp4", "4-bit weights in a TensorRT engine, experimental"),
    Row("ort", "cuda", "onnx-fp16", "16-bit weights on the GPU"),
    Row("ort", "cuda", "onnx-int8", "8-bit weights on the GPU"),
    Row("ort", "cuda", "onnx-int4", "4-bit weights on the GPU"),
    Row("ort", "cpu", "onnx-int8", _SOONEST, needs=_FAST_INT8),
    Row("ort", "cpu", "onnx-int4", "4-bit weights, measured to decode fastest on CPUs"),
    Row("llamacpp", "cpu", "gguf-q4_k_m", "4-bit weights"),
    Row("llamacpp", "cpu", "gguf-iq4_xs", "4-bit weights, slower to unpack"),
    Row("llamacpp", "cpu", "gguf-q5_k_m", "5-bit weights"),
    Row("llamacpp", "cpu", "gguf-q6_k", "6-bit weights"),
    Row("ort", "cpu", "onnx-int8", "8-bit weights"),
    Row("llamacpp", "cpu", "gguf-q8_0", "8-bit weights"),
    Row("llamacpp", "cpu", "gguf-f16", "16-bit weights"),
    Row("llamacpp", "cpu", "gguf-bf16", "16-bit weights"),
    Row("ort", "cpu", "onnx-fp16", "16-bit weights"),
    Row("ort", "cpu", "onnx-fp32", "32-bit weights"),
)


#: targets whose vision tower serves llama.cpp's decoder better than its own, best first: int8
#: towers take a third to a half of the time of llama.cpp's
TOWERS = ("onnx-int8", "onnx-int4")
_TOWER_BYTES = 400 << 20  # activations of a large picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One artifact's verdict; ``obstacle`` is None when it can run, ``reason`` is for people."""

    manifest: Manifest
    backend: str
    place: str
    certified: bool
    obstacle: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What ``open_best`` opened, and why it took that."""

    backend: Backend
    manifest: Manifest
    reason: str


def find_artifacts(path: str | Path) -> list[Manifest]:
    """The artifact at ``path``, or those in folders directly below it; hashes are not checked.

    Errors: ArtifactError when there is none, or when they come from different checkpoints.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists() or not path.is_dir():
        return [read_manifest(path, verify=False)]
    folders = sorted(each.parent for each in path.glob(f"*/{MANIFEST_NAME}"))
    manifests = [read_manifest(folder, verify=False) for folder in folders]
    if not manifests:
        read_manifest(path, verify=False)  # says what is missing
    _refuse_mixture(path, manifests)
    return manifests


def _refuse_mixture(path: Path, manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        if other.checkpoint.get("sha256") != first.checkpoint.get("sha256"):
            names = [
                f"{each.folder.name} ({each.checkpoint.get('name')})" for each in (first, other)
            ]
            raise ArtifactError(
                f"{path} holds artifacts of different checkpoints, {' and '.join(names)}: name "
                "one of them, or keep each checkpoint's artifacts in a folder of their own"
            )


def rank(manifests: Sequence[Manifest], device: Device, wanted: str = "auto") -> list[Candidate]:
    """Every artifact with its backend and reason, best first.

    Errors: UsageError when ``wanted`` is neither "auto" nor a known backend.
    """
    candidates = [
        _judge(manifest, choose(manifest, device, wanted), device) for manifest in manifests
    ]
    candidates.sort(key=lambda candidate: _position(candidate, device))
    best = candidates[0]
    return [
        each if each is best or each.obstacle is not None else _passed_over(each, best)
        for each in candidates
    ]


def _judge(manifest: Manifest, choices: Sequence[Choice], device: Device) -> Candidate:
    choice = next((each for each in choices if each.name == manifest.backend), choices[0])
    certified = (
        choice.obstacle is None
        and coverage(manifest, choice.name, device_class(device, choice.place)).obstacle is None
    )
    return Candidate(
        manifest=manifest,
        backend=choice.name,
        place=choice.place,
        certified=certified,
        obstacle=choice.obstacle,
        reason=choice.reason if choice.obstacle else _merit(manifest, choice, device, certified),
    )


def _merit(manifest: Manifest, choice: Choice, device: Device, certified: bool) -> str:
    row = _row(choice.name, choice.place, manifest.target, device)
    parts = [ORDER[row].merit if row < len(ORDER) else choice.reason]
    parts += ["certified here"] if certified else []
    parts += [choice.remark] if choice.remark else []
    return ", ".join(parts)


def _row(backend: str, place: str, target: str, device: Device) -> int:
    for index, row in enumerate(ORDER):
        fits = not row.needs or any(name in device.features for name in row.needs)
        if fits and (row.backend, row.place, row.target) == (backend, place, target):
            return index
    return len(ORDER)


def _position(candidate: Candidate, device: Device) -> tuple[bool, bool, int, str]:
    row = _row(candidate.backend, candidate.place, candidate.manifest.target, device)
    name = candidate.manifest.folder.name
    return candidate.obstacle is not None, not candidate.certified, row, name


def _passed_over(candidate: Candidate, best: Candidate) -> Candidate:
    why = f"comes after {best.manifest.target} ({candidate.reason})"
    return Candidate(
        manifest=candidate.manifest,
        backend=candidate.backend,
        place=candidate.place,
        certified=candidate.certified,
        obstacle=None,
        reason=why,
    )


def open_best(
    path: str | Path,
    device: Device,
    wanted: str = "auto",
    options: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    pair: bool = True,
) -> Opened:
    """Open the best artifact at or below ``path`` that can be opened here.

    ``verify`` hashes the files of what is opened. ``pair``: an uncertified GGUF artifact may get
    the vision tower of an ONNX artifact that lies beside it. Errors: ArtifactError,
    BackendUnavailable with the reason of every artifact, or of every backend for a single one.
    """
    candidates = rank(find_artifacts(path), device, wanted)
    alone = len(candidates) == 1
    reasons = {each.manifest.folder.name: each.obstacle for each in candidates if each.obstacle}
    for candidate in candidates:
        if candidate.obstacle is not None and not alone:
            continue
        try:
            manifest = read_manifest(candidate.manifest.folder, verify=verify)
            backend = _open(manifest, device, wanted, options)
        except BackendUnavailable as error:  # a damaged artifact is not passed over in silence
            if alone:
                raise
            reasons[candidate.manifest.folder.name] = str(error)
            continue
        reason = _explain(candidate, reasons)
        if pair and wanted == "auto" and not candidate.certified:
            backend, tower = _with_tower(backend, candidates, device, options or {}, verify)
            reason += f"; {tower}" if tower else ""
        return Opened(backend=backend, manifest=manifest, reason=reason)
    raise BackendUnavailable(f"no artifact in {path} can run here", reasons)


def _open(
    manifest: Manifest, device: Device, wanted: str, options: Mapping[str, Any] | None
) -> Backend:
    """As ``open_backend``, of files that are still those that were hashed."""
    backend = None
    try:
        with manifest.unchanged():
            backend = open_backend(manifest, device, wanted, options)
    except ArtifactError:
        if backend is not None:
            backend.close()
        raise
    return backend


def _with_tower(
    backend: Backend,
    candidates: Sequence[Candidate],
    device: Device,
    options: Mapping[str, Any],
    verify: bool,
) -> tuple[Backend, str]:
    """llama.cpp with the vision tower of another candidate, and why; or as it is, and ""."""
    towers = {each.manifest.target: each for each in candidates if each.obstacle is None}
    tower = next((towers[name].manifest for name in TOWERS if name in towers), None)
    if backend.name != "llamacpp" or tower is None:
        return backend, ""
    needed = file_bytes(tower, "vision_data") + _TOWER_BYTES
    if memory_obstacle(needed, device) is not None:
        return backend, ""
    assert isinstance(backend, LlamaCpp)
    try:
        checked = read_manifest(tower.folder, verify=verify)
        threads = options.get("threads") or default_threads(tower, device)
        with checked.unchanged():
            return Combined(backend, checked, threads=threads), f"vision tower of {tower.target}"
    except BaseException:
        backend.close()
        raise


def _explain(candidate: Candidate, refused: Mapping[str, str]) -> str:
    text = f"{candidate.manifest.target} on {candidate.backend}: {candidate.reason}"
    others = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    return f"{text} (not {others})" if others else text
