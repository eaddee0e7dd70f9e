"""The results of MedMO-nano: every target on every benchmark that can be run here, as one page.

    python benchmarks/results_table.py --data DIR --runs DIR [-o docs/results.md]

Exports the packaged checkpoint to each target, evaluates it and the checkpoint (transformers,
float32) on BCCD's val split, the phantoms and the VQA-RAD split, and compares each with the
checkpoint, question by question. Finished and half-finished runs in --runs are gone on with, so it
can be stopped at any time; the page holds what is finished. --fresh forgets the runs first. Speeds
come from a short run of their own, because they mean something only on an idle machine: --speeds
measures them again.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medmo_edge import __version__
from medmo_edge.evaluation.compare import compare_runs
from medmo_edge.evaluation.evaluate import RESULT, EvalOptions, evaluate
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.targets import TARGETS
from medmo_edge.runtime.device import probe

REFERENCE = "checkpoint"
SPEED, SPEED_QUESTIONS = "speed", 80
SPEED_NOTE = """\
A model this small says little about the speed of a real one, and its runs scatter; for real shapes
see `benchmarks/decode_speed.py` and `benchmarks/first_token.py`.
"""
BENCHMARKS = ("bccd", "phantoms", "vqa-rad")
TITLES = {
    "bccd": "Blood smears (BCCD val, 87 pictures)",
    "phantoms": "Drawn radiographs (200 phantoms)",
    "vqa-rad": "VQA-RAD (our split by picture)",
}
HEADER = """\
# Results of MedMO-nano

Written by `python benchmarks/results_table.py --data DIR --runs DIR -o docs/results.md`; not edited
by hand. MedMO-nano is a demonstrator of a few million parameters trained on blood smears, drawn
radiographs and VQA-RAD; all pictures here are held out (VQA-RAD by our own split by picture, as it
has none). The reference is the checkpoint in transformers, float32, greedy. Brackets are 95 %
bootstrap intervals over pictures; "retained" is the target's figure divided by the reference's on
the same questions; "same" is the part of identical answers.
Mean IoU pairs boxes by the Hungarian method, a missed box counts 0; `medmo-edge eval` explains the
rules in its report.
"""


def main() -> None:
    """Export, evaluate, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with bccd/ and vqa-rad/")
    parser.add_argument("--runs", type=Path, required=True, help="folder of artifacts and runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results.md"))
    # TensorRT's need a GPU or are emulated, and some a calibration record: see docs/tensorrt.md.
    here = [name for name, row in TARGETS.items() if row.backend != "trt"]
    parser.add_argument("--targets", nargs="*", default=[REFERENCE, *here])
    parser.add_argument("--benchmarks", nargs="*", default=list(BENCHMARKS))
    parser.add_argument("--threads", type=int, help="CPU threads of the runtime")
    parser.add_argument("--fresh", action="store_true", help="forget runs made before")
    parser.add_argument("--speeds", action="store_true", help="time every target again")
    parser.add_argument("--table-only", action="store_true", help="write what is finished")
    arguments = parser.parse_args()
    if arguments.fresh and arguments.runs.exists():
        shutil.rmtree(arguments.runs)
    if not arguments.table_only:
        for target in arguments.targets:
            run_target(target, arguments)
            time_target(target, arguments)
    page = render(arguments.runs)
    arguments.output.write_text(page, encoding="utf-8")
    print(f"{arguments.output} written", file=sys.stderr)


def run_target(target: str, arguments: argparse.Namespace) -> None:
    """One target on all benchmarks; what is finished is only read."""
    model = "nano" if target == REFERENCE else str(artifact(target, arguments.runs))
    for name in arguments.benchmarks:
        folder = arguments.runs / target / name
        if (folder / RESULT).is_file():
            continue
        print(f"{target} {name} ...", file=sys.stderr, flush=True)
        evaluate(
            EvalOptions(
                model=model,
                benchmark=name,
                data=None if name == "phantoms" else arguments.data,
                output=folder,
                threads=arguments.threads,
            )
        )


def time_target(target: str, arguments: argparse.Namespace) -> None:
    """A short run whose only result is its speed; the checkpoint is not timed."""
    folder = arguments.runs / SPEED / target
    if target == REFERENCE or ((folder / RESULT).is_file() and not arguments.speeds):
        return
    shutil.rmtree(folder, ignore_errors=True)
    evaluate(
        EvalOptions(
            model=str(artifact(target, arguments.runs)),
            benchmark="phantoms",
            output=folder,
            limit=SPEED_QUESTIONS,
            threads=arguments.threads,
        )
    )


def artifact(target: str, runs: Path) -> Path:
    """nano exported to ``target``, kept for the next call."""
    folder = runs / "artifacts" / target
    if not (folder / "manifest.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_checkpoint("nano", target, folder)
    return folder


def render(runs: Path) -> str:
    """The page of all finished runs."""
    parts = [HEADER, f"Package {__version__}, {_machine()}.\n"]
    for name in BENCHMARKS:
        rows = list(_rows(runs, name))
        if rows:
            parts.append(f"## {TITLES[name]}\n")
            parts.append(_table(rows))
    if speeds := list(_speeds(runs)):
        parts.append(f"## Speed ({SPEED_QUESTIONS} questions about phantoms, one at a time)\n")
        parts.append(_table(speeds))
        parts.append(SPEED_NOTE)
    return "\n".join(parts)


def _speeds(runs: Path) -> Iterator[dict[str, str]]:
    """Decoding alone, and whole answers with image and prompt, by target."""
    for target in TARGETS:
        path = runs / SPEED / target / RESULT
        if path.is_file():
            speed = json.loads(path.read_text(encoding="utf-8"))["speed"]
            yield {
                "target": target,
                "tokens/s": f"{speed['tokens_per_second']:.0f}",
                "questions/s": f"{speed['questions_per_second']:.1f}",
            }


def _machine() -> str:
    device = probe()
    return f"{platform.system()} {platform.machine()}, {device.cores} cores"


def _rows(runs: Path, name: str) -> Iterator[dict[str, str]]:
    for target in (REFERENCE, *TARGETS):
        folder = runs / target / name
        if (folder / RESULT).is_file():
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            yield _row(runs, target, name, result)


def _row(runs: Path, target: str, name: str, result: dict[str, Any]) -> dict[str, str]:
    row = {"target": target, "MB": _megabytes(runs, target)}
    found: dict[str, Any] = {}
    same = "-"
    reference = runs / REFERENCE / name
    if target != REFERENCE and (reference / RESULT).is_file():
        comparison = compare_runs(reference, runs / target / name)
        found, same = comparison["metrics"], f"{100 * comparison['same_text']:.1f} %"
    for metric, words in (("mean_iou", "mean IoU"), ("accuracy", "accuracy")):
        if metric in result:
            prefix = "" if metric == result["metric"] else f"{metric}_"
            row[words] = _bracket(result[metric], result[f"{prefix}interval"], 1, 3)
            retained = found.get(metric)
            row[f"{words} retained"] = (
                _bracket(retained["retention"], retained["retention_interval"], 100, 1)
                if retained
                else "-"
            )
    for label, figures in result["groups"].get("label", {}).items():
        row[label] = f"{figures['mean_iou']:.3f}"
    row["readable"] = f"{100 * result['parse_rate']:.1f} %"
    row["same"] = same
    return row


def _megabytes(runs: Path, target: str) -> str:
    from medmo_edge.checkpoint import NANO_FOLDER

    if target == REFERENCE:
        return f"{(NANO_FOLDER / 'model.safetensors').stat().st_size / 1e6:.1f}"
    manifest = json.loads((runs / "artifacts" / target / "manifest.json").read_text("utf-8"))
    return f"{sum(entry['bytes'] for entry in manifest['files'].values()) / 1e6:.1f}"


def _bracket(value: float | None, interval: Sequence[float | None], scale: int, digits: int) -> str:
    if value is None or None in interval:
        return "-"
    low, high = (scale * (bound or 0.0) for bound in interval)
    unit = " %" if scale == 100 else ""
    return f"{scale * value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def _table(rows: Sequence[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "-") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    main()
