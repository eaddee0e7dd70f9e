"""Several answers at once, in one thread: each in a lane, their tokens evaluated together.

In every round the text of waiting prompts is evaluated, for a moment, and one image; then all
others get their next token, from one evaluation as far as the backend allows. Images that take long
are encoded in a second thread meanwhile. An answer whose tokens might not fit into memory beside
the running ones waits until they have ended. On a backend without lanes one answer runs at a time.
Who comes next is decided elsewhere (server_engine.py).
"""

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError, MedmoError
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.backends import Interrupted, Lanes
from medmo_edge.runtime.stage import Part, Stage
from medmo_edge.runtime.steps import Decode, Encode, Pause, Step, Steps
from medmo_edge.runtime.streams import Stream

_PROMPT_SECONDS = 0.05  # after which prompts wait for the next token of the running answers
_BRISK_SECONDS = 0.2  # what takes less is worth neither an interrupt nor a thread
_WAIT_SECONDS = 0.05  # between two looks at the limits of answers that wait for an image


class Reader(Protocol):
    """Who is told what comes of an answer; exactly one of the last two, and last."""

    def piece(self, text: str) -> None:
        """Text became final."""

    def ended(self, answer: Answer) -> None:
        """It is complete."""

    def failed(self, error: Exception) -> None:
        """It will never be."""


@dataclass(eq=False, slots=True)
class _Seat:
    """One running answer: its lane, what it wants, and the image that is encoded for it."""

    lane: int
    part: Part
    reader: Reader
    steps: Steps[Answer]
    step: Step | None = None  # before its first
    heavy: bool = False  # its next piece of prompt encodes an image
    image: "Future[NDArray[np.float32]] | None" = field(default=None)


class Crew:
    """Performs streams of one session; but for ``wake`` and ``close``, for one thread only."""

    def __init__(self, size: int) -> None:
        """``size``: most answers at once, as ``Session.prepare`` gave it."""
        self._size = size
        self._waiting: tuple[Part, Reader] | None = None  # the next one, while there is no room
        self._refused = False  # it did not fit: no use to try before somebody leaves
        self._seats: list[_Seat] = []
        self._longest: float | None = None  # seconds that a piece of a prompt took
        self._pace: float | None = None  # seconds per value of an image that was encoded aside
        self._stage: Stage | None = None  # while the turn is ours
        self._awake = threading.Event()
        self._images = ThreadPoolExecutor(1, "medmo-edge-images")

    @property
    def size(self) -> int:
        """Answers that are running or wait for room."""
        return len(self._seats) + (self._waiting is not None)

    @property
    def has_room(self) -> bool:
        """Whether another answer may be added."""
        return self._waiting is None and len(self._seats) < self._size

    def add(self, stream: Stream, reader: Reader) -> None:
        """Perform ``stream`` from now on; whatever comes of it is told to ``reader``."""
        assert self.has_room
        self._waiting, self._refused = (stream.hand_over(), reader), False

    def advance(self) -> None:
        """One round; waits for a moment when no answer can move."""
        self._enter()
        moved = False
        if self._stage is not None:
            moved = self._look()
            moved |= self._evaluate_prompts()
            moved |= self._evaluate_tokens()
            if not self._seats and self._waiting is None:
                self._leave()
        if self.size and not moved:
            self._awake.wait(_WAIT_SECONDS)
            self._awake.clear()

    def wake(self) -> None:
        """From any thread: end the wait of ``advance``."""
        self._awake.set()

    def close(self) -> None:
        """From any thread: end all answers as if cancelled; ``advance`` goes on telling so."""
        waiting = self._waiting
        for part in [seat.part for seat in list(self._seats)] + ([waiting[0]] if waiting else []):
            part.limits.cancel()
        self.wake()

    def give_up(self, error: Exception) -> None:
        """After a failure of ``advance`` itself: no answer will be."""
        seats, waiting = list(self._seats), self._waiting
        self._seats, self._waiting = [], None
        for seat in seats:
            if seat.image is not None and not seat.image.cancel():
                seat.part.limits.cancel()
                wait([seat.image])
            seat.steps.close()
        if self._stage is not None:
            self._leave()
        for reader in [seat.reader for seat in seats] + ([waiting[1]] if waiting else []):
            reader.failed(error)

    def dismiss(self) -> None:
        """Let the second thread go; nothing may be running."""
        self._images.shutdown()

    # ---- who is on stage ----

    def _enter(self) -> None:
        """Give the answer that waits a seat, if there is room for it."""
        if self._waiting is None:
            return
        part, reader = self._waiting
        if self._stage is None and part.stage.enter(weakref.ref(self)):
            self._stage = part.stage
        if part.limits.reached():
            self._waiting = None
            reader.ended(part.nothing())
            return
        if self._stage is None or self._refused:
            return
        try:
            lane = self._lane_for(part)
        except (MedmoError, MemoryError) as error:
            if not self._seats:
                self._waiting = None
                reader.failed(error)
            lane = None
        self._refused = lane is None
        if lane is not None:
            self._waiting = None
            self._seats.append(_Seat(lane, part, reader, part.begin(lane)))

    def _lane_for(self, part: Part) -> int | None:
        """A free lane with room for ``part`` beside the others; None when there is none now.

        Of the lanes that leave no gap, the one that holds most of the prompt already.
        """
        assert self._stage is not None
        self._stage.require_open()
        taken = {seat.lane for seat in self._seats}
        end = max(taken, default=-1) + 2
        free = [lane for lane in range(min(end, self._size)) if lane not in taken]
        cells = max([part.cells, *(seat.part.cells for seat in self._seats)])
        prefixes = self._stage.prefixes
        free.sort(key=lambda lane: -prefixes.shared(part.prefix, lane))
        for lane in free:
            if self._stage.make_room(max(lane, *taken, lane) + 1, cells, self._size):
                return lane
        return None

    def _rise(self, seat: _Seat) -> None:
        """``seat`` has ended."""
        self._seats.remove(seat)
        self._refused = False

    def _leave(self) -> None:
        assert self._stage is not None
        stage, self._stage = self._stage, None
        stage.leave()

    # ---- what they do ----

    def _look(self) -> bool:
        """Hand over images that are encoded; whether there were any."""
        moved = False
        for seat in list(self._seats):
            image = seat.image
            if image is None:
                continue
            if image.done():
                seat.image, moved = None, True
                error = image.exception()
                if isinstance(error, Exception):
                    self._resume(seat, error=error)
                else:
                    self._resume(seat, image.result())
            elif seat.part.limits.reached() and image.cancel():  # it was not begun
                seat.image, moved = None, True
                self._resume(seat, error=Interrupted())
        return moved

    def _evaluate_prompts(self) -> bool:
        """Text of prompts, until the running answers have waited long enough, and one image."""
        for seat in self._seats:
            if isinstance(seat.step, Encode) and seat.image is None:
                self._encode(seat, seat.step)
        moved, started = False, time.monotonic()
        for seat in [seat for seat in self._seats if not seat.heavy]:
            while not seat.heavy and time.monotonic() - started < _PROMPT_SECONDS:
                if not self._evaluate_piece(seat):
                    break
                moved = True
        for seat in [seat for seat in self._seats if seat.heavy][:1]:
            moved |= self._evaluate_piece(seat)
        return moved

    def _evaluate_piece(self, seat: _Seat) -> bool:
        """The next piece of the prompt of ``seat``, if it is in its prompt and can go on."""
        if seat not in self._seats or not (seat.step is None or isinstance(seat.step, Pause)):
            return False
        before, start, seat.heavy = seat.step, time.monotonic(), False
        late = before is not None and seat.part.limits.reached()
        self._resume(seat, error=Interrupted() if late else None)
        if before is Pause.PROMPT:
            self._longest = max(self._longest or 0.0, time.monotonic() - start)
        return seat.step is not before or before is not Pause.SHARED

    def _evaluate_tokens(self) -> bool:
        """The next token of every answer that has one to evaluate."""
        wanted = {
            seat.lane: (seat, seat.step.token)
            for seat in self._seats
            if isinstance(seat.step, Decode)
        }
        logits = self._together({lane: token for lane, (_, token) in wanted.items()})
        for lane, (seat, token) in wanted.items():
            try:
                found = logits[lane] if lane in logits else self._alone(seat, token)
            except Exception as error:
                self._resume(seat, error=error)
            else:
                self._resume(seat, found)
        return bool(wanted)

    def _together(self, tokens: dict[int, int]) -> dict[int, NDArray[np.float32]]:
        """Logits by lane; none when they have to be evaluated one by one."""
        assert self._stage is not None
        lanes = self._stage.lanes
        if lanes is None or len(tokens) < 2:
            return {}
        try:
            return lanes.decode_lanes(tokens)
        except (GenerationError, MemoryError):  # whose fault it is shows when each is alone
            return {}

    def _alone(self, seat: _Seat, token: int) -> NDArray[np.float32]:
        """As for an answer that nobody runs beside. Errors: as ``Backend.decode_tokens``."""
        assert self._stage is not None
        self._stage.prefixes.select(seat.lane)
        backend = self._stage.backend
        backend.set_interrupt(seat.part.limits.interrupt)
        try:
            return backend.decode_tokens([token])
        finally:
            backend.set_interrupt(None)

    def _resume(self, seat: _Seat, given: Any = None, error: Exception | None = None) -> None:
        """Give ``seat`` what it waited for, and take its text until it wants something again."""
        assert self._stage is not None
        backend = self._stage.backend
        if self._longest is None or self._longest > _BRISK_SECONDS or self._size == 1:
            backend.set_interrupt(seat.part.limits.interrupt)
        try:
            step = seat.steps.send(given) if error is None else seat.steps.throw(error)
            while isinstance(step, str):
                seat.reader.piece(step)
                step = next(seat.steps)
            seat.step = step
            if isinstance(step, Encode):
                self._encode(seat, step)
        except StopIteration as end:
            self._rise(seat)
            seat.reader.ended(end.value)
        except Exception as failure:
            self._rise(seat)
            seat.steps.close()
            seat.reader.failed(failure)
        finally:
            backend.set_interrupt(None)

    def _encode(self, seat: _Seat, step: Encode) -> None:
        """Start on an image in the second thread, if the backend can and it takes long.

        The tower serves one thread at a time: who would not use the second waits until it rests.
        """
        assert self._stage is not None
        lanes, size = self._stage.lanes, step.resized_HWC.size
        brisk = self._pace is not None and self._pace * size < _BRISK_SECONDS
        if lanes is None or self._size == 1 or brisk:
            if all(each.image is None for each in self._seats):
                seat.step, seat.heavy = Pause.PROMPT, True  # it is encoded when its turn comes
            return
        stop = seat.part.limits.interrupt
        seat.image = self._images.submit(self._encode_aside, lanes, step.resized_HWC, stop)
        seat.image.add_done_callback(lambda _: self.wake())

    def _encode_aside(
        self, lanes: Lanes, resized_HWC: NDArray[np.uint8], stop: Callable[[], bool]
    ) -> NDArray[np.float32]:
        """In the second thread."""
        start = time.monotonic()
        rows_NR = lanes.encode_aside(resized_HWC, stop)
        self._pace = (time.monotonic() - start) / resized_HWC.size
        return rows_NR
