"""What a DICOM node is doing, read from its spool: counts, ages, destinations, quarantine.

Works while the node runs and when it is stopped. Instances appear as hashed UIDs; nothing here
comes from a data set.
"""

import sqlite3
import time
from typing import Any

from medmo_edge.errors import NodeError
from medmo_edge.runtime.node_config import NodeConfig
from medmo_edge.runtime.node_spool import Spool

_LISTED = 20


def node_status(config: NodeConfig) -> dict[str, Any]:
    """The state as plain JSON values. Errors: NodeError when the spool has no queue."""
    if not (config.spool / "queue.sqlite").is_file():
        raise NodeError(f"{config.spool} has no queue: no node has run there yet")
    spool = Spool(config.spool)
    try:
        db = sqlite3.connect(f"{spool.database.absolute().as_uri()}?mode=ro", uri=True)
        try:
            return _read(db, config, spool)
        finally:
            db.close()
    except sqlite3.Error as error:
        raise NodeError(f"{spool.database} cannot be read: {error}") from error


def _read(db: sqlite3.Connection, config: NodeConfig, spool: Spool) -> dict[str, Any]:
    now = time.time()
    states = dict.fromkeys(("waiting", "answered", "ignored", "quarantined"), 0)
    states |= dict(db.execute("SELECT state, count(*) FROM instances GROUP BY state"))
    oldest = db.execute("SELECT min(received) FROM instances WHERE state = 'waiting'").fetchone()
    quarantine = db.execute(
        "SELECT uid, reason, finished, file FROM instances WHERE state = 'quarantined' "
        "ORDER BY finished DESC LIMIT ?",
        (_LISTED,),
    )
    return {
        "running": spool.is_locked(),
        "attention": spool.noted(),
        "ae_title": config.ae_title,
        "listens_on": f"{config.host}:{config.port}",
        "free_mb": spool.free_bytes() // 2**20,
        "instances": states,
        "oldest_waiting_seconds": _age(oldest[0], now),
        "destinations": {name: _destination(db, name, now) for name in config.destinations},
        "quarantine": [
            {"id": uid, "reason": reason, "seconds_ago": _age(when, now), "file": file}
            for uid, reason, when, file in quarantine
        ],
    }


def _destination(db: sqlite3.Connection, name: str, now: float) -> dict[str, Any]:
    states = dict.fromkeys(("waiting", "sent", "failed"), 0)
    states |= dict(
        db.execute(
            "SELECT state, count(*) FROM deliveries WHERE destination = ? GROUP BY state", (name,)
        )
    )
    trouble = db.execute(
        "SELECT reason, attempts, created FROM deliveries WHERE destination = ? "
        "AND state = 'waiting' AND attempts > 0 ORDER BY id LIMIT 1",
        (name,),
    ).fetchone()
    if trouble is None:
        return dict(states)
    reason, attempts, created = trouble
    return {**states, "trouble": reason, "tries": attempts, "oldest_seconds": _age(created, now)}


def _age(then: float | None, now: float) -> int | None:
    return None if then is None else max(0, round(now - then))


def format_status(status: dict[str, Any]) -> str:
    """The state as lines for people."""
    states = status["instances"]
    lines = [
        f"node {status['ae_title']} on {status['listens_on']}: "
        + ("running" if status["running"] else "not running"),
        *([f"attention: {status['attention']}"] if status["attention"] else []),
        f"instances: {states['waiting']} waiting, {states['answered']} answered, "
        f"{states['ignored']} without rule, {states['quarantined']} in quarantine",
    ]
    if status["oldest_waiting_seconds"] is not None:
        lines.append(f"oldest waits {status['oldest_waiting_seconds']} s")
    for name, one in status["destinations"].items():
        line = f"to {name}: {one['waiting']} waiting, {one['sent']} sent, {one['failed']} failed"
        if "trouble" in one:
            line += f" ({one['trouble']}, {one['tries']} tries, for {one['oldest_seconds']} s)"
        lines.append(line)
    lines += [f"quarantine: {one['id']} {one['reason']}" for one in status["quarantine"]]
    lines.append(f"free: {status['free_mb']} MB")
    return "\n".join(lines)
