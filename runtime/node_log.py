"""One line per event of a DICOM node, safe to show to anybody: no patient, no way to forge a line.

Instances are named by a hash of their SOP Instance UID. Values that come from outside are reduced
to plain characters, so that nobody can write a second line or an escape sequence into the log.
"""

import hashlib
import re
import sys
import threading
from datetime import UTC, datetime
from typing import TextIO

_UNSAFE = re.compile(r"[^A-Za-z0-9_.:+-]+")
_MAX_VALUE = 80


def hashed(uid: str) -> str:
    """The name of an instance in queue, log and status: 32 hex digits."""
    return hashlib.sha256(uid.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def safe(value: object) -> str:
    """``value`` in plain characters, at most 80, never empty."""
    return _UNSAFE.sub("_", str(value))[:_MAX_VALUE] or "-"


class NodeLog:
    """Writes events as ``2026-11-22T05:00:00Z stored id=3f2a... from=CT1``; thread-safe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def event(self, name: str, **values: object) -> None:
        """Write one event; a log that cannot be written stops nothing."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        words = " ".join(f"{key}={safe(value)}" for key, value in values.items())
        with self._lock:
            try:
                print(now, safe(name), words, file=self._stream or sys.stderr, flush=True)
            except OSError:
                pass
