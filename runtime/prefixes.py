"""Kept image prefixes: what several studies of one session share one KV cache with.

The cache holds one prefix at a time. Another study's turn parks it as bytes (copying is thousands
of times cheaper than evaluating an image on a CPU); when parked bytes exceed their budget, the
study unused for longest loses its own and is evaluated again on its next question. Answers do not
depend on which of the three ways brought a prefix back.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.backends import START, Backend, Mark
from medmo_edge.runtime.chat import Picture


@dataclass(eq=False, slots=True)
class Prefix:
    """The part of a prompt that a study keeps: token ids, and the same as runs and pictures."""

    ids: list[int]
    segments: list[list[int] | Picture] = field(repr=False)


@dataclass(slots=True)
class Cost:
    """Seconds spent on images and on text, and prompt tokens that needed no evaluation."""

    image_seconds: float = 0.0
    text_seconds: float = 0.0
    reused_tokens: int = 0


class PrefixCache:
    """Brings prefixes into the backend; used by one thread at a time."""

    def __init__(self, backend: Backend, budget_bytes: int) -> None:
        self._backend = backend
        self._budget_bytes = budget_bytes
        self._resident: tuple[Prefix, Mark] | None = None
        self._parked: OrderedDict[Prefix, tuple[NDArray[np.uint8], Mark]] = OrderedDict()

    def bring(self, prefix: Prefix, cost: Cost) -> None:
        """Make the backend hold exactly ``prefix``; adds to ``cost``.

        Errors: as the backend's; then the backend holds nothing.
        """
        if self._resident is not None and self._resident[0] is prefix:
            self._backend.rewind(self._resident[1])
        else:
            self._park()
            parked = self._parked.pop(prefix, None)
            if parked is None:
                self._evaluate(prefix, cost)
                return
            self._backend.restore(*parked)
            self._resident = prefix, parked[1]
        cost.reused_tokens = len(prefix.ids)

    def forget(self, prefix: Prefix) -> None:
        """The study is closed: free what is kept of it. Safe from any thread."""
        self._parked.pop(prefix, None)
        if self._resident is not None and self._resident[0] is prefix:
            self._resident = None

    def _park(self) -> None:
        """Copy the resident prefix out of the backend, within the budget."""
        if self._resident is not None:
            prefix, mark = self._resident
            self._resident = None
            if mark != START:
                self._backend.rewind(mark)
                self._parked[prefix] = self._backend.save(), mark
        while sum(state.nbytes for state, _ in self._parked.values()) > self._budget_bytes:
            self._parked.popitem(last=False)

    def _evaluate(self, prefix: Prefix, cost: Cost) -> None:
        self._backend.rewind(START)
        try:
            for segment in prefix.segments:
                start = time.perf_counter()
                if isinstance(segment, Picture):
                    self._backend.append_image(segment.resized_HWC)
                    cost.image_seconds += time.perf_counter() - start
                else:
                    self._backend.decode_tokens(segment)
                    cost.text_seconds += time.perf_counter() - start
        except BaseException:
            self._backend.rewind(START)
            raise
        self._resident = prefix, self._backend.mark()
