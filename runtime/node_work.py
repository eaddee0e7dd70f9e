"""The answering side of a DICOM node: one instance after the other, from the queue to its results.

What an instance cannot be asked goes to the quarantine with a reason; what the machine cannot do
now (full disk, no memory) is tried again later. An instance that ends the process again and again
waits behind the others and is set aside in the end, so that it cannot stop the node for ever.
Reasons in log and queue are words of this program; the full text of an error, which may quote the
file, stays beside the file.
"""

import errno
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from medmo_edge.dicom_pool import DecoderPool
from medmo_edge.errors import MedmoError
from medmo_edge.images import Frame, parse_window, read_image
from medmo_edge.runtime.artifact_watch import CHANGED, ArtifactWatch
from medmo_edge.runtime.generate import GenerationOptions
from medmo_edge.runtime.node_config import NodeConfig, Rule
from medmo_edge.runtime.node_log import NodeLog, hashed
from medmo_edge.runtime.node_queue import Instance, Outgoing, Queue
from medmo_edge.runtime.node_spool import INCOMING, RESULTS, Spool
from medmo_edge.runtime.results import KINDS, ResultOptions, check_sources
from medmo_edge.runtime.session import Session, Study

MAX_ATTEMPTS = 5
POSTPONE_SECONDS = 30.0
_FULL = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    errno.EAGAIN,  # no process could be started
)
_IDLE_SECONDS = 1.0


class Unanswerable(Exception):
    """An instance for the quarantine: a reason in plain words, and the full text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail or reason
        super().__init__(reason)


class Worker:
    """Answers waiting instances with ``session``, in its own thread."""

    def __init__(
        self,
        config: NodeConfig,
        spool: Spool,
        queue: Queue,
        log: NodeLog,
        session: Session,
        decoders: DecoderPool,
        watch: ArtifactWatch,
    ) -> None:
        self._config = config
        self._spool = spool
        self._queue = queue
        self._log = log
        self._session = session
        self._decoders = decoders
        self._watch = watch
        self._wake = threading.Event()

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    def run(self, stopped: threading.Event) -> None:
        """Answer until ``stopped``."""
        while not stopped.is_set():
            if self._watch.changed():
                self._halt(stopped)
                return
            self._wake.clear()
            try:
                instance = self._queue.begin(time.time())
            except sqlite3.Error as error:  # a full disk: the answer must wait
                self._log.event("waits", reason=type(error).__name__)
                stopped.wait(_IDLE_SECONDS)
                continue
            if instance is None:
                self._wake.wait(_IDLE_SECONDS)
            else:
                self._handle(instance, stopped)

    def _halt(self, stopped: threading.Event) -> None:
        """Answer nothing more: results would name an artifact that is no longer there."""
        self._log.event("halted", reason="artifact_changed", advice="start_the_node_again")
        self._spool.note(CHANGED.format("node"))
        stopped.wait()

    def _handle(self, instance: Instance, stopped: threading.Event) -> None:
        start = time.monotonic()
        try:
            state = self._answer(instance)
        # Anything else is a bug of ours, which must not stop the node for the next patient.
        except Exception as error:
            if stopped.is_set():
                self._queue.postponed(instance.id, 0, "stopped")
            else:
                self._fail(instance, error, stopped)
            return
        self._spool.remove(INCOMING, instance.file)
        seconds = f"{time.monotonic() - start:.2f}"
        self._log.event(state, id=instance.uid, seconds=seconds)

    def _fail(self, instance: Instance, error: Exception, stopped: threading.Event) -> None:
        if self._watch.changed():
            self._postpone(instance, "artifact_changed", stopped, 0)
        elif isinstance(error, Unanswerable):
            self._set_aside(instance, error)
        elif _is_want(error):
            self._postpone(instance, type(error).__name__, stopped, POSTPONE_SECONDS)
        else:
            self._set_aside(instance, Unanswerable(type(error).__name__, repr(error)))

    def _set_aside(self, instance: Instance, problem: Unanswerable) -> None:
        """First the record, then the file: a crash between leaves a file that requeue finds."""
        try:
            self._queue.quarantined(instance.id, problem.reason, time.time())
            self._spool.set_aside(instance.file, problem.detail)
        except (OSError, sqlite3.Error) as error:
            self._log.event("waits", id=instance.uid, reason=type(error).__name__)
            return
        self._log.event("quarantined", id=instance.uid, reason=problem.reason)

    def _postpone(
        self, instance: Instance, reason: str, stopped: threading.Event, seconds: float
    ) -> None:
        self._log.event("postponed", id=instance.uid, reason=reason)
        try:
            self._queue.postponed(instance.id, time.time() + seconds, reason)
        except sqlite3.Error:
            stopped.wait(seconds)

    def _answer(self, instance: Instance) -> str:
        """Answer one instance; the new state in a word."""
        if instance.attempts >= MAX_ATTEMPTS:
            raise Unanswerable(f"the node ended {MAX_ATTEMPTS} times while it answered this")
        path = self._spool.path(INCOMING, instance.file)
        frame = self._read(path)
        about = frame.source.dicom or {}
        if hashed(str(about.get("sop_instance_uid"))) != instance.uid:
            raise Unanswerable("it was sent under another UID than its data set has")
        modality, body_part = str(about.get("modality", "")), str(about.get("body_part", ""))
        rules = [
            rule
            for rule in self._config.rules
            if rule.matches(modality, body_part, instance.calling)
        ]
        results = [result for rule in rules for result in self._apply(rule, path, frame)]
        if not rules:
            self._queue.ignored(instance.id, time.time())
            return "ignored"
        if self._watch.changed():
            raise Unanswerable("the artifact was changed during the answer")  # it is asked again
        self._queue.answered(instance.id, results, time.time())
        return "answered"

    def _apply(self, rule: Rule, path: Path, first: Frame) -> Iterator[Outgoing]:
        try:
            frame = self._frame_of(rule, path, first)
            check_sources([frame], rule.results)
            with self._session.study(frame) as study:
                for number, question in enumerate(rule.questions):
                    yield from self._ask(rule, number, question, study, frame)
        except MedmoError as error:
            _raise_want(error)
            raise Unanswerable(f"{type(error).__name__} in rule {rule.name}", str(error)) from error

    def _read(self, path: Path, frame: int = 0, window: str = "") -> Frame:
        try:
            return read_image(path, frame, parse_window(window or None), decoders=self._decoders)
        except MedmoError as error:
            _raise_want(error)
            raise Unanswerable("its picture cannot be read", str(error)) from error

    def _frame_of(self, rule: Rule, path: Path, first: Frame) -> Frame:
        number = first.source.num_frames // 2 if rule.frame == "middle" else rule.frame
        if number == 0 and not rule.window:
            return first
        return self._read(path, number, rule.window)

    def _ask(
        self, rule: Rule, number: int, question: str, study: Study, frame: Frame
    ) -> Iterator[Outgoing]:
        options = GenerationOptions(
            max_new_tokens=rule.max_new_tokens, timeout_seconds=rule.timeout_seconds
        )
        answer = study.ask(question, options=options)
        if answer.finish_reason not in ("stop", "length"):
            raise Unanswerable(f"the answer of rule {rule.name} was ended by its time limit")
        about = frame.source.dicom or {}
        seed = [str(about.get("sop_instance_uid")), str(frame.source.frame), rule.name]
        seed += [str(number), question, answer.provenance.manifest_sha256]
        made = ResultOptions(
            uid_root=self._config.uid_root,
            plain_sr=rule.plain_sr,
            seed="\0".join(seed),
            question=question,
        )
        for kind in rule.results:
            content = KINDS[kind]([frame], answer, made)
            uid = hashed(_uid_of(content))
            self._spool.write(RESULTS, f"{uid}.dcm", [content])
            yield Outgoing(uid=uid, kind=kind, file=f"{uid}.dcm", destinations=rule.send_to)


def _is_want(error: Exception) -> bool:
    """Whether disk or memory is full, so that the same instance may work later."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, MemoryError | sqlite3.Error)


def _raise_want(error: BaseException) -> None:
    """Raise what is behind ``error`` when that is the machine's fault, as a full process table."""
    cause = error.__cause__
    if isinstance(cause, Exception) and _is_want(cause):
        raise cause


def _uid_of(content: bytes) -> str:
    import io

    from pydicom import dcmread

    return str(dcmread(io.BytesIO(content), specific_tags=["SOPInstanceUID"]).SOPInstanceUID)
