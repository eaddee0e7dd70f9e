"""Two runs on the same questions: the paired difference, its interval, and whether it is real.

Items (pictures, exam questions) are the units: the bootstrap draws them, and the sign-flip
permutation test exchanges the two runs on them. A difference is called significant below p = 0.05.
Runs of other questions or other gold answers are refused; what was not asked in both is left out
and counted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.evaluate import RESULT, SAMPLES
from medmo_edge.evaluation.scores import bootstrap
from medmo_edge.evaluation.summary import METRICS, NAMES, by_sample, clean

PERMUTATIONS = 10_000
SIGNIFICANT = 0.05
_MAX_SIGNS = 4_000_000  # drawn at a time, to bound memory

Line = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """``second`` minus ``first`` over the same questions; retention is second / first.

    Intervals are 95 %; ``p_value`` is of the two-sided sign-flip test.
    """

    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    retention: float
    retention_interval: tuple[float, float]
    p_value: float
    significant: bool
    num_questions: int
    num_samples: int


def paired(
    first: Sequence[float], second: Sequence[float], samples: Sequence[str], seed: int = 0
) -> Paired:
    """Compare two scores of the same questions; ``samples`` names the item each belongs to.

    Errors: ValueError when the lengths differ or nothing is compared.
    """
    if not len(first) == len(second) == len(samples) or not len(first):
        raise ValueError("paired scores need equal lengths and at least one question")
    a, sizes = by_sample(first, samples)
    b, _ = by_sample(second, samples)
    total = len(a)
    mean_a, mean_b = float(a.sum() / sizes.sum()), float(b.sum() / sizes.sum())
    delta = b - a
    p_value = _sign_flips(delta, seed)
    return Paired(
        first=mean_a,
        second=mean_b,
        difference=mean_b - mean_a,
        interval=bootstrap(lambda d: float(delta[d].sum() / sizes[d].sum()), total, seed),
        retention=mean_b / mean_a if mean_a else float("nan"),
        retention_interval=bootstrap(
            lambda d: float(b[d].sum() / a[d].sum()) if a[d].sum() else float("nan"), total, seed
        ),
        p_value=p_value,
        significant=p_value < SIGNIFICANT,
        num_questions=len(first),
        num_samples=total,
    )


def _sign_flips(delta: np.ndarray, seed: int) -> float:
    """Part of random sign changes that give a sum at least as far from 0 (the real one counted)."""
    moved = delta[np.abs(delta) > 1e-12]
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(seed)
    seen = abs(float(moved.sum())) - 1e-9
    extreme = 0
    step = max(1, _MAX_SIGNS // len(moved))
    for start in range(0, PERMUTATIONS, step):
        count = min(step, PERMUTATIONS - start)
        signs = rng.integers(0, 2, (count, len(moved))) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= seen).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """The comparison of two output folders of ``medmo-edge eval``.

    Errors: SampleError when a folder holds no finished run, or the runs asked other things.
    """
    results = [_result(folder) for folder in (first, second)]
    lines = [_lines(folder) for folder in (first, second)]
    if results[0]["benchmark"] != results[1]["benchmark"]:
        raise SampleError(
            f"{first} is a run of {results[0]['benchmark']}, {second} of "
            f"{results[1]['benchmark']}: compare runs of one benchmark"
        )
    shared = [name for name in lines[0] if name in lines[1]]
    if not shared:
        raise SampleError(f"{first} and {second} have no question in common")
    for name in shared:
        _check_same(first, second, lines[0][name], lines[1][name])
    metrics = {}
    for metric in METRICS:
        pairs = [(lines[0][name], lines[1][name]) for name in shared]
        pairs = [(a, b) for a, b in pairs if a["metric"] == metric and a["value"] is not None]
        if pairs:
            metrics[metric] = _compare(pairs)
    return {
        "benchmark": results[0]["benchmark"],
        "first": {"path": str(first), "model": results[0]["model"]},
        "second": {"path": str(second), "model": results[1]["model"]},
        "same_text": clean(
            float(np.mean([lines[0][name]["text"] == lines[1][name]["text"] for name in shared]))
        ),
        "not_compared": len(lines[0]) + len(lines[1]) - 2 * len(shared),
        "metrics": metrics,
    }


def _compare(pairs: Sequence[tuple[Line, Line]]) -> dict[str, Any]:
    found = paired(
        [a["value"] for a, _ in pairs],
        [b["value"] for _, b in pairs],
        [a["sample"] for a, _ in pairs],
    )
    names = Paired.__dataclass_fields__
    value: dict[str, Any] = clean({name: getattr(found, name) for name in names})
    return value


def _check_same(first: Path, second: Path, a: Line, b: Line) -> None:
    for key in ("question", "gold", "truth_boxes", "rule"):
        if a[key] != b[key]:
            raise SampleError(
                f"question {a['id']!r} has another {key.replace('_', ' ')} in {first} than in "
                f"{second}: these are runs of other data"
            )


def _result(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SampleError(
            f"{folder} holds no finished run of medmo-edge eval ({RESULT}): run it with -o {folder}"
        ) from error
    if not isinstance(value, dict) or "benchmark" not in value:
        raise SampleError(f"{folder / RESULT} is not a result of medmo-edge eval")
    return value


def _lines(folder: Path) -> dict[str, Line]:
    path = folder / SAMPLES
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        return {line["id"]: line for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SampleError(f"{path} is missing or damaged: run the evaluation again") from error


def format_comparison(result: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    lines = [f"{result['benchmark']}: {_name(result['second'])} against {_name(result['first'])}"]
    for metric, found in result["metrics"].items():
        low, high = found["interval"]
        verdict = "significant" if found["significant"] else "not significant"
        lines.append(
            f"  {NAMES[metric]} {found['first']:.3f} -> {found['second']:.3f}: "
            f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p = {found['p_value']:.4f}, "
            f"{verdict} ({found['num_samples']} samples)"
        )
        if found["retention"] is not None:
            low, high = (value or float("nan") for value in found["retention_interval"])
            lines.append(f"  retained {found['retention']:.1%} [{low:.1%}, {high:.1%}]")
    lines.append(f"  identical answers {result['same_text']:.1%}")
    if result["not_compared"]:
        lines.append(f"  {result['not_compared']} answers are in one run only: left out")
    return "\n".join(lines)


def _name(side: dict[str, Any]) -> str:
    model = side["model"]
    return " ".join(str(model[key]) for key in ("name", "target", "dtype") if model.get(key))
