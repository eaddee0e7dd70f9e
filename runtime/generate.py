"""The token loop: draw, decode, stop; text leaves in pieces that are final when they leave.

It starts from the logits after the prompt and knows neither images nor chats, nor who evaluates the
tokens that it draws (steps.py). End-of-text tokens and stop strings are never emitted, also when a
stop string spreads over several tokens. A full context ends an answer as its length limit does; a
cancelled or late one keeps what was said.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import UsageError
from medmo_edge.runtime.backends import Interrupted
from medmo_edge.runtime.sampling import Sampler, Sampling
from medmo_edge.runtime.steps import Decode, Steps
from medmo_edge.tokenizer import TextStream

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions(Sampling):
    """How to answer: the sampling, and when to end.

    ``stop`` strings end the answer and are not part of it. ``json_schema`` (a JSON Schema as text,
    see constrain.py) allows only answers that follow it. ``timeout_seconds`` counts from the
    question, waiting and image included. Setting ``cancel`` from any thread ends the answer within
    about one operation of the model. Errors: UsageError for values outside their range.
    """

    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    timeout_seconds: float | None = None
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        if self.max_new_tokens < 1:
            raise UsageError("max_new_tokens must be 1 or more")
        if isinstance(self.stop, str) or "" in self.stop:
            raise UsageError("stop must be a tuple of strings that are not empty")
        if self.timeout_seconds is not None and not self.timeout_seconds > 0:
            raise UsageError("timeout_seconds must be above 0")


def changed_options(
    options: GenerationOptions | None, changes: Mapping[str, Any]
) -> GenerationOptions:
    """``options``, or the defaults, with ``changes``. Errors: UsageError for what is no option."""
    try:
        return replace(options or GenerationOptions(), **changes)
    except TypeError as error:
        raise UsageError(f"unknown option: {error}") from error


class Limits:
    """When one running answer must end early; counts from its creation."""

    def __init__(self, options: GenerationOptions) -> None:
        self._cancel = options.cancel or threading.Event()
        timeout = options.timeout_seconds
        self._deadline = float("inf") if timeout is None else time.monotonic() + timeout

    def cancel(self) -> None:
        """End the answer as if its ``cancel`` event had been set; leaves the event alone."""
        ended = threading.Event()
        ended.set()
        self._cancel = ended

    def reached(self) -> FinishReason | None:
        """Why to end now, else None."""
        if self._cancel.is_set():
            return "cancelled"
        return "timeout" if time.monotonic() >= self._deadline else None

    def interrupt(self) -> bool:
        """The same as a hook for ``Backend.set_interrupt``."""
        return self.reached() is not None


class StopFilter:
    """Holds back what may become a stop string; cuts the text before the first one completed.

    Of stop strings that end at the same character the longest wins, so the result does not depend
    on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is safe to emit now."""
        if self.found or not text:
            return ""
        self._held += text
        ends = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._length_at_risk())

    def flush(self) -> str:
        """The end of the text: what was held back for nothing."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        safe, self._held = self._held[:length], self._held[length:]
        return safe

    def _length_at_risk(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished answer: ``num_tokens`` without the end-of-text token, ``seconds`` without waiting
    for whoever reads the pieces.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    seconds: float


@dataclass(slots=True)
class Decoding:
    """The state of one token loop; ``room``: tokens that fit into the context after the prompt."""

    sampler: Sampler
    text: TextStream
    eos_token_ids: Sequence[int]
    options: GenerationOptions
    limits: Limits
    room: int
    stops: StopFilter = field(init=False)
    reason: FinishReason | None = None
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.stops = StopFilter(self.options.stop)

    def steps(self, logits_V: NDArray[np.float32]) -> Steps[Outcome]:
        """The answer from the logits after the prompt to its end.

        Text leaves before the token that completed it is evaluated: nothing more can change it.
        Errors: GenerationError from the sampler, and what is thrown in where a token is evaluated.
        """
        said: list[str] = []
        seconds, start = 0.0, time.perf_counter()
        while True:
            token, piece = self._draw(logits_V)
            if piece:
                said.append(piece)
                seconds += time.perf_counter() - start
                yield piece
                start = time.perf_counter()
            if self.reason is not None:
                break
            try:
                logits_V = yield Decode(token)
            except Interrupted:
                if piece := self._end(self.limits.reached() or "cancelled"):
                    said.append(piece)
                    yield piece
                break
        seconds += time.perf_counter() - start
        assert self.reason is not None
        return Outcome("".join(said), self.reason, self.num_tokens, seconds)

    def _draw(self, logits_V: NDArray[np.float32]) -> tuple[int, str]:
        """Draw one token; returns it and the text that became final. Sets ``reason`` at the end."""
        token = self.sampler.draw(logits_V)
        if token in self.eos_token_ids:
            return token, self._end("stop")
        self.num_tokens += 1
        piece = self.stops.push(self.text.push(token))
        if self.stops.found:
            self.reason = "stop"
        elif reason := self._limit():
            piece += self._end(reason)
        return token, piece

    def _limit(self) -> FinishReason | None:
        full = self.num_tokens > self.room  # the last one is never evaluated
        if self.num_tokens == self.options.max_new_tokens or full:
            return self.limits.reached() or "length"
        return self.limits.reached()

    def _end(self, reason: FinishReason) -> str:
        """Finish for ``reason``; returns the text that was held back."""
        self.reason = reason
        return self.stops.push(self.text.flush()) + self.stops.flush()
