"""The stages of a verification: figures of all cases against the gates, in the order of the road.

A stage passes, fails, or is undecided: nothing failed, but too little was seen to say more. An
undecided stage never passes an artifact. The first stage that fails says where to look, because
everything after it gets wrong inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from medmo_edge.evaluation.gaps import Gap
from medmo_edge.evaluation.gates import Gates, Losses
from medmo_edge.evaluation.measure import Record
from medmo_edge.evaluation.retention import pictures_needed, retention
from medmo_edge.evaluation.truth import Kind
from medmo_edge.evaluation.verify_cases import PROBE

Verdict = Literal["pass", "fail", "undecided"]
#: (figure, limit): a figure that must not be above, or below, its limit
Limits = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGap:
    """One stored tensor fitted to its checkpoint's: stored = ``scale`` * original, and what is left
    of it: ``error`` = |stored - original| / |original|.
    """

    name: str
    stored_as: str
    scale: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage's verdict, figures and limits; ``note`` says what people should know."""

    name: str
    verdict: Verdict
    figures: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything that stages are judged by; ``weights`` is None when they cannot be compared.

    ``base_target``: the unquantised target whose gap to transformers is the runtime's.
    ``quantised_tower``: whether the vision tower is stored in fewer than 16 bits.
    """

    records: Sequence[Record]
    weights: Sequence[WeightGap] | None
    same_tokenizer: bool
    target: str
    base_target: str
    quantised_tower: bool = False


def judge(measured: Measured, gates: Gates) -> list[Stage]:
    """Every stage in the order of the road. Errors: UsageError when a target has no gates."""
    own, base = gates.losses(measured.target), gates.losses(measured.base_target)
    asked = [record for record in measured.records if record.task != PROBE]
    runtime = [record.runtime for record in measured.records]
    quantised = [each.quantisation for each in measured.records if each.quantisation is not None]
    stages = [
        _weights(measured, gates, own),
        _tokenizer(measured),
        _preprocessing(measured.records, gates),
        _vision(
            [record.whole for record in measured.records],
            gates.vision(quantised=measured.quantised_tower),
        ),
        _logits("prefill", runtime, base, "runtime gap, first token of the answer"),
        _logits("answer", runtime, base, "runtime gap, along the reference's answer"),
    ]
    if quantised:
        stages.append(_logits("quantisation", quantised, own, "quantisation gap, same tokens"))
    return [
        *stages,
        _agreement(asked, gates, own),
        _boxes(asked, gates),
        _retained("answers", asked, own.min_answers_retained),
        _retained("boxes", asked, own.min_iou_retained),
    ]


def overall(stages: Iterable[Stage]) -> Verdict:
    """The verdict over all stages: the worst of them."""
    verdicts = {stage.verdict for stage in stages}
    return "fail" if "fail" in verdicts else "undecided" if "undecided" in verdicts else "pass"


def first_failure(stages: Iterable[Stage]) -> str | None:
    """Name of the first stage that failed."""
    return next((stage.name for stage in stages if stage.verdict == "fail"), None)


def _stage(
    name: str,
    most: Limits,
    least: Limits | None = None,
    note: str = "",
    more: Mapping[str, Any] | None = None,
) -> Stage:
    """A stage that passes when every figure keeps its limit."""
    least = least or {}
    broken = [key for key, (value, limit) in most.items() if not value <= limit]
    broken += [key for key, (value, limit) in least.items() if not value >= limit]
    limits = {f"max {key}": limit for key, (_, limit) in most.items()}
    limits |= {f"min {key}": limit for key, (_, limit) in least.items()}
    figures = {key: value for key, (value, _) in {**most, **least}.items()}
    if broken:
        note = f"{', '.join(broken)} beyond the limit" + (f"; {note}" if note else "")
    return Stage(
        name=name,
        verdict="fail" if broken else "pass",
        figures=figures | dict(more or {}),
        limits=limits,
        note=note,
    )


def _not_measured(name: str, why: str) -> Stage:
    return Stage(name=name, verdict="undecided", figures={}, note=f"not measured: {why}")


def _weights(measured: Measured, gates: Gates, own: Losses) -> Stage:
    if measured.weights is None:
        note = "not compared: the artifact does not say which scales were folded into its weights"
        return Stage(name="weights", verdict="pass", figures={}, note=note)
    tensors = measured.weights
    by_scale = max(tensors, key=lambda each: abs(each.scale - 1))
    by_error = max(tensors, key=lambda each: each.error)
    return _stage(
        "weights",
        {
            "scale_error": (abs(by_scale.scale - 1), gates.limits["weights"]["max_scale_error"]),
            "error": (by_error.error, own.max_weight_error),
        },
        more={"tensors": len(tensors), "scale_of": by_scale.name, "error_of": by_error.name},
    )


def _tokenizer(measured: Measured) -> Stage:
    different = sum(not record.prompt_equal for record in measured.records)
    return _stage(
        "tokenizer",
        {
            "different_prompts": (different, 0),
            "different_files": (int(not measured.same_tokenizer), 0),
        },
        more={"prompts": len(measured.records)},
    )


def _preprocessing(records: Sequence[Record], gates: Gates) -> Stage:
    if not any(record.whole.features for record in records):
        return _not_measured("preprocessing", "no sample has an image")
    limit = gates.limits["preprocessing"]["max_difference"]
    return _stage(
        "preprocessing", {"max_difference": (max(record.patches for record in records), limit)}
    )


def _vision(gaps: Sequence[Gap], limits: Mapping[str, float]) -> Stage:
    seen = [gap.features for gap in gaps if gap.features]
    if not seen:
        return _not_measured("vision", "no sample has an image")
    most: dict[str, tuple[float, float]] = {}
    least: dict[str, tuple[float, float]] = {}
    for level, found in enumerate(zip(*seen, strict=True)):
        name = f"deepstack_{level}" if level else "main"
        # Of the worst picture: a fault that only some shapes show must not drown in the others.
        cosine = min(gap.mean_cosine for gap in found)
        error = max(gap.mean_error for gap in found)
        least[f"{name}_mean_cosine"] = cosine, limits["min_mean_cosine"]
        worst = min(gap.worst_cosine for gap in found)
        least[f"{name}_worst_cosine"] = worst, limits["min_worst_cosine"]
        most[f"{name}_mean_error"] = error, limits["max_mean_error"]
        worst = max(gap.worst_error for gap in found)
        most[f"{name}_worst_error"] = worst, limits["max_worst_error"]
    return _stage("vision", most, least)


def _logits(name: str, gaps: Sequence[Gap], losses: Losses, note: str) -> Stage:
    found = [gap.prefill if name == "prefill" else gap.answer for gap in gaps]
    if not found:
        return _not_measured(name, "there is no sample")
    difference = max(each.max_difference for each in found)
    return _stage(
        name,
        {
            "mean_kl": (float(np.mean([each.mean_kl for each in found])), losses.max_mean_kl),
            "max_difference": (difference, losses.max_difference),
        },
        {"top1": (float(np.mean([each.top1 for each in found])), losses.min_top1)},
        note,
        {"max_kl": max(each.max_kl for each in found)},
    )


def _agreement(records: Sequence[Record], gates: Gates, own: Losses) -> Stage:
    """Same words, where the reference itself was decided."""
    complete = [record for record in records if record.complete]
    same = [record for record in complete if record.whole.first_difference is None]
    unstable = [
        record
        for record in complete
        if record.whole.margin is not None and record.whole.margin < own.stable_margin
    ]
    stable = len(complete) - len(unstable)
    more = {
        "same": len(same),
        "answers": len(records),
        "not_stable": len(unstable),
        "followed_to_the_end": len(complete),
        "stable_margin": own.stable_margin,
    }
    needed = gates.limits["samples"]["min_stable_answers"]
    share = len(same) / stable if stable else 0.0
    stage = _stage("agreement", {}, {"agreement": (share, own.min_agreement)}, more=more)
    if stable >= needed:
        return stage
    note = f"not enough samples: {stable} stable answers, {needed:g} needed"
    return Stage(
        name="agreement",
        verdict="undecided",
        figures=stage.figures,
        limits=stage.limits,
        note=note,
    )


def _boxes(records: Sequence[Record], gates: Gates) -> Stage:
    limits = gates.limits["boxes"]
    same = [each.same_text_iou for each in records if each.same_text_iou is not None]
    between = [each.whole.box_iou for each in records if each.whole.box_iou is not None]
    readable = [each.rejected[1] == 0 for each in records if each.rejected[0] == 0]
    valid = float(np.mean(readable)) if readable else 1.0
    more: dict[str, float] = {"answers_with_boxes": len(between), "read_from_same_text": len(same)}
    if between:
        more["mean_iou_between"] = float(np.mean(between))
    if not same and valid >= limits["min_valid"]:
        note = "not measured: no answer of the reference has a box"
        return Stage(name="boxes", verdict="undecided", figures=more, note=note)
    least = {"valid": (valid, limits["min_valid"])}
    if same:
        least["same_text_iou"] = min(same), limits["min_same_text_iou"]
    return _stage("boxes", {}, least, more=more)


def _retained(kind: Kind, records: Sequence[Record], threshold: float) -> Stage:
    """Passes when the lower end of the interval reaches the threshold, not the figure alone."""
    name = "answers retained" if kind == "answers" else "IoU retained"
    kept = retention(records, kind)
    if kept is None:
        why = "no sample has such a label, or the reference scores nothing"
        return _not_measured(name, why)
    verdict: Verdict = "pass"
    note = "lower end of the 95 % interval counts"
    if kept.interval[1] < threshold:
        verdict, note = "fail", "the whole 95 % interval is below the limit"
    elif kept.interval[0] < threshold:
        needed = pictures_needed(records, kind, threshold)
        about = f"about {needed} pictures like these" if needed else "very many more pictures"
        verdict, note = "undecided", f"not enough samples to certify: {about} needed"
    figures = {
        "retained": kept.value,
        "low": kept.interval[0],
        "high": kept.interval[1],
        "reference": kept.reference,
        "artifact": kept.artifact,
        "pictures": kept.pictures,
        "questions": kept.questions,
    }
    return Stage(
        name=name, verdict=verdict, figures=figures, limits={"min low": threshold}, note=note
    )
