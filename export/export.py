"""Checkpoint in, artifact out: the one entry to every target.

Opens and checks everything before it writes, stages the files beside the output and publishes them
by one rename. What a format writes is in the modules named after it.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medmo_edge import __version__
from medmo_edge.calibration.imatrix import Imatrix, read_imatrix
from medmo_edge.calibration.record import Record, read_record
from medmo_edge.checkpoint import Checkpoint, VisionConfig, open_checkpoint
from medmo_edge.errors import ExportError, UsageError
from medmo_edge.evaluation.golden import make_golden
from medmo_edge.export.gguf_files import LANGUAGE_FILE, VISION_FILE, plan_gguf, write_files
from medmo_edge.export.gguf_importance import importance_of
from medmo_edge.export.licence import stated_licence
from medmo_edge.export.onnx_calibrated import calibrated
from medmo_edge.export.onnx_files import GraphOptions, find_recipe, plan_onnx, write_onnx
from medmo_edge.export.targets import Target, find_target
from medmo_edge.export.trt_files import plan_trt, write_trt
from medmo_edge.manifest import (
    FileRecord,
    Manifest,
    new_artifact,
    record_file,
    sha256_file,
    write_manifest,
)
from medmo_edge.runtime.golden import FILE as GOLDEN_FILE
from medmo_edge.runtime.golden import ROLE as GOLDEN_ROLE
from medmo_edge.runtime.golden import write_golden

Progress = Callable[[str, int, int], None]

TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"
_GGUF_ROLES = {LANGUAGE_FILE: "language", VISION_FILE: "vision"}
_SHARED_ROLES = {TOKENIZER_FILE: "tokenizer", TEMPLATE_FILE: "chat_template"}
_LIBRARIES = ("gguf", "llama-cpp-python", "ml_dtypes", "numpy", "onnx")
# Metadata, manifest and file system blocks on top of tensors and tokenizer.
_SPARE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One format's work: bytes it will write, the role of each file, and the writing itself.

    ``write`` returns what the manifest says about the weights.
    """

    data_bytes: int
    roles: Mapping[str, str]
    write: Callable[[Progress], dict[str, Any]]


def export_checkpoint(
    checkpoint: str | Path,
    target: str,
    output: str | Path,
    *,
    imatrix: Path | None = None,
    calibration: Path | None = None,
    cache_length: int | None = None,
    golden: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Export a checkpoint folder, or ``"nano"``, to the artifact folder ``output``.

    ``imatrix`` is an importance matrix file for targets that take one, ``calibration`` a
    calibration record, ``cache_length`` the tokens of the longest conversation for targets that fix
    it. ``golden`` adds the cases of the on-site self-test, for which the artifact is loaded once,
    where it can run here, and the checkpoint passed through once. ``progress`` receives (stage,
    bytes done, bytes in all). Errors: UsageError, CheckpointError, CalibrationError, ExportError;
    on any of them, and on Ctrl-C, nothing is left at or beside ``output``.
    """
    row = find_target(target)
    _check_calibration(row, imatrix, calibration)
    if cache_length is not None and row.format != "trt":
        raise UsageError(f"{row.name} has no fixed cache: leave --cache-length out")
    report = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    matrix = read_imatrix(imatrix) if imatrix else None
    record = read_record(calibration) if calibration else None
    with open_checkpoint(checkpoint) as opened, new_artifact(Path(output)) as staging:
        if row.format == "gguf":
            matrix = importance_of(record, opened) if record else matrix
            job = _gguf_job(opened, row, staging, matrix, str(imatrix or calibration or ""))
        elif row.format == "trt":
            job = _trt_job(opened, row, staging, record, cache_length, report)
        else:
            job = _onnx_job(opened, row, staging, record, report)
        facts = _model_facts(opened)
        weights = _write(job, opened, staging, report)
        manifest = Manifest(
            target=row.name,
            backend=row.backend,
            model=facts,
            coords=opened.coords,
            preprocessing=opened.preprocessing.to_dict(),
            checkpoint=_identify(opened, report),
            files=_record_files(staging, {**job.roles, **_SHARED_ROLES}, report),
            weights=weights,
            calibration=_calibration_record(imatrix, matrix, record),
            exporter=_exporter(row, time.monotonic() - started),
            certificate=None,
            licence=stated_licence(opened.path),
        )
        written = write_manifest(staging, manifest)
        if golden:
            written = _add_golden(opened, written, report)
    return written.moved_to(Path(output))


def _write(job: _Job, checkpoint: Checkpoint, folder: Path, report: Progress) -> dict[str, Any]:
    """All files but the manifest, once they are known to fit; returns the facts of the weights."""
    _check_space(job.data_bytes + checkpoint.tokenizer_path.stat().st_size, folder)
    weights = job.write(report)
    shutil.copyfile(checkpoint.tokenizer_path, folder / TOKENIZER_FILE)
    (folder / TEMPLATE_FILE).write_text(checkpoint.chat_template, encoding="utf-8", newline="")
    return weights


def _add_golden(checkpoint: Checkpoint, artifact: Manifest, report: Progress) -> Manifest:
    """Store the golden cases beside the weights, and name them in the manifest."""
    path = artifact.folder / GOLDEN_FILE
    write_golden(path, make_golden(checkpoint, artifact, report))
    files = {**artifact.files, GOLDEN_FILE: record_file(path, GOLDEN_ROLE)}
    return write_manifest(artifact.folder, replace(artifact, files=files))


def _gguf_job(
    checkpoint: Checkpoint, row: Target, folder: Path, matrix: Imatrix | None, source: str
) -> _Job:
    plan = plan_gguf(checkpoint, row.weights, folder, matrix, source)
    return _Job(
        data_bytes=plan.data_bytes,
        roles=_GGUF_ROLES,
        write=lambda report: write_files(plan, checkpoint, matrix, report),
    )


def _onnx_job(
    checkpoint: Checkpoint, row: Target, folder: Path, record: Record | None, report: Progress
) -> _Job:
    recipe, options = find_recipe(row.weights), GraphOptions()
    if record:
        options = calibrated(options, record, checkpoint, recipe, report)
    plan = plan_onnx(checkpoint, recipe, options)
    return _Job(
        data_bytes=plan.data_bytes,
        roles=plan.roles,
        write=lambda report: write_onnx(plan, checkpoint, folder, report),
    )


def _trt_job(
    checkpoint: Checkpoint,
    row: Target,
    folder: Path,
    record: Record | None,
    capacity: int | None,
    report: Progress,
) -> _Job:
    plan = plan_trt(checkpoint, row, record, capacity, report)
    return _Job(
        data_bytes=plan.graphs.data_bytes,
        roles=plan.graphs.roles,
        write=lambda report: write_trt(plan, checkpoint, folder, report),
    )


def _check_space(needed: int, folder: Path) -> None:
    needed += _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder.parent} has {free:,} bytes free, the artifact needs {needed:,}: "
            "free some space or choose another output folder"
        )


def _identify(checkpoint: Checkpoint, report: Progress) -> dict[str, str]:
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    report("checkpoint hash", 0, size)
    identity = checkpoint.identity()
    report("checkpoint hash", size, size)
    return identity


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config, text = checkpoint.config, checkpoint.config.text
    return {
        "name": checkpoint.name,
        "architecture": "qwen3vl",
        "num_parameters": checkpoint.num_parameters,
        "vocab_size": text.vocab_size,
        "tokenizer_length": checkpoint.load_tokenizer().length,
        "eos_token_ids": list(config.eos_token_ids),
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "image_token": "<|image_pad|>",
        "max_positions": text.max_positions,
        "num_layers": text.num_layers,
        "num_heads": text.num_heads,
        "num_kv_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_size": text.hidden_size,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "mrope_section": list(text.mrope_section),
        "deepstack_levels": len(config.vision.deepstack_indexes),
        "vision": _vision_facts(config.vision),
        "generation": dict(checkpoint.generation),
    }


def _vision_facts(vision: VisionConfig) -> dict[str, Any]:
    return {
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "num_position_embeddings": vision.num_position_embeddings,
        "merge_size": vision.merge_size,
        "out_hidden_size": vision.out_hidden_size,
        "patch_size": vision.patch_size,
    }


def _record_files(
    staging: Path, roles: Mapping[str, str], report: Progress
) -> dict[str, FileRecord]:
    total = sum((staging / name).stat().st_size for name in roles)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        report("file hashes", done, total)

    return {name: record_file(staging / name, role, count) for name, role in roles.items()}


def _check_calibration(row: Target, imatrix: Path | None, calibration: Path | None) -> None:
    if imatrix and calibration:
        raise UsageError("--calibration already says what --imatrix would: give one of them")
    if imatrix and not row.takes_imatrix:
        raise UsageError(f"{row.name} is not changed by an importance matrix: leave --imatrix out")
    if calibration and not row.takes_record:
        raise UsageError(f"{row.name} is not changed by calibration: leave --calibration out")
    if row.needs_calibration and calibration is None:
        raise UsageError(
            f"{row.name} takes its scales from a calibration record: make one with `medmo-edge "
            "calibrate CHECKPOINT --samples FILE -o DIR` and give it as --calibration DIR"
        )


def _calibration_record(
    path: Path | None, imatrix: Imatrix | None, record: Record | None
) -> dict[str, Any] | None:
    if record:
        return record.summary()
    if path is None or imatrix is None:
        return None
    return {
        "kind": "imatrix",
        "file": path.name,
        "sha256": sha256_file(path),
        "datasets": list(imatrix.datasets),
        "entries": len(imatrix.means),
        "chunks": imatrix.chunk_count,
    }


def _exporter(target: Target, seconds: float) -> dict[str, Any]:
    return {
        "name": "medmo-edge",
        "version": __version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "weights": target.weights,
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
