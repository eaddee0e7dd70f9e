"""The durable queue of a DICOM node in SQLite: received instances and results on their way.

Every change is one transaction with a full flush (WAL, synchronous=FULL), so that what was promised
survives a power cut. Instances are named by hashed UIDs only. States: an instance is waiting, then
answered, ignored (no rule) or quarantined; a delivery is waiting, then sent or failed.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medmo_edge.errors import NodeError

Accepted = Literal["new", "again", "duplicate", "own"]
_SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,
    calling TEXT NOT NULL,
    file TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    received REAL NOT NULL,
    finished REAL
);
CREATE INDEX IF NOT EXISTS waiting_instances ON instances (state, id);
CREATE TABLE IF NOT EXISTS deliveries (
    id INTEGER PRIMARY KEY,
    instance INTEGER NOT NULL REFERENCES instances (id),
    uid TEXT NOT NULL,
    kind TEXT NOT NULL,
    file TEXT NOT NULL,
    destination TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting',
    attempts INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL,
    finished REAL,
    UNIQUE (uid, destination)
);
CREATE INDEX IF NOT EXISTS waiting_deliveries ON deliveries (destination, state, next_try);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A received instance that waits for its answer."""

    id: int
    uid: str
    calling: str
    file: str
    attempts: int
    received: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A result object that waits to be sent to one destination."""

    id: int
    uid: str
    kind: str
    file: str
    attempts: int
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A finished result object and where it must go."""

    uid: str
    kind: str
    file: str
    destinations: tuple[str, ...]


class Queue:
    """The queue in the file ``path``; thread-safe. Errors of the disk are sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        """Open or make the queue. Errors: NodeError."""
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise NodeError(f"{path} cannot be used as queue: {error}") from error
        path.chmod(0o600)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def accept(self, uid: str, calling: str, file: str, size: int, now: float) -> Accepted:
        """Record a received instance; durable when this returns.

        "duplicate": it is known and its file is not needed; "again": it was ignored or set aside
        and is tried once more; "own": it is a result of this node.
        """
        with self._change() as db:
            if db.execute("SELECT 1 FROM deliveries WHERE uid = ?", (uid,)).fetchone():
                return "own"
            known = db.execute("SELECT state FROM instances WHERE uid = ?", (uid,)).fetchone()
            if known is None:
                db.execute(
                    "INSERT INTO instances (uid, calling, file, bytes, state, received) "
                    "VALUES (?, ?, ?, ?, 'waiting', ?)",
                    (uid, calling, file, size, now),
                )
                return "new"
            if known[0] not in ("ignored", "quarantined"):
                return "duplicate"
            db.execute(
                "UPDATE instances SET state = 'waiting', file = ?, bytes = ?, calling = ?, "
                "attempts = 0, not_before = 0, reason = '', received = ?, finished = NULL "
                "WHERE uid = ?",
                (file, size, calling, now, uid),
            )
            return "again"

    def waiting(self) -> int:
        """How many instances wait for their answer."""
        rows = self._rows("SELECT count(*) FROM instances WHERE state = 'waiting'")
        return int(rows[0][0])

    def begin(self, now: float) -> Instance | None:
        """The oldest of those begun least often; that it was begun is durable on return."""
        with self._change() as db:
            row = db.execute(
                "SELECT id, uid, calling, file, attempts, received FROM instances "
                "WHERE state = 'waiting' AND not_before <= ? ORDER BY attempts, id LIMIT 1",
                (now,),
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE instances SET attempts = attempts + 1 WHERE id = ?", (row[0],))
        names = ("id", "uid", "calling", "file", "attempts", "received")
        return Instance(**dict(zip(names, row, strict=True)))

    def answered(self, instance: int, results: Sequence[Outgoing], now: float) -> None:
        """The answer of an instance and all its deliveries, in one step."""
        with self._change() as db:
            db.executemany(
                "INSERT INTO deliveries (instance, uid, kind, file, destination, created) "
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                [
                    (instance, result.uid, result.kind, result.file, destination, now)
                    for result in results
                    for destination in result.destinations
                ],
            )
            self._finish(db, instance, "answered", "", now)

    def ignored(self, instance: int, now: float) -> None:
        """No rule wants it."""
        with self._change() as db:
            self._finish(db, instance, "ignored", "no rule matches", now)

    def quarantined(self, instance: int, reason: str, now: float) -> None:
        """It cannot be processed."""
        with self._change() as db:
            self._finish(db, instance, "quarantined", reason, now)

    def _finish(
        self, db: sqlite3.Connection, instance: int, state: str, reason: str, now: float
    ) -> None:
        db.execute(
            "UPDATE instances SET state = ?, reason = ?, finished = ? WHERE id = ?",
            (state, reason, now, instance),
        )

    def postponed(self, instance: int, until: float, reason: str) -> None:
        """The machine, not the instance, is at fault: its attempt does not count."""
        with self._change() as db:
            db.execute(
                "UPDATE instances SET not_before = ?, reason = ?, attempts = attempts - 1 "
                "WHERE id = ?",
                (until, reason, instance),
            )

    def due(self, destination: str, now: float, limit: int) -> list[Delivery]:
        """Results to send now, oldest first."""
        rows = self._rows(
            "SELECT id, uid, kind, file, attempts, created FROM deliveries "
            "WHERE destination = ? AND state = 'waiting' AND next_try <= ? ORDER BY id LIMIT ?",
            *(destination, now, limit),
        )
        names = ("id", "uid", "kind", "file", "attempts", "created")
        return [Delivery(**dict(zip(names, row, strict=True))) for row in rows]

    def sent(self, delivery: Delivery, now: float) -> bool:
        """It arrived; True when no other destination needs its file any more."""
        with self._change() as db:
            db.execute(
                "UPDATE deliveries SET state = 'sent', reason = '', finished = ?, "
                "attempts = attempts + 1 WHERE id = ?",
                (now, delivery.id),
            )
            left = db.execute(
                "SELECT 1 FROM deliveries WHERE file = ? AND state != 'sent'", (delivery.file,)
            ).fetchone()
        return left is None

    def not_sent(self, delivery: Delivery, reason: str, next_try: float | None) -> None:
        """It did not arrive; ``next_try`` None gives it up."""
        with self._change() as db:
            db.execute(
                "UPDATE deliveries SET state = ?, reason = ?, next_try = ?, "
                "attempts = attempts + 1 WHERE id = ?",
                ("failed" if next_try is None else "waiting", reason, next_try or 0, delivery.id),
            )

    def quarantine_files(self) -> list[str]:
        """Names of the files set aside."""
        return [
            row[0] for row in self._rows("SELECT file FROM instances WHERE state = 'quarantined'")
        ]

    def requeue(self, now: float) -> tuple[int, int]:
        """Try again what was set aside or given up: (instances, deliveries)."""
        with self._change() as db:
            instances = db.execute(
                "UPDATE instances SET state = 'waiting', attempts = 0, not_before = 0, "
                "reason = '', finished = NULL WHERE state = 'quarantined'"
            ).rowcount
            deliveries = db.execute(
                "UPDATE deliveries SET state = 'waiting', attempts = 0, next_try = 0, "
                "created = ? WHERE state = 'failed'",
                (now,),
            ).rowcount
        return instances, deliveries

    def files(self) -> tuple[set[str], set[str]]:
        """(files of instances, result files) that are still needed."""
        incoming = self._rows(
            "SELECT file FROM instances WHERE state IN ('waiting', 'quarantined')"
        )
        results = self._rows("SELECT file FROM deliveries WHERE state != 'sent'")
        return {row[0] for row in incoming}, {row[0] for row in results}

    def forget(self, before: float) -> None:
        """Drop what was finished before then; its UIDs count as new again."""
        with self._change() as db:
            db.execute("DELETE FROM deliveries WHERE state = 'sent' AND finished < ?", (before,))
            db.execute(
                "DELETE FROM instances WHERE state IN ('answered', 'ignored') AND finished < ? "
                "AND id NOT IN (SELECT instance FROM deliveries)",
                (before,),
            )
