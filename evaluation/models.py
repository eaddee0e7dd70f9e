"""One way to ask any model: an artifact, ``fake:TEXT``, or a checkpoint through transformers.

Always greedy, whatever a checkpoint's own settings say. All kinds get the same pixels, prompts and
token limits from our own code, so that only what computes the answer differs. Not done here: which
questions are asked (benchmarks), and whether an answer is right (scores).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from medmo_edge.boxes import Box, Coords, Geometry
from medmo_edge.checkpoint import NANO
from medmo_edge.images import Frame
from medmo_edge.preprocess import Preprocessing, smart_resize
from medmo_edge.runtime import fake
from medmo_edge.runtime.backends import BACKENDS

if TYPE_CHECKING:
    from medmo_edge.runtime.session import Answer, Session, Study

MAX_NEW_TOKENS = 512
BATCH = 32  # answers asked for at once where the model can


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question; ``image_texts`` stand before the images, one each, or there are none."""

    frames: tuple[Frame, ...] = ()
    question: str
    max_new_tokens: int = MAX_NEW_TOKENS
    image_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnswer:
    """What a model said: boxes in source pixels, and coordinates that could not be used.

    ``seconds`` is the whole answer, image included; in a batch its share. ``decode_seconds`` is
    the part after the first token was chosen, 0 where it cannot be told apart.
    """

    text: str
    boxes: tuple[Box, ...]
    rejected_boxes: tuple[str, ...]
    seconds: float
    decode_seconds: float
    new_tokens: int
    prompt_tokens: int
    finish_reason: str


class Model(Protocol):
    """A model that can be asked; a context manager.

    Errors of the asking methods: PromptError, ImageError, GenerationError.
    """

    name: str
    coords: Coords
    preprocessing: Preprocessing

    def answer(
        self, frames: Sequence[Frame], question: str, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> ModelAnswer:
        """The greedy answer to one question about ``frames``, in the order shown; may be none."""

    def answer_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, ModelAnswer]]:
        """Answers with the index of their request, in the order in which they become ready."""

    def identity(self) -> dict[str, Any]:
        """What must be the same for two runs to be one: weights, conventions, what computes."""

    def close(self) -> None:
        """Free the model; calling it twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_model(
    model: str | Path,
    *,
    backend: str = "auto",
    threads: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    max_context: int | None = None,
) -> Model:
    """Open an artifact folder, ``fake:TEXT``, a checkpoint folder or ``nano``.

    ``backend`` and ``max_context`` are for artifacts (see ``emulated`` for those of TensorRT),
    ``dtype`` ("float32", "bfloat16") and ``device`` (a torch device) for checkpoints. Errors:
    ArtifactError, CheckpointError, BackendUnavailable, UsageError (the train extra is missing, or
    memory is short).
    """
    if is_checkpoint(model):
        from medmo_edge.evaluation.transformers_model import TransformersModel

        return TransformersModel(model, dtype=dtype, device=device, threads=threads)
    from medmo_edge.evaluation.emulated import open_session

    session = open_session(model, backend, threads=threads, max_context=max_context)
    return SessionModel(session)


def is_checkpoint(model: str | Path) -> bool:
    """Whether ``model`` is "nano" or a folder with config.json and without a manifest."""
    if str(model) == NANO:
        return True
    if str(model).startswith(fake.PREFIX):
        return False
    folder = Path(model)
    return (folder / "config.json").is_file() and not (folder / "manifest.json").is_file()


def geometry_of(frame: Frame, preprocessing: Preprocessing) -> Geometry:
    """The sizes of ``frame`` for a model that sees it through ``preprocessing``."""
    height, width = frame.pixels.shape[:2]
    resized_height, resized_width = smart_resize(height, width, preprocessing)
    return Geometry(
        width=frame.source.width,
        height=frame.source.height,
        frame_width=width,
        frame_height=height,
        resized_width=resized_width,
        resized_height=resized_height,
    )


class SessionModel:
    """An artifact or ``fake:TEXT``, asked through the runtime as an application would."""

    def __init__(self, session: "Session") -> None:
        self.session = session
        manifest = session.manifest
        self.name: str = manifest.model.get("name") or manifest.checkpoint["name"]
        self.coords: Coords = manifest.coords  # type: ignore[assignment]
        self.preprocessing = Preprocessing.from_dict(manifest.preprocessing)

    def answer(
        self, frames: Sequence[Frame], question: str, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> ModelAnswer:
        """See ``Model``."""
        with self.session.study(list(frames)) as study:
            return _ask(study, question, max_new_tokens)

    def answer_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, ModelAnswer]]:
        """See ``Model``; neighbours that share their frames pay for them once."""
        numbered = enumerate(requests)
        for _, group in groupby(numbered, key=lambda pair: _pictures_key(pair[1])):
            same = list(group)
            first = same[0][1]
            with self.session.study(first.frames, image_texts=first.image_texts) as study:
                for index, request in same:
                    yield index, _ask(study, request.question, request.max_new_tokens)

    def identity(self) -> dict[str, Any]:
        """See ``Model``."""
        manifest, backend = self.session.manifest, self.session.backend
        if manifest.backend == "fake":
            return {"kind": "fake", "name": self.name}
        return {
            "kind": "artifact",
            "name": self.name,
            "target": manifest.target,
            "manifest_sha256": manifest.sha256,
            "checkpoint": dict(manifest.checkpoint),
            "coords": self.coords,
            "backend": backend.name,
            "device": backend.device,
            "libraries": import_module(BACKENDS[backend.name]).describe(),
        }

    def close(self) -> None:
        """See ``Model``."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pictures_key(request: Request) -> tuple[object, ...]:
    return (*(id(frame) for frame in request.frames), request.image_texts)


def _ask(study: "Study", question: str, max_new_tokens: int) -> ModelAnswer:
    return _from_answer(study.ask(question, max_new_tokens=max_new_tokens))


def _from_answer(answer: "Answer") -> ModelAnswer:
    times = answer.timings
    return ModelAnswer(
        text=answer.text,
        boxes=answer.boxes,
        rejected_boxes=answer.rejected_boxes,
        seconds=times.image_seconds + times.prefill_seconds + times.decode_seconds,
        decode_seconds=times.decode_seconds,
        new_tokens=times.new_tokens,
        prompt_tokens=times.prompt_tokens,
        finish_reason=answer.finish_reason,
    )
