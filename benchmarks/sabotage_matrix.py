"""Which stage catches which deliberate fault: the test of the gate itself.

    python benchmarks/sabotage_matrix.py [--target gguf-q8_0 ...] [--pictures 12] [--json FILE]

Exports nano to every target, verifies the sound artifact and then a copy with each fault of
``evaluation.sabotage``, by ``verify --against`` (first failing stage) and by ``--on-device``. Small
sample sets leave retention undecided, which is no failure here. Exits with 1 when a fault passes,
when another stage than the expected ones names it first, or when a sound artifact fails.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import MedmoError
from medmo_edge.evaluation.reference import Reference, Remembered, WholeReference
from medmo_edge.evaluation.sabotage import FAULTS, Fault, damaged_copy
from medmo_edge.export.export import export_checkpoint
from medmo_edge.manifest import read_manifest
from medmo_edge.phantoms import draw
from medmo_edge.prompts import locate_prompt, user_message
from medmo_edge.runtime.self_test import self_test
from medmo_edge.samples import Sample, write_samples
from medmo_edge.verify import Task, verify

TARGETS = ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "onnx-fp32", "onnx-int8", "onnx-int4")
SIZES = ((512, 576), (448, 320), (300, 700), (640, 640), (260, 256))
FIRST_SEED = 4_000_000
SOUND = Fault(name="(sound)", what="nothing", stages=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault on one target: every stage that failed, in order, by both ways of testing."""

    target: str
    fault: str
    what: str
    verify: list[str]
    on_device: list[str]
    as_expected: bool
    figures: dict[str, Any]


def draw_samples(folder: Path, count: int) -> Path:
    """A sample file about drawn pictures of five shapes: boxes, and yes or no."""
    samples = []
    for index in range(count):
        phantom = draw(FIRST_SEED + index, size=SIZES[index % len(SIZES)], nodule=index % 4 != 3)
        path = folder / f"{index}.png"
        Image.fromarray(phantom.pixels).save(path)
        nodules = tuple(box for box in phantom.boxes if box.label == "nodule")
        fluid = "yes" if phantom.facts["effusions"] else "no"
        locate = [user_message(locate_prompt("nodule"), 1)]
        ask = [user_message("Is there a pleural effusion?", 1)]
        name = f"phantom-{index}"
        samples += [
            Sample(id=f"{name}-n", task="locate", images=(path,), messages=locate, boxes=nodules),
            Sample(id=f"{name}-e", task="vqa", images=(path,), messages=ask, answer=fluid),
        ]
    file = folder / "samples.jsonl"
    write_samples(file, samples)
    return file


def examine(
    artifact: Path,
    base: Path | None,
    samples: Path,
    fault: Fault,
    checkpoint: Checkpoint,
    reference: Reference,
) -> Row:
    """Both tests of one artifact with ``fault`` in it."""
    manifest = read_manifest(artifact)
    task = Task(
        artifact=artifact,
        checkpoint=str(checkpoint.path),
        samples=samples,
        unquantised=base,
        threads=1,
        max_new_tokens=48,
    )
    with fault.patched(manifest.backend, checkpoint):
        try:
            run = verify(task, lambda *state: None, reference)
            stages = {each["name"]: each for each in run["stages"]}
            failed = [name for name, each in stages.items() if each["verdict"] == "fail"]
        except MedmoError as error:
            stages, failed = {}, [f"refused: {error}"]
        try:
            site = self_test(artifact, threads=1)
            on_device = [check.name for check in site.checks if not check.passed]
        except MedmoError as error:
            on_device = [f"refused: {error}"]
    sound = not fault.stages
    expected = not failed and not on_device if sound else bool(set(failed[:1]) & set(fault.stages))
    return Row(
        target=manifest.target,
        fault=fault.name,
        what=fault.what,
        verify=failed,
        on_device=on_device,
        as_expected=expected,
        figures={name: each["figures"] for name, each in stages.items()},
    )


def rows_of(target: str, folder: Path, samples: Path, reference: Reference) -> list[Row]:
    """The sound artifact and every fault that can be made for it."""
    sound = folder / target
    export_checkpoint("nano", target, sound)
    base = None
    if target not in ("gguf-f16", "gguf-bf16", "onnx-fp32", "onnx-fp16"):
        base = folder / f"{target}-base"
        export_checkpoint("nano", "onnx-fp32" if "onnx" in target else "gguf-f16", base)
    backend, rows = read_manifest(sound).backend, []
    with open_checkpoint("nano") as checkpoint:
        for fault in (SOUND, *(each for each in FAULTS if each.fits(backend))):
            copy = damaged_copy(sound, fault, folder / f"{target}-{fault.name}")
            rows.append(examine(copy, base, samples, fault, checkpoint, reference))
            show(rows[-1])
    return rows


def show(row: Row) -> None:
    """One line of the matrix."""
    cells = (row.target, row.fault, row.what, ", ".join(row.verify), ", ".join(row.on_device))
    print(f"| {' | '.join(cells)} | {'' if row.as_expected else 'NOT AS EXPECTED'} |", flush=True)


def main() -> None:
    """Print the matrix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", help="may be given several times")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--json", type=Path, help="also write rows and figures here")
    arguments = parser.parse_args()
    print("| target | fault | what | verify: stages that fail | on-device | |")
    print("|---|---|---|---|---|---|")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, open_checkpoint("nano") as checkpoint:
        samples = draw_samples(Path(name), arguments.pictures)
        reference = Remembered(WholeReference(checkpoint))
        for target in arguments.target or TARGETS:
            rows += rows_of(target, Path(name), samples, reference)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(0 if all(row.as_expected for row in rows) else 1)


if __name__ == "__main__":
    main()
