"""A running answer as an iterator of text pieces. It neither waits for turns nor evaluates."""

import weakref
from collections.abc import Generator, Iterator
from typing import Self

from medmo_edge.errors import GenerationError
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.generate import Limits
from medmo_edge.runtime.sampling import Choice
from medmo_edge.runtime.stage import Part


class Stream(Iterator[str]):
    """Pieces of one answer as they become final; joined they are ``answer.text``.

    The answer advances only while pieces are taken. ``answer`` is None until the last one was.
    ``choices`` grows with every token drawn when the options ask for ``logprobs``. Dropping or
    closing the stream gives its turn to the next question; so does another question of the same
    thread.
    """

    answer: Answer | None = None

    def __init__(self, limits: Limits) -> None:
        self.choices: list[Choice] = []
        self._limits = limits
        self._part: Part | None = None
        self._pieces: Generator[str, None, Answer] | None = None

    def plays(self, part: Part) -> Self:
        """Give it its part: the answer runs alone unless a crew takes the part first."""
        self._part = part
        self._pieces = part.stage.alone(part, weakref.ref(self))
        return self

    def hand_over(self) -> Part:
        """The part, for a crew to perform instead; nothing must have been taken yet."""
        part, self._part, self._pieces = self._part, None, None
        assert part is not None
        return part

    def __next__(self) -> str:
        if self._pieces is None:
            raise StopIteration
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.answer, self._pieces = end.value, None
            raise

    def cancel(self) -> None:
        """End the answer with finish reason "cancelled", from any thread; then take the rest."""
        self._limits.cancel()

    def close(self) -> None:
        """Give up the answer; ``answer`` stays None unless it was complete.

        While another thread takes a piece, that thread's answer ends as if cancelled.
        """
        pieces = self._pieces
        if pieces is not None:
            try:
                pieces.close()
                self._pieces = None
            except ValueError:  # the generator is running in another thread
                self.cancel()

    def finish(self) -> Answer:
        """Take all remaining pieces and return the answer.

        Errors: GenerationError when the stream was closed before its end.
        """
        for _ in self:
            pass
        if self.answer is None:
            raise GenerationError("the stream was closed, or another question took its turn")
        return self.answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
