"""What an artifact makes of one question, seen from inside: ids, features, logits, answer.

For verification and the on-site self-test. The answer is the product's own: it comes out of
``Study.ask``, and the logits are noted down as they pass by. Nothing is judged here, and only
greedy answers are observed.

Shape suffixes: M vision tokens, R values of one row of features, T tokens of an answer, V
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box
from medmo_edge.images import Frame
from medmo_edge.preprocess import patchify
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.backends import Backend
from medmo_edge.runtime.generate import Outcome
from medmo_edge.runtime.prefixes import Cost, Prefix
from medmo_edge.runtime.session import Session, Study

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What the vision side made of the images: patches [N, P] and features [M, R] of each."""

    patches: tuple[Array, ...]
    features: tuple[Array, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """One greedy answer: prompt ids, its tokens (the end of text included when it was reached) and
    the logits [T, V] that each token was the largest of.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    logits_TV: Array
    answer: Answer


class _Recorder:
    """A backend that notes the logits it returns; everything else is passed on."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.logits: list[Array] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode_tokens(self, ids: list[int]) -> Array:
        """See ``Backend``."""
        logits = self._backend.decode_tokens(ids)
        self.logits.append(logits)
        return logits


class Observer:
    """Observes one session about one group of images after another; not thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._stage = session._stage
        self._chat = session._chat
        self._study: Study | None = None
        self._frames: tuple[Frame, ...] = ()

    def look(self, frames: Sequence[Frame]) -> Seen:
        """The vision side alone."""
        chat = self._chat
        pictures = [chat.picture(frame) for frame in frames]
        return Seen(
            patches=tuple(patchify(each.resized_HWC, chat.preprocessing) for each in pictures),
            features=tuple(self._stage.backend.encode_image(each.resized_HWC) for each in pictures),
        )

    def ask(self, frames: Sequence[Frame], question: str, max_new_tokens: int) -> Observed:
        """Ask as an application would. Errors: as ``Study.ask``."""
        study = self._study_of(tuple(frames))
        recorder = _Recorder(self._stage.backend)
        self._stage.backend = recorder
        try:
            answer = study.ask(question, max_new_tokens=max_new_tokens)
        finally:
            self._stage.backend = recorder._backend
        logits_TV = np.stack(recorder.logits)[:, : self._chat.tokenizer.length]
        prefix, rest = self._prompt(study, question)
        return Observed(
            prompt_ids=(*prefix.ids, *rest),
            tokens=tuple(int(token) for token in logits_TV.argmax(axis=1)),
            logits_TV=logits_TV,
            answer=answer,
        )

    def follow(
        self, frames: Sequence[Frame], question: str, tokens: Sequence[int], start: int = 0
    ) -> Array:
        """Logits [T - start, V] for tokens ``start`` to T of a given answer, each after all tokens
        before it (teacher forcing).
        """
        study = self._study_of(tuple(frames))
        prefix, rest = self._prompt(study, question)
        self._stage.prefixes.bring(prefix, Cost())
        backend, length = self._stage.backend, self._chat.tokenizer.length
        rows = [backend.decode_tokens([*rest, *tokens[:start]])[:length]]
        for token in tokens[start:-1]:
            rows.append(backend.decode_tokens([token])[:length])
        return np.stack(rows)

    def go_on(
        self, frames: Sequence[Frame], question: str, begun: Sequence[int], max_new_tokens: int
    ) -> tuple[int, ...]:
        """The tokens ``begun`` and how the model greedily goes on after them."""
        study = self._study_of(tuple(frames))
        prefix, rest = self._prompt(study, question)
        self._stage.prefixes.bring(prefix, Cost())
        backend, length = self._stage.backend, self._chat.tokenizer.length
        tokens = list(begun)
        logits = backend.decode_tokens([*rest, *tokens])
        while len(tokens) < max_new_tokens:
            tokens.append(int(logits[:length].argmax()))
            if tokens[-1] in self._chat.eos_token_ids:
                break
            logits = backend.decode_tokens(tokens[-1:])
        return tuple(tokens)

    def read_boxes(self, frames: Sequence[Frame], text: str) -> tuple[Box, ...]:
        """How an answer of this ``text`` would be read, in source pixels."""
        study = self._study_of(tuple(frames))
        return study._answer(Outcome(text, "stop", 0, 0.0), Cost(), 0).boxes

    def close(self) -> None:
        """Let go of the images; the session stays open."""
        if self._study is not None:
            self._study.close()
            self._study = None

    def _study_of(self, frames: tuple[Frame, ...]) -> Study:
        same = len(frames) == len(self._frames) and all(
            one is other for one, other in zip(frames, self._frames, strict=True)
        )
        if self._study is None or not same:
            self.close()
            self._study, self._frames = self._session.study(list(frames)), frames
        return self._study

    def _prompt(self, study: Study, question: str) -> tuple[Prefix, list[int]]:
        ids, rest = self._chat.prompt(question, study._pictures)
        return Prefix(ids, self._chat.segments(ids, study._pictures), study._owner), rest
