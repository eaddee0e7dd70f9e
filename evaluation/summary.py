"""From the scores of single answers to the figures of a run, with intervals and baselines.

Intervals are 95 % bootstrap intervals that draw whole items (pictures, exam questions), since the
questions about one picture are not independent. The baseline is the best constant answer: the most
frequent gold answer, the median box of each label, or the most frequent report. nan becomes None.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import pairwise_iou
from medmo_edge.evaluation.case_scores import RULES, Said, Score, score_case
from medmo_edge.evaluation.cases import Case
from medmo_edge.evaluation.findings import Agreement, finding_f1
from medmo_edge.evaluation.predictions import Prediction
from medmo_edge.evaluation.scores import bootstrap
from medmo_edge.evaluation.text_scores import cider, rouge_l

#: headline metrics and their names for people
NAMES = {"accuracy": "accuracy", "mean_iou": "mean IoU", "rouge_l": "ROUGE-L"}
METRICS = tuple(NAMES)
_AVERAGED = (
    "token_precision",
    "token_recall",
    "token_f1",
    "open_bleu_1",
    "open_rouge_l",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_1",
    "rouge_2",
    "share_at_0.3",
    "share_at_0.5",
    "share_at_0.7",
    "union_iou",
    "count_error",
    "count_off_by",
)


@dataclass(frozen=True, slots=True)
class Scored:
    """One question with its answer and score."""

    case: Case
    prediction: Prediction
    score: Score

    @property
    def metric(self) -> str:
        """The headline metric of its rule."""
        return RULES[self.case.rule].metric


def score_all(
    cases: Sequence[Case], predictions: Sequence[Prediction], coords: Any = "norm1000"
) -> list[Scored]:
    """Every answer with its score; ``coords`` is how the model writes boxes."""
    return [
        Scored(case, said, score_case(case, Said(said.text, said.geometries, coords)))
        for case, said in zip(cases, predictions, strict=True)
    ]


def summarise(benchmark: str, metric: str, scored: Sequence[Scored]) -> dict[str, Any]:
    """The figures of a run: counts, the headline with interval and baseline, the rest, groups.

    ``metric`` is the headline when some question has it, else the first metric that one has.
    """
    present = [name for name in METRICS if any(each.metric == name for each in scored)]
    headline = metric if metric in present else present[0]
    result: dict[str, Any] = {
        "benchmark": benchmark,
        "metric": headline,
        "num_samples": len({each.case.sample for each in scored}),
        "num_questions": len(scored),
        "num_errors": sum(each.prediction.error is not None for each in scored),
        "parse_rate": _mean([float(each.score.read) for each in scored]),
    }
    result |= _metric(headline, scored)
    for name in present:
        if name != headline:
            values = _metric(name, scored)
            result |= {key if key == name else f"{name}_{key}": v for key, v in values.items()}
    result["figures"] = _figures(scored)
    result["groups"] = _groups(headline, scored)
    result["speed"] = _speed(scored)
    summary: dict[str, Any] = clean(result)
    return summary


def clean(value: Any) -> Any:
    """Numbers as JSON can hold them: no nan, no numpy types, six digits."""
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _metric(name: str, scored: Sequence[Scored]) -> dict[str, Any]:
    mine = [each for each in scored if each.metric == name]
    valued = [each for each in mine if each.score.value is not None]
    values = [float(each.score.value or 0.0) for each in valued]
    baseline, answer = _BASELINES[name](valued)
    return {
        name: _mean(values),
        "interval": list(interval(values, [each.case.sample for each in valued])),
        "baseline": baseline,
        "baseline_answer": answer,
    }


def interval(values: Sequence[float], samples: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``values`` when whole ``samples`` are drawn."""
    if not values:
        return math.nan, math.nan
    sums, sizes = by_sample(values, samples)
    return bootstrap(lambda drawn: float(sums[drawn].sum() / sizes[drawn].sum()), len(sums))


def by_sample(
    values: Sequence[float], samples: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of ``values`` of each sample, in the order of first appearance."""
    index = {name: at for at, name in enumerate(dict.fromkeys(samples))}
    where = [index[name] for name in samples]
    sums = np.bincount(where, weights=values, minlength=len(index)).astype(np.float64)
    return sums, np.bincount(where, minlength=len(index)).astype(np.float64)


Baseline = Callable[[Sequence[Scored]], tuple[float, str]]


def _constant_answer(scored: Sequence[Scored]) -> tuple[float, str]:
    """One answer for all; where a benchmark repeats questions, one for each of them."""
    golds: dict[str, Counter[str]] = {}
    for each in scored:
        question = each.case.groups.get("question", "")
        golds.setdefault(question, Counter())[each.case.gold.strip().lower()] += 1
    common = [counts.most_common(1)[0] for counts in golds.values()]
    answer = common[0][0] if len(common) == 1 else "the most frequent answer to each question"
    return sum(times for _, times in common) / len(scored), answer


def _constant_report(scored: Sequence[Scored]) -> tuple[float, str]:
    golds = Counter(each.case.gold for each in scored)
    answer = golds.most_common(1)[0][0]
    return _mean([rouge_l(answer, each.case.gold) for each in scored]), answer[:200]


def _constant_box(scored: Sequence[Scored]) -> tuple[float, str]:
    """The median box of each label, in parts of the picture, said once for every question."""
    groups: dict[str, list[Scored]] = {}
    for each in scored:
        groups.setdefault(each.case.boxes[0].label, []).append(each)
    values: list[float] = []
    for members in groups.values():
        relative = [_relative(each) for each in members]
        median = np.median(np.concatenate(relative), axis=0)
        values += [float(pairwise_iou(rows, [median]).max()) / len(rows) for rows in relative]
    return _mean(values), "the median box of each label"


def _relative(scored: Scored) -> NDArray[np.float64]:
    rows = []
    for box in scored.case.boxes:
        size = scored.prediction.geometries[box.image]
        rows.append(np.array(box.xyxy) / [size.width, size.height, size.width, size.height])
    return np.array(rows)


_BASELINES: dict[str, Baseline] = {
    "accuracy": _constant_answer,
    "mean_iou": _constant_box,
    "rouge_l": _constant_report,
}


def _figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """Everything beside the headline, over the questions that have it."""
    figures: dict[str, Any] = {}
    for name in _AVERAGED:
        values = [each.score.parts[name] for each in scored if name in each.score.parts]
        if values:
            figures[name] = _mean(values)
    if any(each.case.rule == "boxes" for each in scored):
        figures |= _detection([each for each in scored if each.case.rule == "boxes"])
    if any(each.case.rule == "report" for each in scored):
        figures |= _reports([each for each in scored if each.case.rule == "report"])
    return figures


def _detection(scored: Sequence[Scored]) -> dict[str, Any]:
    """Precision, recall and F1 at IoU 0.5 over all boxes; what was said where nothing is."""
    total = {
        name: sum(each.score.parts[name] for each in scored)
        for name in ("truth_boxes", "said_boxes", "hits", "sum_iou", "rejected_boxes")
    }
    precision, recall = (
        _ratio(total["hits"], total[name]) for name in ("said_boxes", "truth_boxes")
    )
    empty = [each for each in scored if not each.case.boxes]
    return {
        "precision_at_0.5": precision,
        "recall_at_0.5": recall,
        "f1_at_0.5": _ratio(2 * total["hits"], total["said_boxes"] + total["truth_boxes"]),
        "mean_iou_over_boxes": _ratio(total["sum_iou"], total["truth_boxes"]),
        "num_truth_boxes": int(total["truth_boxes"]),
        "num_said_boxes": int(total["said_boxes"]),
        "num_rejected_boxes": int(total["rejected_boxes"]),
        "num_nothing_to_find": len(empty),
        "nothing_found_there": _mean([float(not e.score.parts["said_boxes"]) for e in empty]),
    }


def _reports(scored: Sequence[Scored]) -> dict[str, Any]:
    texts, golds = [e.score.said for e in scored], [e.case.gold for e in scored]
    found = [
        Agreement(
            **{
                name: int(each.score.parts[f"findings_{name}"])
                for name in ("shared", "sided", "missed", "invented", "contradicted")
            }
        )
        for each in scored
    ]
    return {
        "cider": _mean(cider(texts, golds)),
        "finding_f1": finding_f1(found),
        "finding_f1_with_side": finding_f1(found, sided=True),
        "findings_contradicted": sum(each.contradicted for each in found),
    }


def _groups(headline: str, scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """Per breakdown and value: the metric of the questions that have one, interval and baseline."""
    members: dict[str, dict[str, list[Scored]]] = {}
    for each in scored:
        for key, value in each.case.groups.items():
            members.setdefault(key, {}).setdefault(value, []).append(each)
    return {
        key: {value: _group(headline, found) for value, found in sorted(values.items())}
        for key, values in members.items()
    }


def _group(headline: str, scored: Sequence[Scored]) -> dict[str, Any]:
    metrics = {each.metric for each in scored}
    name = headline if headline in metrics else scored[0].metric
    values = [each for each in scored if each.metric == name and each.score.value is not None]
    figures: dict[str, Any] = {"num_questions": len(values), "metric": name}
    figures |= _metric(name, scored) if values else {name: None}
    if all(each.case.rule == "boxes" for each in scored):
        figures |= _detection(scored)
    return figures


def _speed(scored: Sequence[Scored]) -> dict[str, Any]:
    seconds = sum(each.prediction.seconds for each in scored)
    decode = sum(each.prediction.decode_seconds for each in scored)
    tokens = sum(each.prediction.new_tokens for each in scored)
    return {
        "seconds": seconds,
        "new_tokens": tokens,
        "tokens_per_second": _ratio(tokens, decode) if decode else None,
        "questions_per_second": _ratio(len(scored), seconds),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
