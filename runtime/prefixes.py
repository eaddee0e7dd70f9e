"""Kept prompt beginnings: what several conversations of one session share one KV cache with.

A prefix is a chain of segments (runs of text, pictures) that are always evaluated one by one, so
an answer does not depend on how much of its chain was still there. The cache holds one chain at a
time; a new prefix keeps what the two have in common. A chain whose pictures would be lost is parked
as bytes first (copying is thousands of times cheaper than evaluating an image on a CPU); when
parked bytes exceed their budget, the chain unused for longest is dropped and evaluated again on its
next question.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.backends import START, Backend, Mark
from medmo_edge.runtime.chat import Picture

Segment = list[int] | Picture


@dataclass(eq=False, slots=True)
class Prefix:
    """The part of a prompt that is kept: token ids, and the same as runs and pictures.

    ``owner``: whose it is (a study), for ``PrefixCache.forget``.
    """

    ids: list[int]
    segments: Sequence[Segment] = field(repr=False)
    owner: object = None


@dataclass(slots=True)
class Cost:
    """Seconds spent on images and on text, and prompt tokens that needed no evaluation."""

    image_seconds: float = 0.0
    text_seconds: float = 0.0
    reused_tokens: int = 0


@dataclass(eq=False, slots=True)
class _Chain:
    """An evaluated prefix: ``marks`` after each segment; ``state`` when it is parked."""

    prefix: Prefix
    marks: list[Mark]
    state: NDArray[np.uint8] | None = None

    def shared(self, prefix: Prefix) -> int:
        """Number of leading segments that are the same; pictures are compared by identity."""
        count = 0
        for mine, other in zip(self.prefix.segments, prefix.segments, strict=False):
            if mine is not other and (isinstance(mine, Picture) or mine != other):
                break
            count += 1
        return count


class PrefixCache:
    """Brings prefixes into the backend; used by one thread at a time but for ``forget``."""

    def __init__(self, backend: Backend, budget_bytes: int) -> None:
        self._backend = backend
        self._budget_bytes = budget_bytes
        self._resident: _Chain | None = None
        self._parked: list[_Chain] = []  # the one unused for longest first
        self._lock = threading.Lock()

    def bring(self, prefix: Prefix, cost: Cost) -> None:
        """Make the backend hold exactly ``prefix``; adds to ``cost``.

        Errors: as the backend's; then the backend holds nothing.
        """
        with self._lock:
            chain, self._resident = self._best(prefix), None
        if chain is not None and chain.state is not None:
            self._backend.restore(chain.state, chain.marks[-1])
        shared = chain.shared(prefix) if chain is not None else 0
        marks = chain.marks[:shared] if chain is not None else []
        self._backend.rewind(marks[-1] if marks else START)
        cost.reused_tokens = marks[-1].cells if marks else 0
        self._evaluate(prefix.segments[shared:], marks, cost)
        self._resident = _Chain(prefix, marks)

    def forget(self, owner: object) -> None:
        """A study is closed: free what is kept of it. Safe from any thread."""
        with self._lock:
            self._parked = [each for each in self._parked if each.prefix.owner is not owner]
            if self._resident is not None and self._resident.prefix.owner is owner:
                self._resident = None

    def _best(self, prefix: Prefix) -> _Chain | None:
        """The chain that shares most with ``prefix``; a resident one that would be lost is parked.

        The parked one that is returned is no longer in the list.
        """
        resident = self._resident
        best, most = resident, resident.shared(prefix) if resident is not None else 0
        for chain in self._parked:
            if (count := chain.shared(prefix)) > most:
                best, most = chain, count
        if resident is not None and self._loses_pictures(resident, best, most):
            self._park(resident)
        if best is not resident and best in self._parked:
            self._parked.remove(best)
        return best

    @staticmethod
    def _loses_pictures(resident: _Chain, best: _Chain | None, shared: int) -> bool:
        kept = shared if best is resident else 0
        return any(isinstance(each, Picture) for each in resident.prefix.segments[kept:])

    def _park(self, chain: _Chain) -> None:
        """Copy ``chain``, which the backend holds, out of it, within the budget."""
        self._backend.rewind(chain.marks[-1])
        self._parked.append(_Chain(chain.prefix, chain.marks, self._backend.save()))
        while sum(each.state.nbytes for each in self._parked if each.state is not None) > (
            self._budget_bytes
        ):
            self._parked.pop(0)

    def _evaluate(self, segments: Sequence[Segment], marks: list[Mark], cost: Cost) -> None:
        try:
            for segment in segments:
                start = time.perf_counter()
                if isinstance(segment, Picture):
                    self._backend.append_image(segment.resized_HWC)
                    cost.image_seconds += time.perf_counter() - start
                else:
                    self._backend.decode_tokens(segment)
                    cost.text_seconds += time.perf_counter() - start
                marks.append(self._backend.mark())
        except BaseException:
            self._backend.rewind(START)
            raise
