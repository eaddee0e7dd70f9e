"""The report of a run as one HTML file: figures, breakdowns, the worst answers with their pictures.

Self-contained: no script, no font, no address; pictures are inside as JPEG. It computes no figure
of its own. Its layout is ``report.html`` beside this file.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from medmo_edge.evaluation.case_scores import RULES
from medmo_edge.evaluation.cases import Case, load_frame
from medmo_edge.evaluation.evaluate import Run
from medmo_edge.evaluation.report_pictures import picture
from medmo_edge.evaluation.summary import METRICS, NAMES, Scored

WORST = 12  # answers shown
MAX_PICTURES = 6  # of one answer
BARS = 20
_TEXT = 400  # characters of a question or answer

MEANINGS = {
    "parse_rate": "part of the answers that could be understood without guessing",
    "num_errors": "questions that could not be asked; they count as wrong",
    "share_at_0.3": "part of the boxes found with IoU 0.3 or more, averaged over questions",
    "share_at_0.5": "part of the boxes found with IoU 0.5 or more, averaged over questions",
    "share_at_0.7": "part of the boxes found with IoU 0.7 or more, averaged over questions",
    "union_iou": "IoU of the areas that all boxes cover together",
    "count_error": "difference between the number of boxes said and true",
    "count_off_by": "difference between the number answered and the true one, where one was read",
    "precision_at_0.5": "part of the boxes said that are right (IoU 0.5)",
    "recall_at_0.5": "part of the true boxes that were found (IoU 0.5)",
    "f1_at_0.5": "harmonic mean of the two",
    "mean_iou_over_boxes": "mean IoU with every true box counting alike",
    "num_truth_boxes": "boxes in the labels",
    "num_said_boxes": "boxes in the answers",
    "num_rejected_boxes": "coordinates in answers that are no box inside the picture",
    "num_nothing_to_find": "questions about something that is not in the picture",
    "nothing_found_there": "part of those without any box in the answer",
    "token_f1": "overlap of the words, whatever their order",
    "finding_f1": "findings named in both texts, by rules, over all reports",
    "finding_f1_with_side": "the same, and on the same side",
    "findings_contradicted": "findings that one text claims and the other denies",
    "cider": "CIDEr: n-grams weighted by how rare they are; 0 to 10",
    "tokens_per_second": "of decoding, without image and prompt",
    "questions_per_second": "image and prompt included",
}


def render_report(run: Run) -> str:
    """The page. Errors: ImageError when a picture of a worst answer cannot be read again."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    result = run.result
    shown = [_answer(each) for each in worst_answers(run.scored, result["metric"])]
    valued = [each for each in run.scored if each.metric == result["metric"]]
    return template.render(
        title=run.questions.benchmark.name,
        describe=run.questions.benchmark.describe,
        model=_model_name(result["model"]),
        counts=_counts(result),
        created=datetime.now().strftime("%d %B %Y, %H:%M"),
        heads=list(_heads(result)),
        groups=list(_groups(result)),
        bars=_bars(valued) if result["metric"] != "accuracy" else [],
        bars_name=NAMES[result["metric"]],
        worst=shown,
        has_pictures=any(answer["pictures"] for answer in shown),
        has_boxes=result["metric"] == "mean_iou",
        figures=list(_figures(result)),
        method=_method(run),
        example=run.scored[0].case.question.strip("\n")[:2000],
        identity=list(_identity(run.identity)),
    )


def worst_answers(scored: Sequence[Scored], metric: str) -> list[Scored]:
    """Up to ``WORST`` answers that lost most, one per item; right ones are never shown."""
    lost = [
        each
        for each in scored
        if each.metric == metric and each.score.value is not None and each.score.value < 1
    ]
    chosen: dict[str, Scored] = {}
    for each in sorted(lost, key=lambda each: each.score.value or 0.0):
        chosen.setdefault(each.case.sample, each)
    return list(chosen.values())[:WORST]


def _model_name(model: dict[str, Any]) -> str:
    parts = [model.get(key) for key in ("name", "target", "dtype", "backend")]
    return " \u00b7 ".join(str(part) for part in parts if part)


def _counts(result: dict[str, Any]) -> str:
    text = f"{result['num_samples']} samples, {result['num_questions']} questions"
    published = result.get("num_published")
    if published and published != result["num_samples"]:
        text += f" (the published split has {published} samples)"
    if result.get("num_skipped"):
        text += f", {result['num_skipped']} broken samples left out"
    return text


def _heads(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in [result["metric"], *(each for each in METRICS if each != result["metric"])]:
        if name in result:
            prefix = "" if name == result["metric"] else f"{name}_"
            yield _row(
                name,
                result[name],
                result[f"{prefix}interval"],
                result[f"{prefix}baseline"],
            ) | {"base_answer": str(result[f"{prefix}baseline_answer"])[:80]}


def _row(name: str, value: Any, interval: Any, baseline: Any) -> dict[str, Any]:
    """One value with its bar; positions are per cent of the bar."""
    low, high = interval or (None, None)
    return {
        "name": NAMES[name],
        "value": _number(value),
        "low": _number(low),
        "high": _number(high),
        "base": _number(baseline),
        "at": _percent(value),
        "base_at": _percent(baseline),
        "band_left": _percent(low) or 0,
        "band_width": (_percent(high) or 0) - (_percent(low) or 0),
    }


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * min(1.0, max(0.0, value)), 2)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _groups(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, values in result["groups"].items():
        rows = [
            _row(
                found["metric"],
                found.get(found["metric"]),
                found.get("interval"),
                found.get("baseline"),
            )
            | {"label": label.replace("_", " "), "count": found["num_questions"]}
            for label, found in values.items()
        ]
        yield {"name": key.replace("_", " "), "rows": rows}


def _bars(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    counts = [0] * BARS
    for each in scored:
        if each.score.value is not None:
            counts[min(BARS - 1, int(each.score.value * BARS))] += 1
    top = max(counts) or 1
    return [{"count": count or "", "height": round(88 * count / top, 1)} for count in counts]


def _answer(scored: Scored) -> dict[str, Any]:
    case = scored.case
    error = scored.prediction.error
    return {
        "name": case.id,
        "value": f"{NAMES[scored.metric]} {scored.score.value:.2f}"
        if scored.metric != "accuracy"
        else "wrong",
        "question": _short(case.question.strip()),
        "gold": "" if case.boxes else _short(_gold(case)),
        "said": _short(f"(not asked: {error})" if error else scored.prediction.text or "(empty)"),
        "pictures": _pictures(scored),
    }


def _gold(case: Case) -> str:
    """A letter with the option it stands for."""
    at = ord(case.gold[:1] or "A") - ord("A")
    if len(case.gold) == 1 and 0 <= at < len(case.options):
        option = case.options[at]
        return option if option.startswith(case.gold) else f"{case.gold}. {option}"
    return case.gold


def _pictures(scored: Scored) -> list[str]:
    return [
        picture(
            load_frame(shown),
            [box for box in scored.case.boxes if box.image == number],
            [box for box in scored.score.boxes if box.image == number],
        )
        for number, shown in enumerate(scored.case.images[:MAX_PICTURES])
    ]


def _figures(result: dict[str, Any]) -> Iterator[dict[str, str]]:
    rows = {key: result[key] for key in ("parse_rate", "num_errors")}
    rows |= {key: value for key, value in result["figures"].items() if not isinstance(value, dict)}
    rows |= result["speed"]
    for name, value in rows.items():
        words = name.replace("_", " ").replace("num ", "number of ")
        yield {"name": words, "value": _number(value), "meaning": MEANINGS.get(name, "")}


def _method(run: Run) -> list[tuple[str, str]]:
    rules = dict.fromkeys(each.case.rule for each in run.scored)
    return [
        ("Scoring", " ".join(RULES[rule].describe for rule in rules)),
        (
            "Interval",
            "95 % percentile bootstrap, 2000 draws of whole samples: questions about one picture "
            "are not independent.",
        ),
        (
            "Baseline",
            "The best constant answer: the most frequent gold answer, the median box of each "
            "label, or the most frequent report.",
        ),
        ("Decoding", "Greedy. No judge model, no cloud service, no network."),
    ]


def _identity(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(item, dict):
            yield from _identity(item, f"{name} ")
        else:
            yield name, str(item)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT else f"{line[: _TEXT - 3]}..."
