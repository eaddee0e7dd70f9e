"""Ask a model all questions of a benchmark; keep every answer on disk, and go on where it stopped.

The file is JSON lines: the run's identity first, then one answer a line, flushed as it comes. A run
is the same run only with the same model, benchmark, questions and package version. Nothing is
scored here; the answers hold what scoring needs (text and picture sizes), so rules can be applied
again without asking.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from medmo_edge import __version__
from medmo_edge.boxes import Geometry
from medmo_edge.errors import GenerationError, PromptError, SampleError
from medmo_edge.evaluation.cases import Case, Shown, convert_boxes, load_frame
from medmo_edge.evaluation.items import Embedded
from medmo_edge.evaluation.models import Model, ModelAnswer, Request, geometry_of
from medmo_edge.images import Frame

FILE = "predictions.jsonl"
CHUNK = 96  # questions handed to the model at once
CHUNK_PIXELS = 64 << 20  # and the pixels of their pictures

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One answer; ``error`` says why there is none (its text is then empty)."""

    id: str
    text: str
    geometries: tuple[Geometry, ...]
    seconds: float
    decode_seconds: float
    new_tokens: int
    prompt_tokens: int
    finish_reason: str
    error: str | None = None


def identity(model: Model, benchmark: str, cases: Sequence[Case]) -> dict[str, Any]:
    """What two runs must share to be one."""
    return {
        "medmo_edge": __version__,
        "benchmark": benchmark,
        "model": model.identity(),
        "num_questions": len(cases),
        "questions_sha256": _digest(cases),
    }


def _digest(cases: Sequence[Case]) -> str:
    """Hash of everything asked and wanted; pictures count by name and size."""
    digest = hashlib.sha256()
    for case in cases:
        pictures = [(picture.name, _size(picture)) for picture in case.images]
        wanted = (case.gold, case.golds, case.options, [asdict(box) for box in case.boxes])
        asked = (case.id, case.question, case.rule, case.max_new_tokens, case.image_texts)
        digest.update(json.dumps([asked, wanted, pictures]).encode())
    return digest.hexdigest()


def _size(picture: Shown) -> int:
    if isinstance(picture, Embedded):
        return len(picture.data)
    return picture.stat().st_size if isinstance(picture, Path) else 0


def predict(
    model: Model,
    cases: Sequence[Case],
    run: dict[str, Any],
    path: Path | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """An answer for every case, in their order; those already in ``path`` are not asked again.

    Errors: SampleError when ``path`` belongs to another run or two cases share an id; ImageError
    for a picture that cannot be read.
    """
    if len({case.id for case in cases}) != len(cases):
        raise SampleError(f"{run['benchmark']}: two questions have the same id: ids are unique")
    known = read_predictions(path, run) if path is not None and path.exists() else {}
    report = progress or (lambda done, total: None)
    report(len(known), len(cases))
    file = _open(path, run) if path is not None else None
    try:
        for chunk in _chunks([case for case in cases if case.id not in known]):
            for prediction in _ask(model, chunk):
                known[prediction.id] = prediction
                if file is not None:
                    file.write(_line(prediction))
                    file.flush()
                report(len(known), len(cases))
    except KeyboardInterrupt as stop:
        kept = "the same command goes on from there" if file else "with -o they would be kept"
        raise KeyboardInterrupt(
            f"stopped after {len(known)} of {len(cases)} answers: {kept}"
        ) from stop
    finally:
        if file is not None:
            file.close()
    return [known[case.id] for case in cases]


def read_predictions(path: Path, run: dict[str, Any] | None = None) -> dict[str, Prediction]:
    """The answers of a file by id; of a file cut off in the middle of a line, all but that line.

    Errors: SampleError when the file is damaged, or is not of ``run``.
    """
    lines = _whole_lines(path)
    found = read_run(path)
    if run is not None and found != run:
        raise SampleError(_other_run(path, found, run))
    values = {}
    for number, text in enumerate(lines[1:], start=2):
        try:
            prediction = _from_line(text)
        except (ValueError, KeyError, TypeError) as error:
            raise SampleError(f"{path}:{number}: not a prediction ({error})") from error
        values[prediction.id] = prediction
    return values


def read_run(path: Path) -> dict[str, Any]:
    """The identity of the run that ``path`` holds. Errors: SampleError."""
    lines = _whole_lines(path)
    try:
        value = json.loads(lines[0])["run"] if lines else None
    except (ValueError, KeyError, TypeError) as error:
        raise SampleError(f"{path}:1: holds no run: is it a file of medmo-edge eval?") from error
    if not isinstance(value, dict):
        raise SampleError(f"{path}: holds no run: is it a file of medmo-edge eval?")
    return value


def _whole_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SampleError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    return text[: text.rfind("\n") + 1].splitlines()


def _other_run(path: Path, found: dict[str, Any], run: dict[str, Any]) -> str:
    """One line that names the first thing that differs."""
    here, there = _flat(run), _flat(found)
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    plain = [key for key in keys if not key.endswith("sha256")]
    what = "the model's files or the benchmark's questions, labels or pictures differ"
    if plain:
        what = f"{plain[0]}: {there.get(plain[0])!r} there, {here.get(plain[0])!r} here"
    return f"{path} holds the predictions of another run ({what}): choose another output folder"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(item, f"{name}.") if isinstance(item, dict) else {name: item}
    return flat


def _open(path: Path, run: dict[str, Any]) -> TextIO:
    """The file, ready for the next line: a cut-off last line is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not _whole_lines(path):
        path.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
    elif not path.read_bytes().endswith(b"\n"):
        path.write_text("".join(f"{line}\n" for line in _whole_lines(path)), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _line(prediction: Prediction) -> str:
    value = asdict(prediction)
    value["geometries"] = [list(each.values()) for each in value["geometries"]]
    return json.dumps(value, ensure_ascii=False) + "\n"


def _from_line(text: str) -> Prediction:
    value = json.loads(text)
    names = tuple(Geometry.__dataclass_fields__)
    sizes = [dict(zip(names, each, strict=True)) for each in value["geometries"]]
    return Prediction(**{**value, "geometries": tuple(Geometry(**each) for each in sizes)})


def _chunks(cases: Sequence[Case]) -> Iterator[list[tuple[Case, tuple[Frame, ...]]]]:
    """Cases with their frames, a bounded number of pixels at a time; neighbours share frames."""
    chunk: list[tuple[Case, tuple[Frame, ...]]] = []
    loaded: tuple[tuple[Shown, ...], tuple[Frame, ...]] = ((), ())
    pixels = 0
    for case in cases:
        if case.images != loaded[0]:
            loaded = case.images, tuple(load_frame(picture) for picture in case.images)
            pixels += sum(frame.pixels.size // 3 for frame in loaded[1])
        chunk.append((case, loaded[1]))
        if len(chunk) >= CHUNK or pixels >= CHUNK_PIXELS:
            yield chunk
            chunk, pixels = [], 0
    if chunk:
        yield chunk


def _ask(model: Model, chunk: list[tuple[Case, tuple[Frame, ...]]]) -> Iterator[Prediction]:
    """Together; when a question cannot be asked, the unanswered ones again, one at a time."""
    requests = [_request(model, case, frames) for case, frames in chunk]
    left = dict(enumerate(chunk))
    try:
        for index, answer in model.answer_all(requests):
            yield _prediction(model, *left.pop(index), answer)
    except (PromptError, GenerationError):
        for index, (case, frames) in list(left.items()):
            try:
                ((_, answer),) = model.answer_all([requests[index]])
            except (PromptError, GenerationError) as error:
                yield _prediction(model, case, frames, None, str(error))
            else:
                yield _prediction(model, case, frames, answer)


def _request(model: Model, case: Case, frames: tuple[Frame, ...]) -> Request:
    question = case.question
    if case.rule == "first_box" and frames:
        question = convert_boxes(
            question, geometry_of(frames[0], model.preprocessing), model.coords
        )
    return Request(
        frames=frames,
        question=question,
        max_new_tokens=case.max_new_tokens,
        image_texts=case.image_texts,
    )


def _prediction(
    model: Model,
    case: Case,
    frames: tuple[Frame, ...],
    answer: ModelAnswer | None,
    error: str | None = None,
) -> Prediction:
    return Prediction(
        id=case.id,
        text=answer.text if answer else "",
        geometries=tuple(geometry_of(frame, model.preprocessing) for frame in frames),
        seconds=round(answer.seconds, 5) if answer else 0.0,
        decode_seconds=round(answer.decode_seconds, 5) if answer else 0.0,
        new_tokens=answer.new_tokens if answer else 0,
        prompt_tokens=answer.prompt_tokens if answer else 0,
        finish_reason=answer.finish_reason if answer else "error",
        error=error,
    )
