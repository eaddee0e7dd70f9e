"""One run of one model on one benchmark: questions, answers, scores, figures, files.

The order is chosen for the user: whatever can be refused is refused before a model is loaded.
Printing is the command's business (``eval_command``), pages are the report's (``html_report``).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from medmo_edge.errors import MedmoError, SampleError, UsageError
from medmo_edge.evaluation.models import Model, open_model
from medmo_edge.evaluation.predictions import FILE, Progress, identity, predict, read_run
from medmo_edge.evaluation.questions import Questions, load_questions
from medmo_edge.evaluation.summary import Scored, clean, score_all, summarise

RESULT, SAMPLES, REPORT = "result.json", "samples.jsonl", "report.html"

#: scorers that are asked for by name and cannot be part of this package, and why
ELSEWHERE = {
    "judge": "is a language model behind a cloud service, which this package never contacts",
    "ratescore": "needs the weights RaTE-NER-Deberta and BioLORD-2023-C",
    "green": "needs the weights GREEN-radllama2-7b",
    "chexbert": "needs the CheXbert weights",
    "radgraph": "needs the RadGraph weights, which are behind a licence",
    "semb": "needs the CheXbert weights",
    "bertscore": "needs the weights of a language model",
    "meteor": "needs WordNet",
}

Scorer = Callable[[Sequence[str], Sequence[str]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """The command's options; see ``medmo-edge eval --help``."""

    model: str
    benchmark: str
    data: Path | None = None
    output: Path | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    skip_broken: bool = False
    scorers: tuple[str, ...] = ()
    backend: str = "auto"
    threads: int | None = None
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run: its identity, its questions with answers and scores, its figures."""

    identity: dict[str, Any]
    questions: Questions
    scored: list[Scored]
    result: dict[str, Any]


def evaluate(options: EvalOptions, progress: Progress | None = None) -> Run:
    """Ask, score and, with ``output``, write predictions, samples, result and report.

    Errors: UsageError, SampleError, and those of the model.
    """
    scorers = {name: load_scorer(name) for name in options.scorers}
    _check_output(options.output)
    questions = load_questions(
        options.benchmark, options.data, limit=options.limit, skip_broken=options.skip_broken
    )
    questions = _with_tokens(questions, options.max_new_tokens)
    with open_model(
        options.model,
        backend=options.backend,
        threads=options.threads,
        dtype=options.dtype,
        device=options.device,
    ) as model:
        run = identity(model, options.benchmark, questions.cases)
        path = options.output / FILE if options.output else None
        predictions = predict(model, questions.cases, run, path, progress)
        scored = score_all(questions.cases, predictions, model.coords)
        result = _result(model, questions, scored, scorers)
    finished = Run(identity=run, questions=questions, scored=scored, result=result)
    if options.output:
        write_run(options.output, finished)
    return finished


def _with_tokens(questions: Questions, tokens: int | None) -> Questions:
    """The same questions with another limit of new tokens."""
    if tokens is None:
        return questions
    cases = tuple(replace(case, max_new_tokens=tokens) for case in questions.cases)
    return replace(questions, cases=cases)


def _result(
    model: Model,
    questions: Questions,
    scored: Sequence[Scored],
    scorers: dict[str, Scorer],
) -> dict[str, Any]:
    row = questions.benchmark
    result = summarise(row.name, row.metric, scored)
    result["num_skipped"] = len(questions.broken)
    result["num_published"] = row.num_items
    result["model"] = {"name": model.name, **model.identity()}
    texts, golds = [e.prediction.text for e in scored], [e.case.gold for e in scored]
    for name, scorer in scorers.items():
        result["figures"][name] = clean(_run_scorer(name, scorer, texts, golds))
    return result


def load_scorer(name: str) -> Scorer:
    """A plug-in ``package.module:function(answers, references)``.

    It returns a number, a list of numbers (averaged) or a dict of numbers. Errors: UsageError, also
    for the well-known scorers that are not part of this package.
    """
    if name.lower() in ELSEWHERE:
        raise UsageError(
            f"scorer {name} {ELSEWHERE[name.lower()]}: wrap your own local copy and give it as "
            "--scorer package.module:function (docs/evaluation.md)"
        )
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(ELSEWHERE)
        raise UsageError(f"scorer {name!r} is not package.module:function (nor one of {known})")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"scorer {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UsageError(f"scorer {name!r} is not a function")
    scorer: Scorer = found
    return scorer


def _run_scorer(name: str, scorer: Scorer, texts: Sequence[str], golds: Sequence[str]) -> Any:
    try:
        value = scorer(texts, golds)
    except MedmoError:
        raise
    except Exception as error:  # foreign code can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"scorer {name} failed: {reason}") from error
    if isinstance(value, dict):
        return {str(key): float(item) for key, item in value.items()}
    try:
        values = [float(item) for item in value]
    except TypeError:
        return float(value)
    return sum(values) / len(values) if values else None


def _check_output(output: Path | None) -> None:
    """A new folder, or one that a run of ours has begun."""
    if output is None or not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output} is a file: name a new folder with -o")
    if any(output.iterdir()) and not (output / FILE).is_file():
        raise UsageError(f"{output} holds other files: name a new folder with -o")
    if (output / FILE).is_file():
        read_run(output / FILE)


def write_run(output: Path, run: Run) -> None:
    """Samples, result and report; the predictions are there already."""
    from medmo_edge.evaluation.html_report import render_report

    lines = "".join(f"{json.dumps(_sample(e), ensure_ascii=False)}\n" for e in run.scored)
    _replace(output / SAMPLES, lines)
    _replace(output / RESULT, json.dumps(run.result, indent=2, ensure_ascii=False) + "\n")
    _replace(output / REPORT, render_report(run))


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise SampleError(f"{path} cannot be written: {error.strerror}") from error


def _sample(scored: Scored) -> dict[str, Any]:
    """One line of samples.jsonl: what was asked, wanted, said, and how it was scored."""
    case, said, score = scored.case, scored.prediction, scored.score
    line: dict[str, Any] = clean(
        {
            "id": case.id,
            "sample": case.sample,
            "metric": scored.metric,
            "rule": case.rule,
            "images": [picture.name for picture in case.images],
            "question": case.question,
            "gold": case.gold,
            "truth_boxes": [box.to_dict() for box in case.boxes],
            "text": said.text,
            "read_as": score.said,
            "boxes": [box.to_dict() for box in score.boxes],
            "value": score.value,
            "read": score.read,
            "parts": dict(score.parts),
            "error": said.error,
        }
    )
    return line
