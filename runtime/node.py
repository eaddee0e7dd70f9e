"""A DICOM node: receives images, asks the rules' questions, sends the results; loses nothing.

Kill it at any point and start it again: every acknowledged instance is answered exactly once, with
the same result UIDs. One model, one answer at a time. Research use only: results are unverified.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from medmo_edge.dicom_pool import DecoderPool
from medmo_edge.errors import NodeError
from medmo_edge.runtime.artifact_watch import ArtifactWatch
from medmo_edge.runtime.node_config import NodeConfig, read_node_config
from medmo_edge.runtime.node_log import NodeLog
from medmo_edge.runtime.node_peers import client_tls
from medmo_edge.runtime.node_queue import Queue
from medmo_edge.runtime.node_receive import Receiver
from medmo_edge.runtime.node_send import Sender
from medmo_edge.runtime.node_spool import INCOMING, QUARANTINE, RESULTS, Spool
from medmo_edge.runtime.node_status import format_status, node_status
from medmo_edge.runtime.node_work import Worker
from medmo_edge.runtime.quiet import silence_libraries
from medmo_edge.runtime.results import check_dicom_extra
from medmo_edge.runtime.session import Session, load

_FORGET_SECONDS = 3600.0
_STOP_SECONDS = 10.0


class Node:
    """One running node; use it as a context manager."""

    def __init__(self, config: NodeConfig, session: Session, log: NodeLog | None = None) -> None:
        """Take the spool and put it in order. Errors: NodeError."""
        check_libraries()
        check_certificates(config)
        self.config = config
        self.log = log or NodeLog()
        self._session = session
        self._spool = Spool(config.spool)
        self._spool.lock()
        self._queue = Queue(self._spool.database)
        self._stopped = threading.Event()
        self._watch = ArtifactWatch.of(session)
        self._decoders = DecoderPool(1)
        parts = config, self._spool, self._queue, self.log
        self._worker = Worker(*parts, session, self._decoders, self._watch)
        self._senders = [
            Sender(config, destination, *parts[1:]) for destination in config.destinations.values()
        ]
        self._receiver = Receiver(*parts, received=self._worker.wake, watch=self._watch)
        self._threads: list[threading.Thread] = []

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._receiver.port

    def start(self) -> None:
        """Clean up after a crash, then work, send and listen. Errors: NodeError."""
        self._recover()
        self._spool.note("")
        self._decoders.warm()
        self._receiver.start()
        runs: list[Callable[[threading.Event], None]] = [self._worker.run, self._forget]
        runs += [sender.run for sender in self._senders]
        for run in runs:
            thread = threading.Thread(target=run, args=(self._stopped,), daemon=True)
            thread.start()
            self._threads.append(thread)
        self.log.event("listening", ae=self.config.ae_title, port=self.port)

    def stop(self) -> None:
        """Accept nothing more, give up the running answer (it is asked again), close the queue."""
        self._stopped.set()
        self._receiver.stop()
        self._session.close()
        self._worker.wake()
        for sender in self._senders:
            sender.wake()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)
        self._decoders.close()
        self._queue.close()
        self._spool.unlock()
        self.log.event("stopped")

    def wait(self) -> None:
        """Until somebody interrupts."""
        while not self._stopped.wait(1.0):
            pass

    def _recover(self) -> None:
        """Files without a place in the queue were never promised; the others go on."""
        for file in self._queue.quarantine_files():
            if self._spool.path(INCOMING, file).exists():
                self._spool.set_aside(file, "interrupted while it was set aside")
        instances, results = self._queue.files()
        removed = self._spool.clean(INCOMING, instances)
        removed += self._spool.clean(RESULTS, results)
        reasons = {f"{file}.why.txt" for file in instances}
        removed += self._spool.clean(QUARANTINE, instances | reasons)
        self.log.event("recovered", waiting=self._queue.waiting(), removed=removed)

    def _forget(self, stopped: threading.Event) -> None:
        """Once an hour, drop what was finished long ago."""
        while not stopped.wait(_FORGET_SECONDS):
            self._queue.forget(time.time() - self.config.remember_days * 86400)

    def __enter__(self) -> "Node":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def node_command(
    word: str, config_path: Path, *, as_json: bool, backend: str, threads: int | None
) -> str:
    """What ``medmo-edge node`` does: serve an artifact, or "status" or "requeue"; text to print.

    Errors: NodeError and those of ``load``.
    """
    config = read_node_config(config_path)
    if word == "status":
        status = node_status(config)
        return json.dumps(status, indent=2) if as_json else format_status(status)
    if word == "requeue":
        instances, deliveries = requeue(config)
        return f"requeued {instances} instances and {deliveries} deliveries"
    run_node(word, config, backend=backend, threads=threads)
    return ""


def run_node(artifact: str, config: NodeConfig, *, backend: str, threads: int | None) -> None:
    """Load ``artifact`` and serve until interrupted. Errors: NodeError and those of ``load``."""
    check_libraries()
    log = NodeLog()
    silence_libraries(lambda where, kind: log.event("lost", reason=kind, where=where))
    session = load(artifact, backend, threads=threads)
    try:
        node = Node(config, session, log)
    except BaseException:
        session.close()
        raise
    try:
        node.start()
        node.wait()
    except KeyboardInterrupt:
        pass  # that is how a service is stopped: nothing went wrong
    finally:
        node.stop()


def requeue(config: NodeConfig) -> tuple[int, int]:
    """Try again what was set aside or given up: (instances, deliveries). The node must be stopped.

    Errors: NodeError.
    """
    spool = Spool(config.spool)
    spool.lock()
    try:
        queue = Queue(spool.database)
        for file in queue.quarantine_files():
            if spool.path(QUARANTINE, file).exists():
                spool.path(QUARANTINE, file).replace(spool.path(INCOMING, file))
            spool.remove(QUARANTINE, f"{file}.why.txt")
        counts = queue.requeue(time.time())
        queue.close()
        return counts
    finally:
        spool.unlock()


def check_libraries() -> None:
    """Errors: NodeError when the dicom extra is not installed."""
    check_dicom_extra()
    try:
        import pynetdicom  # noqa: F401
    except ModuleNotFoundError as error:
        raise NodeError("the node needs pynetdicom: pip install 'medmo-edge[dicom]'") from error


def check_certificates(config: NodeConfig) -> None:
    """Errors: NodeError when the PEM files for a destination cannot be used."""
    for name, destination in config.destinations.items():
        try:
            client_tls(destination)
        except OSError as error:  # ssl.SSLError is one
            reason = getattr(error, "reason", None) or error.strerror
            raise NodeError(
                f"[destinations.{name}.tls]: the PEM files cannot be used ({reason})"
            ) from error
