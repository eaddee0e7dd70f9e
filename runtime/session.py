"""Sessions: load an artifact, ask about images, get answers with boxes in source pixels.

A session answers one question at a time; other threads wait for their turn. A study keeps the
evaluated images, so that its second question costs only its own tokens; questions of one study do
not see each other. Decoding images from files is not done here: ``medmo_edge.read_image`` is.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medmo_edge.boxes import Parsed, parse_boxes
from medmo_edge.errors import GenerationError, UsageError
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest
from medmo_edge.prompts import TASK_PROMPTS, Message, locate_prompt
from medmo_edge.runtime import fake
from medmo_edge.runtime.answers import Answer, Timings, provenance_of
from medmo_edge.runtime.backends import Backend, Interrupted, open_backend
from medmo_edge.runtime.certified import check_certificate
from medmo_edge.runtime.chat import Chat, Picture
from medmo_edge.runtime.choice import Opened, open_best
from medmo_edge.runtime.constrain import Grammars
from medmo_edge.runtime.device import Device, probe
from medmo_edge.runtime.exactness import exact_rows
from medmo_edge.runtime.generate import (
    Decoding,
    GenerationOptions,
    Limits,
    Outcome,
    changed_options,
)
from medmo_edge.runtime.prefixes import Cost, Prefix
from medmo_edge.runtime.sampling import Choice, Sampler
from medmo_edge.runtime.stage import Part, Stage
from medmo_edge.runtime.steps import Pause, Steps
from medmo_edge.runtime.streams import Stream
from medmo_edge.tokenizer import Tokenizer

__all__ = ["Answer", "GenerationOptions", "Session", "Stream", "Study", "load"]

_SMALLEST_BUDGET_BYTES = 256 << 20


def load(
    path: str | Path,
    backend: str = "auto",
    *,
    verify: bool = True,
    threads: int | None = None,
    max_context: int | None = None,
    require_certificate: bool = False,
) -> "Session":
    """Load an artifact folder, or ``fake:TEXT``, which answers TEXT to everything.

    Of a folder that holds several artifacts of one checkpoint, the best for this machine is taken.
    ``verify`` hashes the files against the manifest; ``threads``: default the physical cores;
    ``max_context``: most tokens of one conversation, default what memory allows.
    ``require_certificate`` refuses an artifact that was not certified for this backend and kind of
    device, and always hashes.
    Errors: ArtifactError, BackendUnavailable (with every backend's reason), UsageError.
    """
    start = time.perf_counter()
    for name, value in (("threads", threads), ("max_context", max_context)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more")
    device = probe()
    options = {"threads": threads, "max_context": max_context}
    is_fake = str(path).startswith(fake.PREFIX)
    if is_fake:
        opened = _open_fake(str(path), device, backend, options)
    else:
        hashed = verify or require_certificate
        opened = open_best(
            path, device, backend, options, verify=hashed, pair=not require_certificate
        )
    try:
        if require_certificate:
            check_certificate(opened.manifest, opened.backend, device)
        chat = fake.chat() if is_fake else Chat.from_artifact(opened.manifest)
    except BaseException:
        opened.backend.close()
        raise
    return Session(
        opened.backend,
        chat,
        opened.manifest,
        budget_bytes=max(_SMALLEST_BUDGET_BYTES, device.ram_available_bytes // 4),
        load_seconds=time.perf_counter() - start,
        chosen=opened.reason,
    )


def _open_fake(path: str, device: Device, backend: str, options: Mapping[str, Any]) -> Opened:
    manifest = fake.artifact(path.removeprefix(fake.PREFIX))
    opened = open_backend(manifest, device, backend, options)
    return Opened(backend=opened, manifest=manifest, reason="asked for by name")


class Study:
    """Images that several questions are asked about; made by ``Session.study``."""

    def __init__(
        self, session: "Session", frames: Sequence[Frame], image_texts: Sequence[str] = ()
    ) -> None:
        self._session = session
        self._image_texts = tuple(image_texts)
        self._sources = tuple(frame.source.to_dict() for frame in frames)
        self._pictures = [session._chat.picture(frame) for frame in frames]
        self._owner = object()  # stands for this study in the prefix cache
        self._closed = False

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The images as the model sees them."""
        return tuple(self._pictures)

    def ask(
        self, question: str, *, options: GenerationOptions | None = None, **changes: Any
    ) -> Answer:
        """The answer to ``question``; ``changes`` are fields of GenerationOptions.

        Errors: PromptError, GenerationError, UsageError.
        """
        return self.stream(question, options=options, **changes).finish()

    def stream(
        self, question: str, *, options: GenerationOptions | None = None, **changes: Any
    ) -> Stream:
        """The answer piece by piece; otherwise as ``ask``."""
        ids, rest = self._session._chat.prompt(question, self._pictures, self._image_texts)
        return self._start(ids, rest, [], changed_options(options, changes))

    def converse(
        self,
        messages: Sequence[Message],
        *,
        options: GenerationOptions | None = None,
        **changes: Any,
    ) -> Stream:
        """The answer to the last of several messages, which the model sees all.

        A message is ``{"role": "system" | "user" | "assistant", "content": text or parts}``, a
        part ``{"type": "text", "text": ...}`` or ``{"type": "image"}``, which stands for the next
        image of the study. The last message is the user's. Errors: as ``ask``.
        """
        chat = self._session._chat
        ids, rest, cuts = chat.conversation(messages, self._pictures)
        return self._start(ids, rest, cuts, changed_options(options, changes))

    def _start(
        self, ids: list[int], rest: list[int], cuts: list[int], options: GenerationOptions
    ) -> Stream:
        if self._closed:
            raise GenerationError("the study is closed: open it again with session.study")
        segments = self._session._chat.segments(ids, self._pictures, cuts)
        prefix = Prefix(ids, segments, self._owner)
        return self._session._stream(_Asked(self, prefix, rest, options, Limits(options)))

    def locate(self, target: str, **options: Any) -> Answer:
        """Ask where ``target`` is, e.g. ``locate("nodule")``; see ``answer.boxes``."""
        return self.ask(locate_prompt(target), **options)

    def report(self, **options: Any) -> Answer:
        """Ask for a radiology report."""
        return self.ask(TASK_PROMPTS["report"], **options)

    def caption(self, **options: Any) -> Answer:
        """Ask for a description."""
        return self.ask(TASK_PROMPTS["caption"], **options)

    def close(self) -> None:
        """Free what is kept of the images; harmless when called again."""
        self._closed = True
        self._session._stage.prefixes.forget(self._owner)

    def _answer(self, outcome: Outcome, cost: Cost, prompt_tokens: int) -> Answer:
        session = self._session
        geometries = [picture.geometry for picture in self._pictures]
        parsed = Parsed((), ())
        if geometries:
            parsed = parse_boxes(outcome.text, geometries, session._chat.coords)
        return Answer(
            text=outcome.text,
            boxes=parsed.boxes,
            rejected_boxes=parsed.rejected,
            finish_reason=outcome.finish_reason,
            timings=Timings(
                load_seconds=session.load_seconds,
                image_seconds=cost.image_seconds,
                prefill_seconds=cost.text_seconds,
                decode_seconds=outcome.seconds,
                prompt_tokens=prompt_tokens,
                new_tokens=outcome.num_tokens,
                reused_tokens=cost.reused_tokens,
            ),
            provenance=provenance_of(
                session.backend, session.manifest, self._sources, session.chosen
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):  # absent when a frame could not be resized
            self.close()


@dataclass(frozen=True, slots=True)
class _Asked:
    """One question on its way: what is kept of its prompt, what is not, and its limits."""

    study: Study
    prefix: Prefix
    rest: list[int]
    options: GenerationOptions
    limits: Limits

    @property
    def num_tokens(self) -> int:
        return len(self.prefix.ids) + len(self.rest)

    def answer(self, outcome: Outcome, cost: Cost) -> Answer:
        return self.study._answer(outcome, cost, self.num_tokens)


class Session:
    """One loaded artifact; use it as a context manager, or call ``close``. Thread-safe."""

    def __init__(
        self,
        backend: Backend,
        chat: Chat,
        manifest: Manifest,
        *,
        budget_bytes: int,
        load_seconds: float,
        chosen: str = "",
    ) -> None:
        self.manifest = manifest
        self.load_seconds = load_seconds
        #: why this artifact and backend were taken
        self.chosen = chosen
        self._chat = chat
        self._stage = Stage(backend, budget_bytes)
        #: what compiles JSON schemas for this model's tokenizer
        self.grammars = Grammars(chat.tokenizer, chat.eos_token_ids)

    @property
    def backend(self) -> Backend:
        """What computes the answers; its ``name`` and ``device`` are for reports."""
        return self._stage.backend

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._chat.tokenizer

    def study(self, images: Frame | Sequence[Frame], *, image_texts: Sequence[str] = ()) -> Study:
        """Images to ask several questions about, in the order the prompt shows them; may be none.

        ``image_texts``: a text before each image, such as "<image_1>: ", or none.
        Errors: ImageError when an image's shape cannot be shown to the model.
        """
        self._stage.require_open()
        frames = [images] if isinstance(images, Frame) else list(images)
        return Study(self, frames, image_texts)

    def ask(self, images: Frame | Sequence[Frame], question: str, **options: Any) -> Answer:
        """One question about images that are not kept; ``options`` as in ``Study.ask``."""
        with self.study(images) as study:
            return study.ask(question, **options)

    def locate(self, images: Frame | Sequence[Frame], target: str, **options: Any) -> Answer:
        """Ask where ``target`` is; see ``answer.boxes``."""
        return self.ask(images, locate_prompt(target), **options)

    def report(self, images: Frame | Sequence[Frame], **options: Any) -> Answer:
        """Ask for a radiology report."""
        return self.ask(images, TASK_PROMPTS["report"], **options)

    def caption(self, images: Frame | Sequence[Frame], **options: Any) -> Answer:
        """Ask for a description."""
        return self.ask(images, TASK_PROMPTS["caption"], **options)

    def prepare(self, parallel: int, *, exact: bool = True) -> tuple[int, int]:
        """Get ready for a crew of ``parallel`` answers at once.

        Returns how many this backend can give, and how many of their tokens it evaluates together.

        ``exact``: evaluate tokens of several answers together only as far as that changes no bit
        of any of them, which is measured now. The session must not be answering.
        """
        lanes = self._stage.lanes
        if lanes is None or parallel == 1:
            return 1, 1
        self._stage.prefixes.keep_lanes(0)  # the trial needs the backend for itself
        trial = next(count for count in range(parallel, 0, -1) if lanes.fits(count, 1))
        lanes.rows = exact_rows(lanes, trial, self.tokenizer.length) if exact else parallel
        return parallel, lanes.rows

    def close(self) -> None:
        """Cancel the running answer and free the model's memory; harmless when called again."""
        self._stage.close()

    def _stream(self, asked: _Asked) -> Stream:
        self._stage.require_open()
        total, most = asked.num_tokens, self.backend.max_cells
        if total >= most:
            raise GenerationError(
                f"the prompt has {total} tokens, the context holds {most}: use "
                "smaller or fewer images, or a larger max_context"
            )
        stream = Stream(asked.limits)
        cost, choices = Cost(), stream.choices
        return stream.plays(
            Part(
                stage=self._stage,
                prefix=asked.prefix,
                limits=asked.limits,
                cells=min(total + asked.options.max_new_tokens, most),
                begin=lambda lane: self._steps(asked, choices, cost, lane),
                nothing=lambda: asked.answer(_nothing(asked.limits), cost),
            )
        )

    def _steps(self, asked: _Asked, choices: list[Choice], cost: Cost, lane: int) -> Steps[Answer]:
        """One answer from its prompt to its boxes. Errors: as ``Study.ask``."""
        tokenizer, schema = self._chat.tokenizer, asked.options.json_schema
        constraint = None if schema is None else self.grammars.start(schema)
        prefixes = self._stage.prefixes
        try:
            yield from prefixes.steps(asked.prefix, cost, lane)
            yield Pause.PROMPT
            start = time.perf_counter()
            prefixes.select(lane)
            logits = self.backend.decode_tokens(asked.rest)
            cost.text_seconds += time.perf_counter() - start
        except Interrupted:
            return asked.answer(_nothing(asked.limits), cost)
        prompt_ids = asked.prefix.ids + asked.rest
        sampler = Sampler(asked.options, tokenizer.length, prompt_ids, constraint, choices)
        room = self.backend.max_cells - asked.num_tokens
        eos, text = self._chat.eos_token_ids, tokenizer.stream()
        decoding = Decoding(sampler, text, eos, asked.options, asked.limits, room)
        return asked.answer((yield from decoding.steps(logits)), cost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _nothing(limits: Limits) -> Outcome:
    return Outcome("", limits.reached() or "cancelled", 0, 0.0)
