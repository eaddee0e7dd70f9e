"""Processes that decode one DICOM frame each, as ``medmo_edge.dicom`` uses them.

A process gets the open file and a request, writes its answer into a pipe and ends. This module
knows the fresh interpreter that a single call starts; ``medmo_edge.dicom_pool`` has the forked kind
for programs that read many frames. What is asked and answered is not known here.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import IO, BinaryIO, Protocol

from medmo_edge.errors import ImageError

IN_PROCESS = "MEDMO_EDGE_DICOM_IN_PROCESS"
# What an interpreter and its libraries need to start, on any system.
_KEPT = (
    *("PATH", "HOME", "LANG", "LC_", "LD_LIBRARY_PATH", "DYLD_", "PYTHON", "VIRTUAL_ENV"),
    *("SYSTEMROOT", "TEMP", "TMP"),
)


class Child(Protocol):
    """One running decoding process; ``pipe`` carries its answer. ``kill`` may come from a timer."""

    @property
    def pipe(self) -> IO[bytes]:
        """Where its answer can be read."""

    def kill(self) -> None:
        """End it now; harmless when it has ended."""

    def wait(self) -> int:
        """Its exit code once it has ended, negative for a signal."""

    def close(self) -> None:
        """Make sure that it has ended and leave nothing of it behind."""


#: starts a child for (open file, request, seconds of processor time). Errors: ImageError
Start = Callable[[BinaryIO, str, float], Child]


class Interpreter:
    """A fresh Python that imports what the file needs, answers and ends: a third of a second."""

    def __init__(self, file: BinaryIO, request: str, seconds: float) -> None:
        """Errors: ImageError when no process can be started."""
        require_python()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "medmo_edge.dicom_child", request, str(seconds)],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # codecs write there what no user can use
                env=child_environment(),
            )
        except OSError as error:
            raise cannot_start(error) from error

    @property
    def pipe(self) -> IO[bytes]:
        """See ``Child``."""
        assert self._process.stdout is not None
        return self._process.stdout

    def kill(self) -> None:
        """See ``Child``."""
        self._process.kill()

    def wait(self) -> int:
        """See ``Child``."""
        return self._process.wait()

    def close(self) -> None:
        """See ``Child``."""
        self._process.kill()
        self._process.wait()


def require_python() -> None:
    """Errors: ImageError where ``sys.executable`` is no Python, as in a frozen application."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise ImageError(f"no Python to start for decoding: set {IN_PROCESS}=1 to decode without")


def cannot_start(error: OSError) -> ImageError:
    """The error for a system that gives no more processes, pipes or memory."""
    return ImageError(f"cannot start a process for decoding ({error})")


def child_environment() -> dict[str, str]:
    """The child finds the modules this process finds, and its libraries start no threads.

    It gets no other variable, since some hold tokens, which a file that takes it over could read.
    """
    kept = {name: value for name, value in os.environ.items() if name.upper().startswith(_KEPT)}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**kept, **threads, "PYTHONPATH": path}
