"""Which coordinate convention a model writes: its answers are read in all three and scored.

The model is asked once; the same text is read as norm1000, pixel_resized and pixel_original. A
convention is recommended only when it is better than the next one on the same items beyond chance,
and good enough to be more than noise. Pictures near 1000 pixels a side cannot tell: then this
refuses to guess. Nothing is changed: the convention belongs in the checkpoint's medmo_edge.json.
"""

from typing import Any

from medmo_edge.boxes import COORDS
from medmo_edge.errors import UsageError
from medmo_edge.evaluation.case_scores import RULES
from medmo_edge.evaluation.compare import Paired, paired
from medmo_edge.evaluation.evaluate import EvalOptions
from medmo_edge.evaluation.models import open_model
from medmo_edge.evaluation.predictions import Progress, identity, predict
from medmo_edge.evaluation.questions import load_questions
from medmo_edge.evaluation.summary import Scored, clean, score_all

MIN_IOU = 0.1  # a convention that finds less has not been understood
MIN_QUESTIONS = 8


def probe_coords(options: EvalOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Mean IoU under every convention and, when they separate, the one to use.

    Errors: UsageError when the benchmark has too few boxes to find, or when the conventions do not
    separate: nothing is guessed.
    """
    questions = load_questions(
        options.benchmark, options.data, limit=options.limit, skip_broken=options.skip_broken
    )
    located = RULES["boxes"].metric
    cases = [c for c in questions.cases if RULES[c.rule].metric == located and c.boxes]
    if len(cases) < MIN_QUESTIONS:
        raise UsageError(
            f"{options.benchmark} has {len(cases)} questions with boxes to find: --probe-coords "
            f"needs {MIN_QUESTIONS} or more"
        )
    with open_model(
        options.model,
        backend=options.backend,
        threads=options.threads,
        dtype=options.dtype,
        device=options.device,
    ) as model:
        predictions = predict(
            model, cases, identity(model, options.benchmark, cases), progress=progress
        )
        said = {coords: score_all(cases, predictions, coords) for coords in COORDS}
        return _judge(options, model.name, model.coords, said)


def _judge(
    options: EvalOptions, name: str, declared: str, scored: dict[Any, list[Scored]]
) -> dict[str, Any]:
    values = {coords: [e.score.value or 0.0 for e in found] for coords, found in scored.items()}
    means = {coords: sum(found) / len(found) for coords, found in values.items()}
    best, second, _ = sorted(means, key=lambda coords: means[coords], reverse=True)
    samples = [each.case.sample for each in scored[best]]
    margin = paired(values[second], values[best], samples)
    figures = ", ".join(f"{coords} {mean:.3f}" for coords, mean in means.items())
    if means[best] < MIN_IOU:
        raise UsageError(
            f"{name} finds too little under every convention to tell them apart (mean IoU "
            f"{figures}; at least {MIN_IOU} is needed): use pictures like those it was trained on"
        )
    if not (margin.significant and margin.interval[0] > 0):
        raise UsageError(
            f"the conventions do not separate on {options.benchmark} (mean IoU {figures}): use "
            "more pictures, with sides far from 1000 pixels and unlike the resized ones"
        )
    return _result(options, declared, scored, means, best, second, margin)


def _result(
    options: EvalOptions,
    declared: str,
    scored: dict[Any, list[Scored]],
    means: dict[Any, float],
    best: str,
    second: str,
    margin: Paired,
) -> dict[str, Any]:
    result: dict[str, Any] = clean(
        {
            "benchmark": options.benchmark,
            "num_samples": margin.num_samples,
            "num_questions": margin.num_questions,
            "mean_iou": means,
            "parse_rate": {
                coords: sum(each.score.read for each in found) / len(found)
                for coords, found in scored.items()
            },
            "recommended": best,
            "second": second,
            "margin": margin.difference,
            "interval": list(margin.interval),
            "p_value": margin.p_value,
            "declared": declared,
            "agrees": best == declared,
        }
    )
    return result


def format_probe(result: dict[str, Any]) -> str:
    """The probe for a terminal."""
    low, high = result["interval"]
    lines = [
        f"{coords}: mean IoU {mean:.3f}, readable {result['parse_rate'][coords]:.3f}"
        for coords, mean in result["mean_iou"].items()
    ]
    lines.append(
        f"recommended: {result['recommended']}, by {result['margin']:.3f} [{low:.3f}, {high:.3f}] "
        f"over {result['second']} ({result['num_samples']} samples)"
    )
    if not result["agrees"]:
        lines.append(
            f"the model declares {result['declared']}: set coords in the checkpoint's "
            "medmo_edge.json and export again"
        )
    return "\n".join(lines)
