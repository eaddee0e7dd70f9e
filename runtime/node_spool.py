"""The files of a DICOM node: durable before they are promised, removed when nobody needs them.

A file is complete when its name exists: written beside it, flushed to the disk, renamed, and the
folder flushed too. Names are made here, never taken from a peer. The folder is for one node at a
time and readable by its user only.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from medmo_edge.errors import NodeError

INCOMING, RESULTS, QUARANTINE = "incoming", "results", "quarantine"
_NOTE = "attention.txt"
Content = bytes | memoryview
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.1


class Spool:
    """The folders ``incoming``, ``results`` and ``quarantine`` below ``folder``."""

    def __init__(self, folder: Path) -> None:
        """Make the folders. Errors: NodeError."""
        self.folder = folder
        self._lock: IO[bytes] | None = None
        try:
            for name in (INCOMING, RESULTS, QUARANTINE):
                (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise NodeError(f"{folder} cannot be the spool: {error.strerror}") from error

    @property
    def database(self) -> Path:
        """Where the queue is."""
        return self.folder / "queue.sqlite"

    def lock(self) -> None:
        """Take the spool for this process, until it ends.

        Errors: NodeError when it is taken, or the system has no file locks of this kind.
        """
        if importlib.util.find_spec("fcntl") is None:
            raise NodeError("the DICOM node needs a POSIX system, Linux for example")
        for _ in range(_LOCK_TRIES):  # somebody who asks for the status holds it for a moment
            if self._try_lock():
                return
            time.sleep(_LOCK_PAUSE)
        raise NodeError(f"{self.folder} is in use by another node: stop it first")

    def _try_lock(self) -> bool:
        import fcntl

        self._lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.unlock()
            return False
        return True

    def unlock(self) -> None:
        """Give the spool back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def is_locked(self) -> bool:
        """Whether a node runs on this spool."""
        if not self._try_lock():
            return True
        self.unlock()
        return False

    def write(self, area: str, name: str, parts: Iterable[Content]) -> Path:
        """Write a file that is on the disk when this returns. Errors: OSError; nothing is left."""
        target = self.folder / area / name
        partial = target.with_name(f".{name}.{secrets.token_hex(4)}.partial")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            self._flush_folder(area)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return target

    def path(self, area: str, name: str) -> Path:
        """Path of a file."""
        return self.folder / area / name

    def remove(self, area: str, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / area / name).unlink(missing_ok=True)

    def set_aside(self, name: str, why: str) -> None:
        """Move an incoming file to the quarantine, with the full reason beside it."""
        source = self.folder / INCOMING / name
        if source.exists():
            source.replace(self.folder / QUARANTINE / name)
            self._flush_folder(QUARANTINE)
        try:
            self.write(QUARANTINE, f"{name}.why.txt", [f"{why}\n".encode("utf-8", "replace")])
        except OSError:
            pass  # a full disk; the queue holds the short reason

    def clean(self, area: str, keep: set[str]) -> int:
        """Remove what a crash left behind: every file that the queue does not name."""
        removed = 0
        for path in (self.folder / area).iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def note(self, text: str) -> None:
        """Leave one line for ``node status``; "" removes it. A full disk is no reason to fail."""
        with contextlib.suppress(OSError):
            if text:
                (self.folder / _NOTE).write_text(f"{text}\n", encoding="utf-8")
            else:
                (self.folder / _NOTE).unlink(missing_ok=True)

    def noted(self) -> str:
        """The line that ``note`` left, or ""."""
        try:
            return (self.folder / _NOTE).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def free_bytes(self) -> int:
        """Free space for this user."""
        return shutil.disk_usage(self.folder).free

    def _flush_folder(self, area: str) -> None:
        descriptor = os.open(self.folder / area, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
