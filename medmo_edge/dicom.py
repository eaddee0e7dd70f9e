"""DICOM files in: the parent side of a child process that parses, decodes and renders one frame.

The child (``medmo_edge.dicom_child``) gets the open file, a memory limit and a deadline; a decoder
that crashes, hangs or eats memory costs one error line. Nothing of the file is parsed in this
process, and pydicom is not imported here. One child per frame, never two frames in one: a fresh
interpreter takes a third of a second, mostly imports, a fork of a ``DecoderPool`` milliseconds.
Where no child can be started (a frozen application, an embedded interpreter), set
MEDMO_EDGE_DICOM_IN_PROCESS=1: the budgets then hold, the memory limit and the deadline do not.
"""

import json
import os
import signal
import threading
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medmo_edge.dicom_process import IN_PROCESS, Interpreter, Start
from medmo_edge.dicom_square import resample
from medmo_edge.errors import ImageError
from medmo_edge.image_budgets import CHILD_WALL_FACTOR, check_pixels, child_seconds

MAX_ANSWER_LINE = 2**20

WindowRequest = str | int | tuple[float, float] | None


def read_dicom(
    file: BinaryIO, frame: int, window: WindowRequest, start: Start = Interpreter
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """(uint8 [H, W, 3], values for a Source) of frame ``frame`` of an open DICOM file.

    ``start`` makes the process that decodes. Errors: ImageError.
    """
    request = json.dumps({"frame": frame, "window": _checked(window)})
    if os.environ.get(IN_PROCESS) == "1":
        from medmo_edge.dicom_child import answer

        reply, pixels = answer(file, request)
    else:
        reply, pixels = _ask_child(start, file, request)
    if pixels is None:
        raise ImageError(reply["error"])
    source = reply["source"]
    source["notes"] = tuple(source["notes"])
    width, height = reply["size"]
    pixels = resample(pixels, (width, height))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, np.newaxis], 3, axis=2)
    return np.ascontiguousarray(pixels), source


def _checked(window: object) -> object:
    if window is None or isinstance(window, str | int) and not isinstance(window, bool):
        return window
    if isinstance(window, tuple | list) and len(window) == 2:
        try:
            return [float(value) for value in window]
        except (TypeError, ValueError):
            pass
    raise ImageError(f"window {window!r} is no name, number or (center, width)")


def _ask_child(
    start: Start, file: BinaryIO, request: str
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    seconds = child_seconds(os.fstat(file.fileno()).st_size)
    child = start(file, request, seconds)
    late = threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds * CHILD_WALL_FACTOR, stop)
    timer.daemon = True
    timer.start()
    try:
        with child.pipe as pipe:
            reply = _receive(pipe)
        # It has closed its end: the reason is in its exit code.
        code = child.wait() if reply is None else 0
    finally:
        timer.cancel()
        child.close()
    if reply is None:
        raise ImageError(_ending(code, late.is_set(), seconds))
    return reply


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], NDArray[np.uint8] | None] | None:
    """The child's answer: one line of JSON, then the pixels; None when it ended before.

    The child has handled hostile bytes: its answer is checked like any other input.
    """
    line = pipe.readline(MAX_ANSWER_LINE)
    if not line.endswith(b"\n"):
        return None
    try:
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            return {"error": str(reply["error"])}, None
        height, width, *samples = (int(number) for number in reply["shape"])
        check_pixels(width, height)
        check_pixels(*reply["size"])
        reply["source"]["notes"] = [str(note) for note in reply["source"]["notes"]]
    except (ImageError, KeyError, TypeError, ValueError) as error:
        raise ImageError("the decoding process gave a damaged answer") from error
    return _receive_pixels(pipe, reply, (height, width, *samples[:1]))


def _receive_pixels(
    pipe: IO[bytes], reply: dict[str, Any], shape: tuple[int, ...]
) -> tuple[dict[str, Any], NDArray[np.uint8]] | None:
    if shape[2:] not in ((), (3,)):
        raise ImageError("the decoding process gave a damaged answer")
    pixels = np.empty(shape, np.uint8)
    view = pixels.data.cast("B")
    got = 0
    while got < len(view):
        count = pipe.readinto(view[got:])  # type: ignore[attr-defined]
        if not count:
            return None
        got += count
    return reply, pixels


def _ending(code: int, late: bool, seconds: float) -> str:
    if late:
        return f"decoding took more than {seconds * CHILD_WALL_FACTOR:.0f} s and was stopped"
    if code == -getattr(signal, "SIGXCPU", 0):
        return f"decoding took more than {seconds:.0f} s of processor time and was stopped"
    if code >= 0:
        return f"the decoding process could not work (exit code {code})"
    if code == -getattr(signal, "SIGKILL", 0):
        return "the decoding process was killed by the system, probably for want of memory"
    return f"the decoding process crashed (signal {-code}): the file is damaged"
