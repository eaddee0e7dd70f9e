"""The ``verify`` command: measure an artifact against its checkpoint and certify it, or not.

Brings the pieces together: the artifact, the unquantised artifact of its format (given, or exported
on the spot), the reference, the samples. With ``--on-device`` the artifact's own golden cases are
replayed instead, without checkpoint and torch. What is measured and judged is in
``medmo_edge.evaluation``.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from medmo_edge import __version__
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import UsageError
from medmo_edge.evaluation.certificate import Circumstances, make_run, write_certificate
from medmo_edge.evaluation.emulated import open_session
from medmo_edge.evaluation.gates import Gates, read_gates
from medmo_edge.evaluation.measure import Bench, Record, Side, measure_all
from medmo_edge.evaluation.reference import Reference, open_reference
from medmo_edge.evaluation.stages import Measured, WeightGap, judge
from medmo_edge.evaluation.verify_cases import PROBE, probe_cases, read_checked, samples_sha256
from medmo_edge.evaluation.verify_report import check_report_path, format_text, write_report
from medmo_edge.manifest import Manifest, read_manifest
from medmo_edge.progress import step_bar
from medmo_edge.runtime.certified import (
    device_class,
    has_quantised_tower,
    libraries_of,
    subject_sha256,
)
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.observe import Observer
from medmo_edge.runtime.self_test import format_self_test, self_test
from medmo_edge.runtime.session import Session
from medmo_edge.samples import Sample
from medmo_edge.tokenizer import same_tokenizer

Progress = Callable[[str, int, int], None]
UNQUANTISED = ("full", "half")  # classes of gates
_BASES = {"gguf": "gguf-f16", "onnx": "onnx-fp32", "trt": "trt-bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to verify, and how; ``max_new_tokens`` limits every answer on both sides."""

    artifact: Path
    checkpoint: str
    samples: Path
    gates: Path | None = None
    unquantised: Path | None = None
    backend: str = "auto"
    threads: int | None = None
    max_new_tokens: int = 256


def run_verify(
    *,
    artifact: Path,
    against: str | None,
    samples: Path | None,
    on_device: bool,
    output: Path | None,
    as_json: bool,
    backend: str,
    threads: int | None,
    **options: Any,
) -> int:
    """The command; returns its exit code: 0 when the artifact passes, else 1."""
    if output is not None:
        check_report_path(output)
    if on_device:
        if against or samples or output:
            raise UsageError(
                "--on-device needs no --against, --samples or -o: it replays what is there"
            )
        return _run_self_test(artifact, backend, threads, as_json=as_json)
    if against is None or samples is None:
        raise UsageError("give --against CHECKPOINT and --samples FILE, or --on-device")
    task = Task(
        artifact=artifact,
        checkpoint=against,
        samples=samples,
        backend=backend,
        threads=threads,
        **options,
    )
    with step_bar() as progress:
        run = verify(task, progress)
    if output is not None:
        write_report(output, run)
    click.echo(json.dumps(run, indent=2, ensure_ascii=False) if as_json else format_text(run))
    return 0 if run["verdict"] == "pass" else 1


def _run_self_test(artifact: Path, backend: str, threads: int | None, *, as_json: bool) -> int:
    found = self_test(artifact, backend, threads=threads)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else format_self_test(found))
    return 0 if found.passed else 1


def verify(task: Task, progress: Progress, reference: Reference | None = None) -> dict[str, Any]:
    """Measure, judge and certify; returns the certificate's new entry, which is in the manifest.

    ``reference``: of the same checkpoint, when several artifacts share one. After an interrupt the
    same call goes on where it stopped. Errors: every kind of MedmoError that its inputs can cause;
    the manifest is then as it was.
    """
    start = time.perf_counter()
    gates = read_gates(task.gates)
    manifest = read_manifest(task.artifact)
    gates.losses(manifest.target)
    samples = read_checked(task.samples)
    sample_hash = samples_sha256(task.samples, samples)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(task.checkpoint))
        _check_origin(manifest, checkpoint)
        weights = _weights(manifest, checkpoint, progress)
        base = _unquantised(task, manifest, gates, stack, progress)
        session = stack.enter_context(_session(task, manifest.folder))
        plain = stack.enter_context(_session(task, base.folder)) if base else None
        reference = reference or _reference(checkpoint, manifest, base)
        bench = Bench(
            reference=reference,
            artifact=Side(Observer(session)),
            unquantised=Side(Observer(plain)) if plain else None,
            levels=len(checkpoint.config.vision.deepstack_indexes),
            max_new_tokens=task.max_new_tokens,
        )
        journal = _journal(task, manifest, base, session, sample_hash, reference)
        probes = probe_cases(checkpoint.preprocessing)
        records = measure_all(bench, samples, probes, journal, progress)
        measured = Measured(
            records=records,
            weights=weights,
            same_tokenizer=same_tokenizer(manifest.path_of("tokenizer"), checkpoint.tokenizer_path),
            target=manifest.target,
            base_target=base.target if base else manifest.target,
            quantised_tower=has_quantised_tower(manifest),
        )
        where = _circumstances(session, reference, base)
    described = _describe(task, samples, records, sample_hash)
    seconds = time.perf_counter() - start
    run = make_run(manifest, judge(measured, gates), gates, where, described, seconds)
    write_certificate(manifest, run)
    journal.unlink(missing_ok=True)
    return run


def _reference(checkpoint: Checkpoint, manifest: Manifest, base: Manifest | None) -> Reference:
    free = probe().ram_available_bytes
    return open_reference(checkpoint, free, _needed(manifest, base))


def _circumstances(session: Session, reference: Reference, base: Manifest | None) -> Circumstances:
    backend = session.backend
    return Circumstances(
        backend=backend.name,
        device=backend.device,
        device_class=device_class(probe(), backend.device),
        reference=reference.describe(),
        unquantised=base.target if base else None,
    )


def _check_origin(manifest: Manifest, checkpoint: Checkpoint) -> None:
    stated, found = manifest.checkpoint, checkpoint.identity()
    if stated.get("sha256") != found["sha256"]:
        raise UsageError(
            f"{manifest.folder} was exported from {stated.get('name')} "
            f"({str(stated.get('sha256'))[:12]}), {checkpoint.path} is {found['name']} "
            f"({found['sha256'][:12]}): give the checkpoint it came from"
        )


def _weights(
    manifest: Manifest, checkpoint: Checkpoint, progress: Progress
) -> list[WeightGap] | None:
    from medmo_edge.export.read_back import compare_weights

    return compare_weights(manifest, checkpoint, progress)


def _unquantised(
    task: Task, manifest: Manifest, gates: Gates, stack: ExitStack, progress: Progress
) -> Manifest | None:
    """The unquantised artifact of the same format; None when the artifact is one itself."""
    if gates.class_of(manifest.target) in UNQUANTISED:
        if task.unquantised is not None:
            raise UsageError(f"{manifest.target} is not quantised: leave --unquantised out")
        return None
    if task.unquantised is None:
        return _export_base(task, manifest, stack, progress)
    base = read_manifest(task.unquantised)
    if gates.class_of(base.target) not in UNQUANTISED or base.backend != manifest.backend:
        raise UsageError(
            f"{task.unquantised} is {base.target}: give an unquantised artifact of the same format"
        )
    if base.checkpoint.get("sha256") != manifest.checkpoint.get("sha256"):
        raise UsageError(f"{task.unquantised} was exported from another checkpoint")
    return base


def _export_base(task: Task, manifest: Manifest, stack: ExitStack, progress: Progress) -> Manifest:
    from medmo_edge.export.export import export_checkpoint

    target = _BASES.get(manifest.target.partition("-")[0])
    if target is None:
        raise UsageError(f"{manifest.target} needs --unquantised: an artifact of the same format")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="medmo-edge-verify-"))
    return export_checkpoint(task.checkpoint, target, Path(folder) / "base", progress=progress)


@contextmanager
def _session(task: Task, folder: Path) -> Iterator[Session]:
    with open_session(folder, task.backend, threads=task.threads) as session:
        yield session


def _needed(*manifests: Manifest | None) -> int:
    records = [each.files.values() for each in manifests if each is not None]
    return sum(record["bytes"] for files in records for record in files)


def _journal(
    task: Task,
    manifest: Manifest,
    base: Manifest | None,
    session: Session,
    sample_hash: str,
    reference: Reference,
) -> Path:
    """Where the records of exactly this measurement are kept until it is complete."""
    identity = [
        __version__,
        subject_sha256(manifest),
        base and base.target,
        manifest.checkpoint,
        sample_hash,
        task.max_new_tokens,
        session.backend.name,
        session.backend.device,
        libraries_of(session.backend.name),
        reference.describe(),
    ]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = manifest.folder.resolve()
    return folder.parent / f".{folder.name}.verify-{key}.jsonl"


def _describe(
    task: Task, samples: list[Sample], records: list[Record], sample_hash: str
) -> dict[str, Any]:
    tasks = sorted({sample.task for sample in samples})
    asked = [record for record in records if record.task != PROBE]
    return {
        "file": task.samples.name,
        "sha256": sample_hash,
        "count": len(asked),
        "pictures": len({record.picture for record in asked}),
        "probes": len(records) - len(asked),
        "tasks": {name: sum(record.task == name for record in asked) for name in tasks},
        "max_new_tokens": task.max_new_tokens,
    }
