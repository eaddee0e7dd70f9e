"""Decoding processes for programs that read many frames: one fork each, of a template kept ready.

A template (``medmo_edge.dicom_template``) has imported every decoder and waits; for each frame it
forks a child that decodes this one frame under the limits of ``medmo_edge.dicom`` and ends. So a
frame costs milliseconds instead of the imports, and no process ever holds the data of two files. A
template reads no file itself. It is replaced when a child of it crashed, was stopped or ran out of
memory, and after FRAMES_PER_TEMPLATE frames, since all its children share one address layout.
Linux only: elsewhere every frame gets a fresh interpreter, as without a pool.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import IO, BinaryIO, Self

from medmo_edge.dicom_process import (
    IN_PROCESS,
    Child,
    Interpreter,
    cannot_start,
    child_environment,
    require_python,
)
from medmo_edge.errors import ImageError

FRAMES_PER_TEMPLATE = 1000
MAX_REQUEST_BYTES = 2**16
#: what a template sends when a child has ended: its exit code
EXIT_CODE = struct.Struct("<i")
_END_SECONDS = 2.0  # for a child that has answered to end


class DecoderPool:
    """At most ``size`` frames at a time, each in a process of its own; thread-safe.

    For ``read_image(..., decoders=pool)``. Use it as a context manager, or call ``close``.
    """

    def __init__(self, size: int) -> None:
        """Starts nothing yet: see ``warm``."""
        self._places = threading.Semaphore(size)
        self._size = size
        self._lock = threading.Lock()
        self._idle: list[_Template] = []
        self._closed = False

    def warm(self) -> None:
        """Start all templates now, without waiting for their imports. Errors: ImageError."""
        if sys.platform != "linux" or os.environ.get(IN_PROCESS) == "1":
            return
        for _ in range(self._size):
            self._give_back(_Template())

    def start(self, file: BinaryIO, request: str, seconds: float) -> Child:
        """A child that decodes; waits for a free place. Errors: ImageError."""
        if sys.platform != "linux":
            return Interpreter(file, request, seconds)
        message = f"{seconds} {request}".encode()
        if len(message) > MAX_REQUEST_BYTES:
            raise ImageError("the name of the window is too long")
        self._places.acquire()
        try:
            return self._fork(file, message)
        except BaseException:
            self._places.release()
            raise

    def _fork(self, file: BinaryIO, message: bytes) -> "_Fork":
        for left in range(self._size, -1, -1):  # templates can have been killed while they waited
            template = self._take()
            try:
                return _Fork(self, template, template.fork(file, message))
            except OSError as error:
                template.close()
                if left == 0:
                    raise cannot_start(error) from error
        raise AssertionError("unreachable")

    def _take(self) -> "_Template":
        with self._lock:
            if self._closed:
                raise ImageError("the decoders are closed")
            if self._idle:
                return self._idle.pop()
        return _Template()

    def ended(self, template: "_Template", code: int) -> None:
        """A child of ``template`` has ended with ``code``: its place is free."""
        try:
            if code == 0 and template.frames < FRAMES_PER_TEMPLATE:
                self._give_back(template)
            else:
                template.close()
                with contextlib.suppress(ImageError):  # then the next frame says so
                    self._give_back(_Template())
        finally:
            self._places.release()

    def _give_back(self, template: "_Template") -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(template)
                return
        template.close()

    def close(self) -> None:
        """End all templates; those at work end with their frame. Harmless when called again."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for template in idle:
            template.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Template:
    """One template process, the leader of a process group that holds its child too."""

    def __init__(self) -> None:
        """Errors: ImageError."""
        require_python()
        self.frames = 0
        self._lock = threading.Lock()
        self._code: int | None = None
        try:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise cannot_start(error) from error
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "medmo_edge.dicom_template"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                start_new_session=True,
            )
        except OSError as error:
            self._socket.close()
            raise cannot_start(error) from error
        finally:
            theirs.close()

    def fork(self, file: BinaryIO, message: bytes) -> IO[bytes]:
        """The pipe of a new child that was given ``file`` and ``message``. Errors: OSError."""
        self.frames += 1
        reading, writing = os.pipe()
        try:
            socket.send_fds(self._socket, [message], [file.fileno(), writing])
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return os.fdopen(reading, "rb")

    def exit_code(self, seconds: float | None) -> int | None:
        """The exit code of the child, or of the template if that ended; None: not in time."""
        self._socket.settimeout(seconds)
        try:
            message = self._socket.recv(EXIT_CODE.size)
        except TimeoutError:
            return None
        except OSError:
            message = b""
        if len(message) == EXIT_CODE.size:
            return int(EXIT_CODE.unpack(message)[0])
        self.kill()
        return self._wait()

    def kill(self) -> None:
        """End the template and its child now."""
        with self._lock:
            if self._code is None:  # not reaped yet: the number is still ours
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _wait(self) -> int:
        """Reap it. The lock is held only when it has ended: ``kill`` must never wait."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._code = self._process.wait()
            return self._code

    def close(self) -> None:
        """End it and forget it."""
        self.kill()
        if self._code is None:
            self._wait()
        self._socket.close()


class _Fork:
    """One child of a template; see ``Child``."""

    def __init__(self, pool: DecoderPool, template: _Template, pipe: IO[bytes]) -> None:
        self.pipe = pipe
        self._pool = pool
        self._template = template
        self._lock = threading.Lock()
        self._code: int | None = None
        self._closed = False

    def kill(self) -> None:
        """The template is ended, too: it alone may end its child, and is busy waiting for it."""
        with self._lock:
            if not self._closed:  # afterwards the template may work for somebody else
                self._template.kill()

    def wait(self) -> int:
        """See ``Child``."""
        if self._code is None:
            self._code = self._template.exit_code(None)
        assert self._code is not None
        return self._code

    def close(self) -> None:
        """See ``Child``; a child that has answered but does not end is killed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._code is None:
            self._code = self._template.exit_code(_END_SECONDS)
        self._pool.ended(self._template, -1 if self._code is None else self._code)
