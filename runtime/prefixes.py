"""Kept prompt beginnings: what several conversations of one session share one KV cache with.

A prefix is a chain of segments (runs of text, pictures) that are always evaluated one by one, so
an answer does not depend on how much of its chain was still there. Every lane of the backend holds
one chain; a new prefix keeps what it has in common with its lane's, or copies it from another lane
or from bytes that were parked. A chain whose pictures would be lost is parked first (copying is
thousands of times cheaper than evaluating an image on a CPU); when parked bytes exceed their
budget, the chain unused for longest is dropped and evaluated again on its next question.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.backends import START, Backend, Mark, lanes_of
from medmo_edge.runtime.chat import Picture
from medmo_edge.runtime.steps import Encode, Pause, Steps, pieces

Segment = list[int] | Picture


@dataclass(eq=False, slots=True)
class Prefix:
    """The part of a prompt that is kept: token ids, and the same as runs and pictures.

    ``owner``: whose it is (a study), for ``PrefixCache.forget``.
    """

    ids: list[int]
    segments: Sequence[Segment] = field(repr=False)
    owner: object = None

    def shared(self, other: "Prefix") -> int:
        """Number of leading segments that are the same; pictures are compared by identity."""
        count = 0
        for mine, theirs in zip(self.segments, other.segments, strict=False):
            if mine is not theirs and (isinstance(mine, Picture) or mine != theirs):
                break
            count += 1
        return count


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


class PrefixCache:
    """Brings prefixes into the backend; used by one thread at a time but for ``forget``."""

    def __init__(self, backend: Backend, budget_bytes: int) -> None:
        self._backend = backend
        self._budget_bytes = budget_bytes
        self._residents: dict[int, _Chain] = {}  # by lane
        self._coming: dict[int, Prefix] = {}  # what is being evaluated, by lane
        self._parked: list[_Chain] = []  # the one unused for longest first
        self._lock = threading.Lock()

    def bring(self, prefix: Prefix, cost: Cost) -> None:
        """Make the backend hold exactly ``prefix``; adds to ``cost``.

        Errors: as the backend's; then the backend holds nothing.
        """
        for _ in pieces(self._backend, self.steps(prefix, cost)):
            raise AssertionError("a prefix has no text to yield")

    def steps(self, prefix: Prefix, cost: Cost, lane: int = 0) -> Steps[None]:
        """``bring`` into ``lane``, step by step; the backend's lane is ``lane`` at the end."""
        while self._is_coming(prefix, lane):
            yield Pause.SHARED
        marks = self._reuse(prefix, lane)
        cost.reused_tokens = marks[-1].cells if marks else 0
        self._coming[lane] = prefix
        try:
            yield from self._evaluate(prefix.segments[len(marks) :], lane, marks, cost)
        except BaseException:
            self.select(lane)
            self._backend.rewind(START)
            raise
        finally:
            del self._coming[lane]
        self._residents[lane] = _Chain(prefix, marks)

    def shared(self, prefix: Prefix, lane: int) -> int:
        """Number of leading segments of ``prefix`` that ``lane`` holds."""
        chain = self._residents.get(lane)
        return 0 if chain is None else chain.prefix.shared(prefix)

    def keep_lanes(self, count: int) -> None:
        """Park what is in lanes from ``count`` on, before they go."""
        with self._lock:
            for lane in [lane for lane in self._residents if lane >= count]:
                chain = self._residents.pop(lane)
                if _has_pictures(chain.prefix.segments):
                    self._park(chain, lane)

    def forget(self, owner: object) -> None:
        """A study is closed: free what is kept of it. Safe from any thread."""
        with self._lock:
            self._parked = [each for each in self._parked if each.prefix.owner is not owner]
            for lane, chain in list(self._residents.items()):
                if chain.prefix.owner is owner:
                    del self._residents[lane]

    def select(self, lane: int) -> None:
        """Make ``lane`` the backend's, when it has more than one."""
        lanes = lanes_of(self._backend)
        if lanes is not None:
            lanes.select(lane)

    def _is_coming(self, prefix: Prefix, lane: int) -> bool:
        """Whether another lane is evaluating pictures of ``prefix`` that are held nowhere yet."""
        with self._lock:
            chains = [*self._residents.values(), *self._parked]
        held = max((chain.prefix.shared(prefix) for chain in chains), default=0)
        return any(
            _has_pictures(prefix.segments[held : coming.shared(prefix)])
            for other, coming in self._coming.items()
            if other != lane
        )

    def _reuse(self, prefix: Prefix, lane: int) -> list[Mark]:
        """Put into ``lane`` what is held of ``prefix`` anywhere; the marks of these segments."""
        with self._lock:
            own = self._residents.pop(lane, None)
            found = self._best(prefix, own)
            state = None
            if found is not None and found is not own:
                state = self._copy(found) if found.state is None else found.state
            if own is not None and self._loses_pictures(own, found, prefix):
                self._park(own, lane)
            if found in self._parked:
                self._parked.remove(found)
        self.select(lane)
        if found is None:
            self._backend.rewind(START)
            return []
        if state is not None:
            self._backend.restore(state, found.marks[-1])
        marks = found.marks[: found.prefix.shared(prefix)]
        self._backend.rewind(marks[-1] if marks else START)
        return marks

    def _best(self, prefix: Prefix, own: _Chain | None) -> _Chain | None:
        """The chain, here, in another lane or parked, that shares most with ``prefix``."""
        best, most = own, own.prefix.shared(prefix) if own is not None else 0
        for chain in (*self._residents.values(), *self._parked):
            if (count := chain.prefix.shared(prefix)) > most:
                best, most = chain, count
        return best

    def _loses_pictures(self, own: _Chain, found: _Chain | None, prefix: Prefix) -> bool:
        """Whether pictures of ``own`` would be nowhere once its lane holds ``prefix``."""
        others = [chain for chain in self._residents.values() if chain is not own]
        kept = max((chain.prefix.shared(own.prefix) for chain in others), default=0)
        if found is own:
            kept = max(kept, own.prefix.shared(prefix))
        return _has_pictures(own.prefix.segments[kept:])

    def _copy(self, chain: _Chain) -> NDArray[np.uint8]:
        """The bytes of a chain that another lane holds, whatever that lane has added to it."""
        source = next(lane for lane, each in self._residents.items() if each is chain)
        self.select(source)
        return self._backend.save()

    def _park(self, chain: _Chain, lane: int) -> None:
        """Copy ``chain``, which ``lane`` holds, out of it, within the budget."""
        self.select(lane)
        self._backend.rewind(chain.marks[-1])
        self._parked.append(_Chain(chain.prefix, chain.marks, self._backend.save()))
        while sum(each.state.nbytes for each in self._parked if each.state is not None) > (
            self._budget_bytes
        ):
            self._parked.pop(0)

    def _evaluate(
        self, segments: Sequence[Segment], lane: int, marks: list[Mark], cost: Cost
    ) -> Steps[None]:
        for segment in segments:
            if isinstance(segment, Picture):
                yield from self._look(segment, lane, cost)
            else:
                yield Pause.PROMPT
                start = time.perf_counter()
                self.select(lane)
                self._backend.decode_tokens(segment)
                cost.text_seconds += time.perf_counter() - start
            marks.append(self._backend.mark())

    def _look(self, picture: Picture, lane: int, cost: Cost) -> Steps[None]:
        """Evaluate a picture, which a crew encodes while others go on."""
        start = time.perf_counter()
        rows_NR = yield Encode(picture.resized_HWC)
        self.select(lane)
        lanes = lanes_of(self._backend)
        if rows_NR is None or lanes is None:
            self._backend.append_image(picture.resized_HWC)
        else:
            yield Pause.PROMPT
            lanes.select(lane)
            lanes.append_encoded(picture.resized_HWC, rows_NR)
        cost.image_seconds += time.perf_counter() - start


def _has_pictures(segments: Sequence[Segment]) -> bool:
    return any(isinstance(each, Picture) for each in segments)
