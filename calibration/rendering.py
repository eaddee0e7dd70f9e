"""Samples as the network sees them: token ids of question and answer, and resized images.

The answer follows the prompt as if the model had written it, without an end token: those are the
tokens that pass through the network when it answers. ``locate`` answers are written from their
boxes in the checkpoint's convention. Every line of a file is tried before any is refused.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.boxes import Geometry
from medmo_edge.calibration.layout import Prompt
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import MedmoError, SampleError
from medmo_edge.images import Frame, read_image
from medmo_edge.preprocess import grid_thw, num_vision_tokens, resize
from medmo_edge.prompts import ChatTemplate, encode_prompt
from medmo_edge.samples import Sample, numbered_lines, parse_sample, target_text

IMAGE_TOKEN = "<|image_pad|>"
_NAMED_PROBLEMS = 20  # of more, only the line numbers are listed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """One sample, ready to run. ``answer_start`` is the index of the answer's first token.

    ``sha256`` is of everything the network sees; ``geometries`` has one entry per image.
    """

    id: str
    prompt: Prompt
    answer_start: int
    geometries: tuple[Geometry, ...]
    sha256: str


class Renderer:
    """Renders samples for one checkpoint; ``text_only`` keeps their words and drops the images."""

    def __init__(self, checkpoint: Checkpoint, *, text_only: bool = False) -> None:
        self._checkpoint = checkpoint
        self._text_only = text_only
        self._tokenizer = checkpoint.load_tokenizer()
        self._template = ChatTemplate(checkpoint.chat_template)

    def render(self, sample: Sample) -> Rendered:
        """One sample. Errors: ImageError, PromptError, SampleError."""
        limits = self._checkpoint.preprocessing
        frames = [read_image(path) for path in sample.images]
        images = [resize(frame.pixels, limits) for frame in frames]
        geometries = [_geometry(f, i.shape) for f, i in zip(frames, images, strict=True)]
        if self._text_only:
            images = []
        counts = [
            num_vision_tokens(grid_thw(image.shape[0], image.shape[1], limits), limits)
            for image in images
        ]
        messages = self._messages(sample)
        ids = encode_prompt(self._tokenizer, self._template, messages, counts, IMAGE_TOKEN)
        answer = self._tokenizer.encode(self._answer(sample, geometries))
        positions = range(len(ids) - 1, len(ids) + len(answer))
        prompt = Prompt(ids=[*ids, *answer], images=images, positions=positions)
        return Rendered(
            id=sample.id,
            prompt=prompt,
            answer_start=len(ids),
            geometries=tuple(geometries),
            sha256=_digest(sample.id, prompt),
        )

    def _answer(self, sample: Sample, geometries: Sequence[Geometry]) -> str:
        if sample.messages[-1]["role"] == "user" and not (sample.boxes or sample.answer):
            return ""
        answer = target_text(sample, geometries, self._checkpoint.coords)
        return self._checked(answer, sample)

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        """The conversation up to the last question; images that no message shows come first."""
        last = len(sample.messages) - (sample.messages[-1]["role"] == "assistant")
        shown = any(_shows_image(message) for message in sample.messages)
        messages = [self._message(message, sample) for message in sample.messages[:last]]
        if not shown and not self._text_only:
            images = [{"type": "image"} for _ in sample.images]
            messages[0] = {**messages[0], "content": [*images, *messages[0]["content"]]}
        return messages

    def _message(self, message: dict[str, Any], sample: Sample) -> dict[str, Any]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = [part for part in parts if not (self._text_only and part["type"] == "image")]
        for part in kept:
            if part["type"] == "text":
                self._checked(part["text"], sample)
        return {"role": message["role"], "content": kept}

    def _checked(self, text: str, sample: Sample) -> str:
        found = self._tokenizer.control_tokens_in(text)
        if found:
            raise SampleError(f"its text contains the control token {found[0]}: remove it")
        return text


def choose(path: str | Path, limit: int | None, seed: int) -> Callable[[str], bool]:
    """Whether a sample id is among ``limit`` drawn by ``seed``, whatever the order of the file."""
    if limit is None:
        return lambda id: True
    ids = {id for _, text in numbered_lines(Path(path)) if (id := _id_in(text)) is not None}
    drawn = sorted(ids, key=lambda id: hashlib.sha256(f"{seed}:{id}".encode()).digest())[:limit]
    return frozenset(drawn).__contains__


def _id_in(text: str) -> str | None:
    """The id of a line, None for a line that render_file will refuse."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def render_file(
    path: str | Path,
    renderer: Renderer,
    *,
    wanted: Callable[[str], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Rendered]:
    """All samples of a JSONL file, sorted by id; ``wanted`` chooses among the ids.

    Errors: SampleError that lists every line which cannot be rendered.
    """
    path = Path(path)
    rendered: dict[str, Rendered] = {}
    problems: list[tuple[int, str]] = []
    for number, text in numbered_lines(path):
        try:
            sample = parse_sample(text, path, number)
            if sample.id in rendered:
                raise SampleError(f"id {sample.id!r} was used before: ids are unique")
            if wanted is None or wanted(sample.id):
                rendered[sample.id] = renderer.render(sample)
        except MedmoError as error:
            problems.append((number, str(error).removeprefix(f"{path}:{number}: ")))
        if progress:
            progress(number)
    if problems:
        raise SampleError(f"{path}: {_listed(problems)}")
    if not rendered:
        raise SampleError(f"{path} holds no sample: give a JSONL file, one sample a line")
    return [rendered[id] for id in sorted(rendered)]


def _listed(problems: Sequence[tuple[int, str]]) -> str:
    named = "; ".join(f"line {number}: {what}" for number, what in problems[:_NAMED_PROBLEMS])
    others = [str(number) for number, _ in problems[_NAMED_PROBLEMS:]]
    count = "1 sample" if len(problems) == 1 else f"{len(problems)} samples"
    more = f"; also lines {', '.join(others)}" if others else ""
    return f"{count} cannot be rendered: {named}{more}"


def _shows_image(message: dict[str, Any]) -> bool:
    content = message["content"]
    return not isinstance(content, str) and any(part["type"] == "image" for part in content)


def _geometry(frame: Frame, resized: tuple[int, ...]) -> Geometry:
    return Geometry(
        width=frame.source.width,
        height=frame.source.height,
        frame_width=frame.pixels.shape[1],
        frame_height=frame.pixels.shape[0],
        resized_width=resized[1],
        resized_height=resized[0],
    )


def _digest(id: str, prompt: Prompt) -> str:
    digest = hashlib.sha256(id.encode())
    digest.update(np.asarray(prompt.ids, np.int64).tobytes())
    for image in prompt.images:
        digest.update(np.asarray(image.shape, np.int64).tobytes())
        digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
