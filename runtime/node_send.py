"""The sending side of a DICOM node: one thread per destination, retry with back-off, never a loss.

A slow or dead destination holds up nobody else. A delivery is tried until it arrives or its time is
over; then it stays as failed, with its file, until somebody requeues it. A destination sees the
same SOP Instance UID again only when its acknowledgement was lost or not yet recorded.
"""

import random
import sqlite3
import threading
import time

from medmo_edge.runtime.node_config import Destination, NodeConfig
from medmo_edge.runtime.node_log import NodeLog
from medmo_edge.runtime.node_peers import Sent, send_files
from medmo_edge.runtime.node_queue import Delivery, Queue
from medmo_edge.runtime.node_spool import RESULTS, Spool

_BATCH = 50
_IDLE_SECONDS = 1.0


class Sender:
    """Sends what is due for ``destination``."""

    def __init__(
        self, config: NodeConfig, destination: Destination, spool: Spool, queue: Queue, log: NodeLog
    ) -> None:
        self._config = config
        self._destination = destination
        self._spool = spool
        self._queue = queue
        self._log = log
        self._wake = threading.Event()
        self._misses = 0  # tries in a row that reached nobody

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def run(self, stopped: threading.Event) -> None:
        """Send until ``stopped``."""
        while not stopped.is_set():
            self._wake.clear()
            try:
                due = self._queue.due(self._destination.name, time.time(), _BATCH)
                if due:
                    self._send(due)
                else:
                    self._wake.wait(_IDLE_SECONDS)
            # sqlite3.Error: a full disk. Anything else is a bug of ours or of a library, which
            # must not end the deliveries of all other results.
            except Exception as error:
                self._log.event("waits", to=self._destination.name, reason=type(error).__name__)
                stopped.wait(self._config.retry_seconds)
            if self._misses:
                stopped.wait(self._pause(self._misses))

    def _send(self, due: list[Delivery]) -> None:
        there = [delivery for delivery in due if self._has_file(delivery)]
        files = [self._spool.path(RESULTS, delivery.file) for delivery in there]
        results = send_files(self._destination, files) if files else iter(())
        for delivery, sent in zip(there, results, strict=False):
            self._record(delivery, sent)
            self._misses = 0 if sent.reachable else self._misses + 1

    def _has_file(self, delivery: Delivery) -> bool:
        if self._spool.path(RESULTS, delivery.file).is_file():
            return True
        self._queue.not_sent(delivery, "its file is gone", None)
        self._log.event("failed", id=delivery.uid, to=self._destination.name, reason="file_gone")
        return False

    def _record(self, delivery: Delivery, sent: Sent) -> None:
        now, to = time.time(), self._destination.name
        if sent.delivered:
            if self._queue.sent(delivery, now):
                self._spool.remove(RESULTS, delivery.file)
            self._log.event("sent", id=delivery.uid, kind=delivery.kind, to=to)
            return
        over = now - delivery.created > self._config.give_up_after_hours * 3600
        next_try = None if over else now + self._pause(delivery.attempts + 1)
        try:
            self._queue.not_sent(delivery, sent.reason, next_try)
        except sqlite3.Error:
            self._misses += 1  # cannot even be noted: go slowly
        event = "failed" if over else "retry"
        self._log.event(event, id=delivery.uid, kind=delivery.kind, to=to, reason=sent.reason)

    def _pause(self, tries: int) -> float:
        """Seconds before the next try: doubling, limited, and not all nodes at once."""
        base = self._config.retry_seconds * 2.0 ** min(tries - 1, 30)
        return min(base, self._config.max_retry_seconds) * random.uniform(0.8, 1.2)
