"""One model, many clients: a bounded queue, a fair order, and the thread that answers.

Whoever asks waits in line; lines of different clients take turns, so one that sends a hundred
questions does not starve the others. Time in the queue counts against a question's timeout. Not
done here: HTTP, batching several answers in one evaluation.
"""

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from medmo_edge.errors import MedmoError
from medmo_edge.runtime.sampling import Choice
from medmo_edge.runtime.server_metrics import Metrics
from medmo_edge.runtime.server_problems import Problem, of_error
from medmo_edge.runtime.session import Answer, Stream

HEARTBEAT_SECONDS = 5.0
_GRACE_SECONDS = 5.0  # beyond a question's timeout, before its client is told without the model


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became final, and the tokens drawn since the last piece when they are wanted."""

    text: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer, and the tokens that brought no text of their own."""

    answer: Answer
    choices: tuple[Choice, ...]


#: starts an answer: (seconds left, event that cancels it) -> Stream
Start = Callable[[float, threading.Event], Stream]


class Job:
    """One question, from its place in line to its last piece; read by one coroutine."""

    def __init__(self, start: Start, seconds: float) -> None:
        self.start = start
        self.asked_at = time.monotonic()
        self.deadline = self.asked_at + seconds
        self.seconds = seconds
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._items: deque[Piece | Finished | Problem] = deque()
        self._woken = False

    def push(self, item: Piece | Finished | Problem) -> None:
        """From the model's thread: hand ``item`` to the reader."""
        self._items.append(item)
        if not self._woken:  # one wake-up serves all pieces that arrive before the reader runs
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop is closed: nobody reads any more
                self.cancelled.set()

    async def begun(self) -> None:
        """Wait for the first piece, but no longer than a heartbeat.

        Errors: Problem when the question failed before that: it can still be a status.
        """
        if not self._items:
            await self._news()
        if self._items and isinstance(self._items[0], Problem):
            raise self._items[0]

    async def items(self) -> AsyncIterator[Piece | Finished | None]:
        """Pieces, then the end; None whenever nothing came for a heartbeat. Errors: Problem."""
        while True:
            self._ready.clear()
            self._woken = False
            while self._items:
                item = self._items.popleft()
                if isinstance(item, Problem):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
            if not await self._news():
                yield None

    async def _news(self) -> bool:
        """Wait for a wake-up: False when there was none. Errors: Problem after the deadline."""
        left = self.deadline + _GRACE_SECONDS - time.monotonic()
        if left <= 0:
            self.cancelled.set()
            raise _too_late(self.seconds)
        try:
            await asyncio.wait_for(self._ready.wait(), min(left, HEARTBEAT_SECONDS))
        except TimeoutError:
            return False
        return True

    async def finish(self) -> tuple[Answer, list[Choice]]:
        """The whole answer. Errors: Problem."""
        choices: list[Choice] = []
        async for item in self.items():
            choices += item.choices if item is not None else ()
            if isinstance(item, Finished):
                return item.answer, choices
        raise AssertionError("a job ends with Finished or a Problem")


class Engine:
    """The queue and its thread; ``close`` lets the running answer end."""

    def __init__(
        self, metrics: Metrics, *, max_waiting: int, check: Callable[[], None] = lambda: None
    ) -> None:
        """``check``: raises a Problem when no answer may be given, before and after each."""
        self._metrics = metrics
        self._check = check
        self._max_waiting = max_waiting
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._closing = False
        self._running: Job | None = None
        self._thread = threading.Thread(target=self._work, name="medmo-edge-model", daemon=True)
        self._thread.start()

    def submit(self, who: str, start: Start, seconds: float) -> Job:
        """Queue a question of ``who``; it must be answered within ``seconds``.

        Errors: Problem 429 when the queue is full, 503 when the server is stopping.
        """
        job = Job(start, seconds)
        with self._changed:
            if self._closing:
                raise _stopping()
            if self.waiting >= self._max_waiting:
                message = f"{self.waiting} questions are waiting already: try again in a moment"
                raise Problem(429, message, "queue_full", retry_after=1)
            self._lines.setdefault(who, deque()).append(job)
            self._changed.notify()
        return job

    @property
    def waiting(self) -> int:
        """Number of questions in line, without the running one."""
        return sum(len(line) for line in self._lines.values())

    @property
    def running(self) -> int:
        """1 while an answer is written."""
        return int(self._running is not None)

    def stop(self) -> None:
        """Take no more questions and send away those in line; the running answer goes on."""
        with self._changed:
            self._closing = True
            waiting = [job for line in self._lines.values() for job in line]
            self._lines.clear()
            self._changed.notify()
        for job in waiting:
            job.push(_stopping())

    def stop_soon(self) -> None:
        """``stop`` from a signal handler, which must not wait for a lock."""
        threading.Thread(target=self.stop, daemon=True).start()

    def cancel(self) -> None:
        """End the running answer as if its client had gone."""
        running = self._running
        if running is not None:
            running.cancelled.set()

    def close(self, seconds: float) -> None:
        """``stop``, wait for the running answer up to ``seconds``, then cancel it."""
        self.stop()
        self._thread.join(seconds)
        self.cancel()
        self._thread.join(_GRACE_SECONDS)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if not job.cancelled.is_set():
                self._answer(job)
            self._running = None

    def _next(self) -> Job | None:
        """The first of the line whose turn it is; that line goes to the end."""
        with self._changed:
            while not self._lines and not self._closing:
                self._changed.wait()
            if not self._lines:
                return None
            who, line = self._lines.popitem(last=False)
            self._running = job = line.popleft()
            if line:
                self._lines[who] = line
            return job

    def _answer(self, job: Job) -> None:
        try:
            left = job.deadline - time.monotonic()
            if left <= 0:
                raise _too_late(job.seconds)
            self._check()
            with job.start(left, job.cancelled) as stream:
                finished = self._read(job, stream)
            self._check()
            job.push(finished)
        except Problem as problem:
            job.push(problem)
        except MedmoError as error:
            job.push(of_error(error))
        except Exception as error:
            self._metrics.bug(error)
            job.push(Problem(500, "the answer failed: see the server's log", "internal_error"))

    def _read(self, job: Job, stream: Stream) -> Finished:
        told = 0  # choices that were handed over
        for index, piece in enumerate(stream):
            if index == 0:
                self._metrics.first_token(time.monotonic() - job.asked_at)
            choices = tuple(stream.choices[told:])
            told += len(choices)
            job.push(Piece(piece, choices))
        answer = stream.finish()
        if answer.finish_reason == "timeout" and not answer.text:
            raise _too_late(job.seconds)
        self._metrics.answered(answer, time.monotonic() - job.asked_at)
        return Finished(answer, tuple(stream.choices[told:]))


def _too_late(seconds: float) -> Problem:
    message = f"no answer began within {seconds:g} s: the server is busy or the prompt is long"
    return Problem(408, message, "timeout")


def _stopping() -> Problem:
    return Problem(503, "the server is stopping: ask again when it is back", "stopping")
