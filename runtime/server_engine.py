"""One model, many clients: a bounded queue, a fair order, and the thread that answers.

Whoever asks waits in line; lines of different clients take turns, so one that sends a hundred
questions does not starve the others. Time in the queue counts against a question's timeout. Not
done here: HTTP, and how several answers run at once (crew.py).
"""

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from medmo_edge.errors import MedmoError
from medmo_edge.runtime.crew import Crew
from medmo_edge.runtime.sampling import Choice
from medmo_edge.runtime.server_metrics import Metrics
from medmo_edge.runtime.server_problems import Problem, of_error
from medmo_edge.runtime.session import Answer, Stream

HEARTBEAT_SECONDS = 5.0
_GATHER_SECONDS = 0.02  # pieces that come sooner after others than this leave together
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
        self._complete = asyncio.Event()
        self._items: deque[Piece | Finished | Problem] = deque()
        self._woken = False
        self._left = False

    def push(self, item: Piece | Finished | Problem) -> None:
        """From the model's thread: hand ``item`` to the reader, now."""
        self.add(item)
        if not isinstance(item, Piece):
            self._woken = False  # for the last time, whoever may have been told
        _wake([self])

    def add(self, item: Piece | Finished | Problem) -> None:
        """The same, but the reader is told later, by ``push`` or ``_wake``."""
        self._items.append(item)

    def leave(self) -> None:
        """The reader's client has gone: end the answer, and ``batches`` at once."""
        self.cancelled.set()
        self._left = True
        self._ready.set()
        self._complete.set()

    async def begun(self) -> None:
        """Wait for the first piece, but no longer than a heartbeat.

        Errors: Problem when the question failed before that: it can still be a status.
        """
        if not self._items:
            await self._news()
        if self._left:
            raise _gone()
        if self._items and isinstance(self._items[0], Problem):
            raise self._items[0]

    async def batches(self) -> AsyncIterator[list[Piece | Finished]]:
        """All that is there, again and again to the end; empty when nothing came for a heartbeat.

        Ends early when the client has gone. Errors: Problem.
        """
        while not self._left:
            self._ready.clear()
            self._woken = False
            batch: list[Piece | Finished] = []
            while self._items and not isinstance(self._items[0], Problem):
                item = self._items.popleft()
                assert not isinstance(item, Problem)
                batch.append(item)
            if batch:
                yield batch
                if isinstance(batch[-1], Finished):
                    return
                await self._gather()
            if self._items and isinstance(problem := self._items[0], Problem):
                raise problem
            if not self._items and not await self._news():
                yield []

    async def _gather(self) -> None:
        """Let some more pieces come, but do not hold up the end."""
        try:
            async with asyncio.timeout(_GATHER_SECONDS):
                await self._complete.wait()
        except TimeoutError:
            pass

    async def _news(self) -> bool:
        """Wait for a wake-up: False when there was none. Errors: Problem after the deadline."""
        left = self.deadline + _GRACE_SECONDS - time.monotonic()
        if left <= 0:
            self.cancelled.set()
            raise _too_late(self.seconds)
        try:
            async with asyncio.timeout(min(left, HEARTBEAT_SECONDS)):
                await self._ready.wait()
        except TimeoutError:
            return False
        return True

    async def finish(self) -> tuple[Answer, list[Choice]]:
        """The whole answer. Errors: Problem."""
        choices: list[Choice] = []
        async for batch in self.batches():
            for item in batch:
                choices += item.choices
                if isinstance(item, Finished):
                    return item.answer, choices
        raise _gone()


def _wake(jobs: Sequence[Job]) -> None:
    """Tell the readers of ``jobs`` that there is news, with one wake-up for all of a loop.

    Whoever wakes the loop gives it the interpreter's lock, and waits to get it back.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
    for job in jobs:
        if not job._woken:  # one wake-up serves all pieces that arrive before the reader runs
            job._woken = True
            by_loop.setdefault(job._loop, []).append(job)
    for loop, news in by_loop.items():
        try:
            loop.call_soon_threadsafe(_tell, news)
        except RuntimeError:  # the loop is closed: nobody reads any more
            for job in news:
                job.cancelled.set()


def _tell(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job._ready.set()
        if job._items and not isinstance(job._items[-1], Piece):
            job._complete.set()


class Engine:
    """The queue and its thread; ``close`` lets the running answers end."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_waiting: int,
        check: Callable[[], None] = lambda: None,
        parallel: int = 1,
    ) -> None:
        """``check``: raises a Problem when no answer may be given, before and after each.

        ``parallel``: most answers at once, as ``Session.prepare`` gave it.
        """
        self._metrics = metrics
        self._check = check
        self._max_waiting = max_waiting
        self._parallel = parallel
        self._crew = Crew(parallel)
        self._running: list[Job] = []
        self._news: list[Job] = []  # that have pieces of which nobody was told
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._closing = False
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
            begins_soon = self._parallel - len(self._running)  # of those in line
            if (waiting := self.waiting - begins_soon) >= self._max_waiting:
                message = f"{waiting} questions are waiting already: try again in a moment"
                raise Problem(429, message, "queue_full", retry_after=1)
            self._lines.setdefault(who, deque()).append(job)
            self._changed.notify()
        self._crew.wake()
        return job

    @property
    def waiting(self) -> int:
        """Number of questions in line, without the running ones."""
        return sum(len(line) for line in self._lines.values())

    @property
    def running(self) -> int:
        """Number of answers that are being written."""
        return len(self._running)

    def stop(self) -> None:
        """Take no more questions and send away those in line; the running answers go on."""
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
        """End the running answers as if their clients had gone."""
        for job in list(self._running):
            job.cancelled.set()

    def close(self, seconds: float) -> None:
        """``stop``, wait for the running answers up to ``seconds``, then cancel them."""
        self.stop()
        self._thread.join(seconds)
        self.cancel()
        self._thread.join(_GRACE_SECONDS)

    def _work(self) -> None:
        while True:
            while self._crew.has_room and (job := self._next()) is not None:
                self._begin(job)
            if not self._running:
                break
            try:
                self._crew.advance()
            except Exception as error:  # the next questions may still be answered
                self._crew.give_up(error)
            _wake(self._news)
            self._news.clear()
        self._crew.dismiss()

    def _next(self) -> Job | None:
        """The first of the line whose turn it is; that line goes to the end.

        Waits for one when no answer is running. None: there is none now, or it is time to stop.
        """
        with self._changed:
            while not (self._lines or self._closing or self._running):
                self._changed.wait()
            if not self._lines:
                return None
            who, line = self._lines.popitem(last=False)
            job = line.popleft()
            self._running.append(job)
            if line:
                self._lines[who] = line
            return job

    def _begin(self, job: Job) -> None:
        """Start the answer of ``job`` unless nobody wants it any more."""
        over, later = self._running.remove, self._news.append
        reading = _Reading(job, self._metrics, self._check, over, later)
        if job.cancelled.is_set():
            self._running.remove(job)
            return
        try:
            left = job.deadline - time.monotonic()
            if left <= 0:
                raise _too_late(job.seconds)
            self._check()
            stream = job.start(left, job.cancelled)
        except Exception as error:
            reading.failed(error)
        else:
            reading.choices = stream.choices
            self._crew.add(stream, reading)


class _Reading:
    """Passes what comes of one answer on to its job; see ``crew.Reader``."""

    def __init__(
        self,
        job: Job,
        metrics: Metrics,
        check: Callable[[], None],
        over: Callable[[Job], None],
        later: Callable[[Job], None],
    ) -> None:
        """``over``: takes a job that has ended; ``later``: one whose reader is to be woken."""
        self.choices: list[Choice] = []
        self._told = 0  # of the choices
        self._begun = False
        self._job, self._metrics, self._check = job, metrics, check
        self._over, self._later = over, later

    def piece(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            self._metrics.first_token(time.monotonic() - self._job.asked_at)
            self._job.push(Piece(text, self._fresh()))
        else:  # the evaluation of the next tokens lets the readers run
            self._job.add(Piece(text, self._fresh()))
            self._later(self._job)

    def ended(self, answer: Answer) -> None:
        try:
            if answer.finish_reason == "timeout" and not answer.text:
                raise _too_late(self._job.seconds)
            self._metrics.answered(answer, time.monotonic() - self._job.asked_at)
            self._check()
        except Exception as error:
            self.failed(error)
        else:
            self._over(self._job)
            self._job.push(Finished(answer, self._fresh()))

    def failed(self, error: Exception) -> None:
        self._over(self._job)
        if isinstance(error, Problem):
            self._job.push(error)
        elif isinstance(error, MedmoError):
            self._job.push(of_error(error))
        else:
            self._metrics.bug(error)
            message = "the answer failed: see the server's log"
            self._job.push(Problem(500, message, "internal_error"))

    def _fresh(self) -> tuple[Choice, ...]:
        new = tuple(self.choices[self._told :])
        self._told += len(new)
        return new


def _too_late(seconds: float) -> Problem:
    message = f"no answer began within {seconds:g} s: the server is busy or the prompt is long"
    return Problem(408, message, "timeout")


def _gone() -> Problem:
    return Problem(499, "the client has gone", "client_gone")  # nginx's number; nobody reads it


def _stopping() -> Problem:
    return Problem(503, "the server is stopping: ask again when it is back", "stopping")
