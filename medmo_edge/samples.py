"""Labelled samples: one JSONL schema for training, calibration and evaluation.

One JSON object a line; image paths are relative to the file; boxes are in source pixels, XYXY,
half-open. Files are read lazily, line by line, and no image is opened here. The answer of a
``locate`` sample is rendered from its boxes in the checkpoint's convention, never stored twice.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmo_edge.boxes import Box, Coords, Geometry, render_boxes
from medmo_edge.errors import SampleError

TASKS = ("caption", "vqa", "report", "retrieval", "locate", "text_qa")
_KEYS = {"id", "task", "images", "messages", "boxes", "answer", "choices", "meta"}
_NOTHING_FOUND = "None."


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample; ``images`` are absolute paths, ``line`` is its line in the file (from 1).

    ``messages`` alternate user and assistant, as in the file; the last one is the wanted answer
    when it is the assistant's. ``answer`` is the short label that scores compare, where there is
    one; ``choices`` the options of a multiple-choice question.
    """

    id: str
    task: str
    images: tuple[Path, ...] = ()
    messages: list[dict[str, Any]] = field(default_factory=list)
    boxes: tuple[Box, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    line: int = 0


def read_samples(path: str | Path) -> Iterator[Sample]:
    """The samples of a JSONL file in order; blank lines are skipped.

    Errors: SampleError with ``file:line`` for the first line that does not follow the schema, that
    repeats an id, or when there is no sample at all. Missing image files are left to the reader of
    images.
    """
    path = Path(path)
    seen: set[str] = set()
    for number, text in numbered_lines(path):
        sample = parse_sample(text, path, number)
        if sample.id in seen:
            raise SampleError(f"{path}:{number}: id {sample.id!r} was used before: ids are unique")
        seen.add(sample.id)
        yield sample
    if not seen:
        raise SampleError(f"{path} holds no sample: give a JSONL file, one sample a line")


def count_samples(path: str | Path) -> int:
    """Number of lines that hold a sample, without checking them. Errors: SampleError."""
    return sum(1 for _ in numbered_lines(Path(path)))


def write_samples(path: str | Path, samples: Iterable[Sample]) -> int:
    """Write samples by atomic rename; image paths become relative to the file. Returns how many.

    Errors: SampleError when ``path`` exists.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise SampleError(f"{path} exists already: choose another file or remove it")
    draft = path.with_name(f".{path.name}.draft")
    count = 0
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            for sample in samples:
                file.write(json.dumps(to_dict(sample, path.parent), ensure_ascii=False) + "\n")
                count += 1
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def to_dict(sample: Sample, folder: Path) -> dict[str, Any]:
    """The JSON object of a sample in a file that lies in ``folder``; empty fields are left out."""
    root = folder.resolve()
    value: dict[str, Any] = {
        "id": sample.id,
        "task": sample.task,
        "images": [Path(os.path.relpath(image, root)).as_posix() for image in sample.images],
        "messages": sample.messages,
        "boxes": [_box_dict(box) for box in sample.boxes],
        "answer": sample.answer,
        "choices": list(sample.choices),
        "meta": sample.meta,
    }
    always = ("id", "task", "messages")
    return {key: item for key, item in value.items() if key in always or item not in (None, [], {})}


def question_of(sample: Sample) -> str:
    """The text of the last user message, without its images. Errors: SampleError without one."""
    for message in reversed(sample.messages):
        if message["role"] == "user":
            return text_of(message)
    raise SampleError(f"sample {sample.id!r} asks nothing: it needs a user message")


def target_text(
    sample: Sample, geometries: Sequence[Geometry] = (), coords: Coords = "norm1000"
) -> str:
    """The wanted answer. A ``locate`` sample's is rendered from its boxes, image by image.

    ``geometries``: one per image, needed for boxes. Errors: SampleError when nothing is wanted.
    """
    if sample.task == "locate":
        return _render(sample, geometries, coords)
    last = sample.messages[-1]
    if last["role"] == "assistant":
        return text_of(last)
    if sample.answer is not None:
        return sample.answer
    raise SampleError(f"sample {sample.id!r} has no answer: add an assistant message or an answer")


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, whose content is a string or a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def parse_sample(text: str, path: Path, number: int) -> Sample:
    """One line of the file ``path``. Errors: SampleError with ``file:line``."""
    where = f"{path}:{number}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise SampleError(f"{where}: a sample is a JSON object")
    if unknown := sorted(set(value) - _KEYS):
        raise SampleError(f"{where}: unknown key {unknown[0]!r}: use {', '.join(sorted(_KEYS))}")
    if not isinstance(value.get("id"), str) or not value["id"]:
        raise SampleError(f"{where}: 'id' must be a text that is not empty")
    if value.get("task") not in TASKS:
        raise SampleError(f"{where}: task {value.get('task')!r} is not one of {', '.join(TASKS)}")
    images = _texts(value, "images", where)
    messages = _messages(value.get("messages", []), len(images), where)
    answer = value.get("answer")
    if not isinstance(answer, str | None):
        raise SampleError(f"{where}: 'answer' must be a text")
    meta = value.get("meta", {})
    if not isinstance(meta, dict):
        raise SampleError(f"{where}: 'meta' must be a JSON object")
    folder = path.parent.resolve()
    return Sample(
        id=value["id"],
        task=value["task"],
        images=tuple(Path(os.path.normpath(folder / name)) for name in images),
        messages=messages,
        boxes=tuple(_boxes(value.get("boxes", []), len(images), where)),
        answer=answer,
        choices=_texts(value, "choices", where),
        meta=meta,
        line=number,
    )


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank. Errors: SampleError."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise SampleError(f"{path} is not UTF-8 text: give a JSONL file") from error
    except OSError as error:
        raise SampleError(f"{path} cannot be read: {error.strerror}") from error


def _texts(value: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    texts = value.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise SampleError(f"{where}: {key!r} must be a list of texts")
    return tuple(texts)


def _messages(messages: Any, num_images: int, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise SampleError(f"{where}: 'messages' must be a list with at least the question")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise SampleError(f"{where}: messages must alternate between user and assistant")
    shown = sum(_num_images(message.get("content"), where) for message in messages)
    if shown not in (0, num_images):
        raise SampleError(f"{where}: messages show {shown} images, 'images' lists {num_images}")
    return messages


def _num_images(content: Any, where: str) -> int:
    if isinstance(content, str):
        return 0
    if isinstance(content, list) and all(map(_is_part, content)):
        return sum(part["type"] == "image" for part in content)
    raise SampleError(f"{where}: content is a text, or a list of image and text parts")


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    return part.get("type") == "image"


def _boxes(boxes: Any, num_images: int, where: str) -> Iterator[Box]:
    if not isinstance(boxes, list):
        raise SampleError(f"{where}: 'boxes' must be a list")
    for box in boxes:
        try:
            label, image = box["label"], box.get("image", 0)
            x1, y1, x2, y2 = map(float, box["xyxy"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SampleError(f"{where}: a box has label, image and four numbers xyxy") from error
        if not isinstance(label, str) or not label:
            raise SampleError(f"{where}: a box's label must be a text")
        if type(image) is not int or not 0 <= image < num_images:
            raise SampleError(f"{where}: a box names image {image!r} of {num_images}")
        if not (0 <= x1 < x2 < float("inf") and 0 <= y1 < y2 < float("inf")):
            raise SampleError(f"{where}: box {[x1, y1, x2, y2]} is not x1 < x2 and y1 < y2, from 0")
        yield Box(label, x1, y1, x2, y2, image)


def _box_dict(box: Box) -> dict[str, Any]:
    return {"label": box.label, "image": box.image, "xyxy": list(box.xyxy)}


def _render(sample: Sample, geometries: Sequence[Geometry], coords: Coords) -> str:
    if len(geometries) != len(sample.images):
        raise ValueError(f"{len(geometries)} geometries for {len(sample.images)} images")
    if not sample.boxes:
        return sample.answer or _NOTHING_FOUND
    parts = []
    for index, geometry in enumerate(geometries):
        text = render_boxes([box for box in sample.boxes if box.image == index], geometry, coords)
        if text:
            parts.append(f"image {index + 1}: {text}" if len(geometries) > 1 else text)
    return ", ".join(parts)
