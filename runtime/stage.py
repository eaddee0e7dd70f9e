"""Where the answers of one session are given: the backend, what it keeps, and whose turn it is.

Either one answer at a time is on stage, each in its own thread, or a crew with several (crew.py).
What an answer says is decided elsewhere (session.py, generate.py).
"""

import threading
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from medmo_edge.errors import GenerationError
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.backends import Backend, Lanes, lanes_of
from medmo_edge.runtime.generate import Limits
from medmo_edge.runtime.prefixes import Prefix, PrefixCache
from medmo_edge.runtime.steps import Steps, pieces

_WAIT_SECONDS = 0.05  # between two looks at a waiting answer's limits


class Performer(Protocol):
    """Whoever is on stage; ``close`` makes them leave soon, from any thread."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One answer before it is given.

    ``cells``: the most tokens that it can grow to, prompt included. ``begin``: the answer step by
    step in a lane; ``nothing``: the answer of a question whose limits were reached before.
    """

    stage: "Stage"
    prefix: Prefix
    limits: Limits
    cells: int
    begin: Callable[[int], Steps[Answer]]
    nothing: Callable[[], Answer]


class Stage:
    """One per session."""

    def __init__(self, backend: Backend, budget_bytes: int) -> None:
        self.backend = backend
        self.prefixes = PrefixCache(backend, budget_bytes)
        self._turn = threading.Lock()
        self._holder: tuple[int, weakref.ref[Performer]] | None = None
        self._closed = False

    @property
    def lanes(self) -> Lanes | None:
        """The backend, if it can hold several conversations."""
        return lanes_of(self.backend)

    def require_open(self) -> None:
        """Errors: GenerationError after ``close``."""
        if self._closed:
            raise GenerationError("the session is closed: load the artifact again")

    def alone(self, part: Part, stream: "weakref.ref[Performer]") -> Generator[str, None, Answer]:
        """The life of one answer of ``stream``: wait for the turn, perform, leave."""
        self._end_own_stream()
        while not self.enter(stream):
            if part.limits.reached():
                return part.nothing()
        try:
            self.require_open()
            self.make_room(1, part.cells, 1)
            self.backend.set_interrupt(part.limits.interrupt)
            return (yield from pieces(self.backend, part.begin(0)))
        finally:
            self.backend.set_interrupt(None)
            self.leave()

    def enter(self, performer: "weakref.ref[Performer]") -> bool:
        """Take the turn, waiting for a moment; False when others have it. Then call ``leave``."""
        if not self._turn.acquire(timeout=_WAIT_SECONDS):
            return False
        self._holder = threading.get_ident(), performer
        return True

    def leave(self) -> None:
        """Give the turn to whoever waits for it."""
        self._holder = None
        self._turn.release()

    def make_room(self, count: int, cells: int, most: int) -> bool:
        """Have lanes 0 to ``count - 1`` with room for ``cells`` tokens each; False if impossible.

        Lanes above them may go; what was kept there is parked. ``most``: lanes there will ever be.
        """
        lanes = self.lanes
        if lanes is None or (lanes.lanes >= count and lanes.fits(lanes.lanes, cells)):
            return True
        wanted = min(most, 1 << (count - 1).bit_length())  # each change costs a new context
        for number in {wanted: None, count: None}:
            if lanes.fits(number, cells):
                self.prefixes.keep_lanes(number)
                lanes.hold(number)
                return True
        return False

    def close(self) -> None:
        """Make whoever is on stage leave, and free the model's memory; harmless when repeated."""
        self._closed = True
        holder = self._holder
        running = holder[1]() if holder is not None else None
        if running is not None:
            running.close()
        with self._turn:
            self.backend.close()

    def _end_own_stream(self) -> None:
        """Close this thread's unfinished stream, which would otherwise be waited for forever."""
        holder = self._holder
        if holder is not None and holder[0] == threading.get_ident():
            running = holder[1]()
            if running is not None:
                running.close()
