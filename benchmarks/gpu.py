"""Every TensorRT target that fits this CUDA or Jetson machine: built, verified, measured, reported.

    python benchmarks/gpu.py CHECKPOINT --work-dir DIR [--calibration DIR] [--samples FILE]
                             [--targets trt-fp8 ...] [-o REPORT.md] [--quick]

Exports CHECKPOINT (a folder, or nano) to each target, builds its engines here, verifies them
(against the checkpoint with --samples, which needs torch; by the artifact's golden cases
otherwise), and times the wait for the first token, decoding, the fraction of this GPU's measured
memory bandwidth that decoding reaches, and memory. Targets that this GPU cannot run, or that need a
--calibration record that is not given, are listed with the reason. What others published for the
same class of device stands below; their prompts are alike (292 tokens, 265 of an image), not equal.

--work-dir keeps artifacts and engines, so a second run starts at once. The report is Markdown;
beside it, the same as .json. Without a CUDA GPU it says so and ends with exit code 2.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medmo_edge import __version__
from medmo_edge.build import build
from medmo_edge.errors import GenerationError, MedmoError, one_line
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.targets import TARGETS, find_target
from medmo_edge.manifest import Manifest, read_manifest
from medmo_edge.progress import stage_bars, step_bar
from medmo_edge.runtime import trt_library
from medmo_edge.runtime.device import Device, probe
from medmo_edge.runtime.golden import ROLE as GOLDEN
from medmo_edge.runtime.self_test import self_test
from medmo_edge.runtime.trt import BUILD_VARIABLE
from medmo_edge.runtime.trt_engines import Engines
from medmo_edge.runtime.trt_make import place_here

MEASURE = Path(__file__).with_name("gpu_measure.py")
#: device, model, precision, vision ms, prefill ms, decode tokens/s
PUBLISHED = (
    ("AGX Thor", "Qwen3-VL-4B", "NVFP4", 12.2, 20.4, 79.4),
    ("AGX Thor", "Qwen3-VL-4B", "INT4 AWQ", 11.7, 85.2, 79.0),
    ("AGX Thor", "Qwen3-VL-8B", "NVFP4", 15.8, 30.2, 47.1),
    ("AGX Thor", "Qwen3-VL-8B", "INT4 AWQ", 15.8, 156.5, 48.9),
    ("AGX Orin 64", "Qwen3-VL-4B", "INT4 AWQ", 39.3, 123.7, 52.4),
    ("AGX Orin 64", "Qwen3-VL-8B", "INT4 AWQ", 57.2, 225.1, 32.3),
    ("Orin NX 16", "Qwen3-VL-4B", "INT4 AWQ", 83.7, 244.6, 31.2),
    ("Orin NX 16", "Qwen3-VL-8B", "INT4 AWQ", 120.0, 462.1, 18.9),
    ("DGX Spark", "Qwen3-VL-4B", "NVFP4", 14.7, 27.8, 68.5),
    ("DGX Spark", "Qwen3-VL-8B", "NVFP4", 22.7, 40.6, 40.1),
)
SOURCE = (
    "NVIDIA's own figures for TensorRT Edge-LLM 0.9.0 on JetPack 7.2, batch 1, about 292 prompt "
    "tokens of which 265 image tokens, vision tower in FP16; not measured by us."
)


@dataclass(slots=True, kw_only=True)
class Row:
    """One target: what was done, or in ``obstacle`` why not."""

    target: str
    obstacle: str = ""
    verdict: str = "not verified"
    built: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the options say."""

    checkpoint: str
    work_dir: Path
    calibration: Path | None = None
    samples: Path | None = None
    targets: tuple[str, ...] = ()
    quick: bool = False


Measure = Callable[[Path | None, bool], dict[str, Any]]


def main() -> int:
    """Returns the exit code: 2 without a GPU or TensorRT, 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder, or nano")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--targets", nargs="+", default=())
    parser.add_argument("-o", "--output", type=Path, help="report [WORK_DIR/report.md]")
    parser.add_argument("--quick", action="store_true")
    given = vars(parser.parse_args())
    output = given.pop("output") or given["work_dir"] / "report.md"
    task = Task(**{**given, "targets": tuple(given["targets"])})
    device = probe()
    obstacle = machine_obstacle(device)
    if obstacle:
        print(f"gpu.py: {obstacle}", file=sys.stderr)
        return 2
    os.environ[BUILD_VARIABLE] = "1"  # verify exports an unquantised artifact, which needs engines
    try:
        rows, speed = run(task, device, measure_apart)
    except MedmoError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    write_report(output, task, device, rows, speed)
    print(output.read_text("utf-8"))
    return 0 if any(row.figures for row in rows) else 1


def machine_obstacle(device: Device) -> str | None:
    """Why nothing can be measured here, on one line."""
    if not device.cuda:
        return "no CUDA GPU here: run this on the machine to be measured"
    return trt_library.run_obstacle()


def run(task: Task, device: Device, measure: Measure) -> tuple[list[Row], float]:
    """Every target in turn, and the bytes per second of this GPU's memory."""
    wanted = [find_target(name).name for name in task.targets]
    wanted = wanted or [name for name, row in TARGETS.items() if row.backend == "trt"]
    speed = float(measure(None, task.quick)["bytes_per_second"])
    return [_run_target(name, task, device, measure) for name in wanted], speed


def _run_target(name: str, task: Task, device: Device, measure: Measure) -> Row:
    row = Row(target=name)
    try:
        row.obstacle = _refusal(name, task, device)
        if not row.obstacle:
            manifest = _export(name, task)
            row.built = _built(*_build(manifest, device))
            row.verdict = _verify(manifest, task)
            row.figures = measure(manifest.folder, task.quick)
    except MedmoError as error:
        row.obstacle = one_line(error, 400)
    return row


def _refusal(name: str, task: Task, device: Device) -> str:
    """What is known before gigabytes are written."""
    target, gpu = TARGETS[name], device.cuda[0]
    if target.min_sm is not None and gpu.sm < target.min_sm:
        return f"needs SM {target.min_sm}, this {gpu.name} is SM {gpu.sm}"
    if target.needs_calibration and task.calibration is None:
        return "needs a calibration record: give --calibration (see medmo-edge calibrate)"
    return ""


def _export(name: str, task: Task) -> Manifest:
    folder = task.work_dir / name
    if folder.exists():
        return read_manifest(folder)
    record = task.calibration if TARGETS[name].needs_calibration else None
    with stage_bars() as progress:
        return export_checkpoint(
            task.checkpoint, name, folder, calibration=record, progress=progress
        )


def _build(manifest: Manifest, device: Device) -> tuple[Engines, bool]:
    with step_bar() as progress:
        return build(manifest, place_here(manifest, device), None, report=progress)


def _built(engines: Engines, is_new: bool) -> dict[str, Any]:
    record = engines.record
    return {
        "new": is_new,
        "library": f"{record.library} {record.version}",
        "seconds": round(sum(record.seconds.values()), 1),
        "bytes": engines.nbytes,
    }


def _verify(manifest: Manifest, task: Task) -> str:
    if task.samples is not None:
        from medmo_edge.verify import Task as Verification
        from medmo_edge.verify import verify

        wanted = Verification(
            artifact=manifest.folder, checkpoint=task.checkpoint, samples=task.samples
        )
        with step_bar() as progress:
            found = verify(wanted, progress)
        return f"{found['verdict']} ({found['samples']['count']} samples)"
    if not any(record["role"] == GOLDEN for record in manifest.files.values()):
        return "not verified: give --samples"
    replayed = self_test(manifest.folder)
    return f"{'pass' if replayed.passed else 'fail'} ({replayed.cases} golden cases)"


def measure_apart(artifact: Path | None, quick: bool) -> dict[str, Any]:
    """Figures from a process of its own. Errors: GenerationError with the last thing it said."""
    command = [sys.executable, str(MEASURE), *([str(artifact)] if artifact else [])]
    result = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"it ended with {result.returncode}"]
        raise GenerationError(f"measuring failed: {said[-1]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def write_report(path: Path, task: Task, device: Device, rows: Sequence[Row], speed: float) -> None:
    """The Markdown page and the JSON file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "medmo_edge": __version__,
        "checkpoint": task.checkpoint,
        "device": device.to_dict(),
        "libraries": trt_library.versions(),
        "bytes_per_second": speed,
        "targets": [asdict(row) for row in rows],
    }
    path.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    path.write_text(format_report(task, device, rows, speed), encoding="utf-8")


def format_report(task: Task, device: Device, rows: Sequence[Row], speed: float) -> str:
    """Tables for people."""
    gpu = device.cuda[0]
    where = f"{device.jetson.model}, JetPack {device.jetson.jetpack}" if device.jetson else gpu.name
    libraries = [f"{name} {value}" for name, value in trt_library.versions().items() if value]
    lines = [
        f"# {Path(task.checkpoint).name} on {where}",
        "",
        f"{gpu.name}, SM {gpu.sm}, {gpu.memory_bytes / 1e9:.0f} GB, driver {device.driver}, "
        f"CUDA {device.cuda_version}; {', '.join(libraries)}; medmo-edge {__version__}. "
        f"Memory bandwidth by a copy within the GPU: {speed / 1e9:.0f} GB/s.",
        "",
        "| target | verified | first token ms (again) | image ms | decode tokens/s | "
        "of bandwidth | GPU memory GB | build s |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row, speed) for row in rows if row.figures),
        "",
        *(f"- {row.target}: not measured: {row.obstacle}" for row in rows if not row.figures),
        "",
        "## What others published",
        "",
        SOURCE,
        "",
        "| device | model | precision | vision ms | prefill ms | decode tokens/s |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(map(str, each)) + " |" for each in PUBLISHED),
        "",
    ]
    return "\n".join(lines)


def _line(row: Row, speed: float) -> str:
    figures = row.figures
    rate = figures["decode_tokens_per_second"]
    cells = (
        row.target,
        row.verdict,
        f"{1e3 * figures['first_token_seconds']:.1f} "
        f"({1e3 * figures['first_token_again_seconds']:.1f})",
        f"{1e3 * figures['image_seconds']:.1f}",
        f"{rate:.1f}",
        f"{rate * figures['bytes_per_token'] / speed:.0%}",
        f"{figures['gpu_bytes'] / 1e9:.1f}",
        f"{row.built['seconds']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
