"""The on-site self-test: replay an artifact's golden cases where it is installed.

Needs neither checkpoint nor torch nor network and takes seconds. It finds a damaged or mixed-up
installation, a driver or library that computes something else, and an export that was wrong from
the beginning as far as a few cases show it; accuracy is not measured here (``medmo-edge verify
--against``).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.boxes import XYXY, iou
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.runtime.certified import device_class
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.golden import Golden, GoldenCase, Values, read_golden, values_of
from medmo_edge.runtime.observe import Observer
from medmo_edge.runtime.session import Session, load
from medmo_edge.tokenizer import tokenizer_sha256

Limits = dict[str, float]
_FAR = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One stage over all cases; ``case`` is where the worst figure was."""

    name: str
    passed: bool
    figures: dict[str, float]
    limits: Limits
    case: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """The result; ``source`` says where the expected values come from."""

    passed: bool
    checks: list[Check]
    cases: int
    backend: str
    device: str
    device_class: str
    source: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replay:
    """What came out for one case here."""

    case: GoldenCase
    same_prompt: bool
    patches: list[float]
    values: Values
    boxes: list[XYXY]
    answer: str


def self_test(
    artifact: str | Path, backend: str = "auto", *, threads: int | None = None
) -> SelfTest:
    """Load the artifact as an application would and replay every golden case.

    Errors: ArtifactError without golden cases; as ``load`` and ``Study.ask``.
    """
    start = time.perf_counter()
    with load(artifact, backend, threads=threads) as session:
        golden = read_golden(session.manifest)
        replays = [_replay(session, case) for case in golden.cases]
        here = device_class(probe(), session.backend.device)
        checks = judge(session.manifest, golden, replays, session.backend.name, here)
        return SelfTest(
            passed=all(check.passed for check in checks),
            checks=checks,
            cases=len(replays),
            backend=session.backend.name,
            device=session.backend.device,
            device_class=here,
            source=golden.source,
            seconds=round(time.perf_counter() - start, 2),
        )


def _replay(session: Session, case: GoldenCase) -> _Replay:
    observer, frames = Observer(session), [case.frame()]
    try:
        seen = observer.look(frames)
        asked = observer.ask(frames, case.question, len(case.tokens))
        features = _as_expected(seen.features[0], case)
        nothing = Values(features=[], top=[], chosen=[])
        return _Replay(
            case=case,
            same_prompt=list(asked.prompt_ids) == case.prompt_ids,
            patches=_sampled(seen.patches[0], case.patch_places),
            values=nothing if features is None else values_of(case, observer, features, asked),
            boxes=[box.xyxy for box in observer.read_boxes(frames, case.box_text)],
            answer=asked.answer.text,
        )
    finally:
        observer.close()


def _as_expected(features: Any, case: GoldenCase) -> Any:
    """The features, None when they are too few for the places that were sampled."""
    fits = features.shape[0] > max(case.rows) and features.shape[1] > max(case.columns)
    return features if fits else None


def _sampled(patches: Any, places: Sequence[int]) -> list[float]:
    flat = patches.reshape(-1)
    return [float(flat[place]) if place < flat.size else _FAR for place in places]


def judge(
    manifest: Manifest, golden: Golden, replays: Sequence[_Replay], backend: str, here: str
) -> list[Check]:
    """Every stage; values as exported are compared only on the same backend and kind of device."""
    checks = [
        _tokenizer(manifest, golden, replays),
        _preprocessing(manifest, golden, replays),
        _vision("vision", replays, golden, golden.limits["truth"], exported=False),
        _answers("answer", replays, golden.limits["truth"], exported=False),
        _boxes(replays),
    ]
    made = golden.source.get("exported")
    if made and made.get("backend") == backend and made.get("device_class") == here:
        tight = golden.limits["exported"]
        checks.append(_vision("vision as exported", replays, golden, tight, exported=True))
        checks.append(_answers("answer as exported", replays, tight, exported=True))
    return checks


def _check(name: str, figures: dict[str, float], limits: Limits, case: str = "") -> Check:
    """``limits`` are largest values; a figure without one is only reported."""
    passed = all(figures[key] <= limit for key, limit in limits.items())
    return Check(name=name, passed=passed, figures=figures, limits=limits, case=case)


def _tokenizer(manifest: Manifest, golden: Golden, replays: Sequence[_Replay]) -> Check:
    other = tokenizer_sha256(manifest.path_of("tokenizer")) != golden.tokenizer_sha256
    different = [each for each in replays if not each.same_prompt]
    return _check(
        "tokenizer",
        {"different_file": float(other), "different_prompts": float(len(different))},
        {"different_file": 0.0, "different_prompts": 0.0},
        different[0].case.name if different else "",
    )


def _preprocessing(manifest: Manifest, golden: Golden, replays: Sequence[_Replay]) -> Check:
    settings = Preprocessing.from_dict(manifest.preprocessing).sha256
    gaps = {each.case.name: _largest(each.patches, each.case.patches) for each in replays}
    worst = max(gaps, key=lambda name: gaps[name])
    figures = {
        "different_settings": float(settings != golden.preprocessing_sha256),
        "max_difference": gaps[worst],
    }
    limits = {"different_settings": 0.0, "max_difference": golden.limits["any"]["max_patch"]}
    return _check("preprocessing", figures, limits, worst)


def _vision(
    name: str, replays: Sequence[_Replay], golden: Golden, limits: Limits, *, exported: bool
) -> Check:
    """|a - b| / |b| per sampled token and level; the worst level counts."""
    means: dict[str, float] = {}
    worsts: dict[str, float] = {}
    for each in replays:
        expected = each.case.exported if exported else each.case.truth
        if expected is None:
            continue
        errors = _level_errors(each.values.features, expected.features, 1 + golden.levels)
        means[each.case.name] = float(errors.mean(axis=0).max())
        worsts[each.case.name] = float(errors.max())
    worst = max(means, key=lambda case: means[case], default="")
    figures = {
        "mean_error": means.get(worst, _FAR),
        "worst_error": max(worsts.values(), default=_FAR),
    }
    wanted = {
        "mean_error": limits["max_mean_error"],
        "worst_error": limits["max_worst_error"],
    }
    return _check(name, figures, wanted, worst)


def _level_errors(found: Sequence[Any], expected: Sequence[Any], levels: int) -> Any:
    """Errors [tokens, levels]."""
    b = np.asarray(expected, np.float64).reshape(len(expected), levels, -1)
    if len(found) != len(expected):
        return np.full((len(expected), levels), _FAR)
    a = np.asarray(found, np.float64).reshape(b.shape)
    gaps = np.linalg.norm(a - b, axis=2) / np.maximum(np.linalg.norm(b, axis=2), 1e-12)
    return np.where(np.isfinite(gaps), gaps, _FAR)


def _answers(name: str, replays: Sequence[_Replay], limits: Limits, *, exported: bool) -> Check:
    """Log-probabilities: of the likely first tokens, and along the stored answer."""
    first: dict[str, float] = {}
    later: dict[str, float] = {}
    for each in replays:
        expected = each.case.exported if exported else each.case.truth
        if expected is None:
            continue
        first[each.case.name] = _largest(each.values.top, expected.top)
        later[each.case.name] = _largest(each.values.chosen, expected.chosen)
    worst = max(later, key=lambda case: later[case], default="")
    figures = {
        "first_tokens": max(first.values(), default=_FAR),
        "max_difference": later.get(worst, _FAR),
    }
    wanted = {key: limits["max_difference"] for key in figures}
    if exported:
        changed = sum(each.answer != each.case.answer for each in replays)
        figures["different_answers"] = float(changed)
    return _check(name, figures, wanted, worst)


def _boxes(replays: Sequence[_Replay]) -> Check:
    """The stored text must be read as the stored boxes: convention, source size, resized size."""
    overlaps = {each.case.name: _overlap(each.boxes, each.case.boxes) for each in replays}
    worst = min(overlaps, key=lambda name: overlaps[name])
    return _check("boxes", {"lost_iou": 1 - overlaps[worst]}, {"lost_iou": 0.001}, worst)


def _overlap(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    if len(found) != len(expected):
        return 0.0
    return min(iou(a, b) for a, b in zip(found, expected, strict=True))


def _largest(found: Sequence[float], expected: Sequence[float]) -> float:
    if len(found) != len(expected):
        return _FAR
    gap = float(np.abs(np.asarray(found) - np.asarray(expected)).max(initial=0))
    return gap if np.isfinite(gap) else _FAR


def format_self_test(found: SelfTest) -> str:
    """For people: one line per stage, what the values come from, then PASS or FAIL."""
    width = max(len(check.name) for check in found.checks)
    lines = []
    for check in found.checks:
        figures = ", ".join(
            f"{name} {value:.3g} (limit {check.limits[name]:.3g})"
            if name in check.limits
            else f"{name} {value:.3g}"
            for name, value in check.figures.items()
        )
        where = f" [{check.case}]" if check.case and not check.passed else ""
        lines.append(
            f"{check.name:<{width}}  {'pass' if check.passed else 'FAIL'}  {figures}{where}"
        )
    failed = next((check.name for check in found.checks if not check.passed), None)
    lines.append(f"expected values: {found.source['truth']}")
    lines.append(f"device: {found.backend}, {found.device}")
    verdict = "PASS" if found.passed else f"FAIL, first at stage {failed}"
    lines.append(f"{verdict} ({found.cases} golden cases, {found.seconds:.1f} s)")
    return "\n".join(lines)
