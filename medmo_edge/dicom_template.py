"""The template process of ``medmo_edge.dicom_pool``: imports every decoder, then only forks.

It gets requests with two descriptors, file and pipe, through the socket on standard input; a forked
child limits itself, answers and ends; the template reports its exit code. It never reads a file
itself, so that one file cannot spoil the next. Not an entry point for users.
"""

import gc
import math
import os
import signal
import socket
import sys
from typing import NoReturn

from medmo_edge.dicom_child import answer, limit_resources, send
from medmo_edge.dicom_decode import DECODERS
from medmo_edge.dicom_pool import EXIT_CODE, MAX_REQUEST_BYTES
from medmo_edge.image_budgets import CHILD_WALL_FACTOR


def main() -> None:
    """Fork a child for every request until the other end of the socket is closed."""
    control = socket.socket(fileno=0)
    preload()
    gc.freeze()  # the collector would touch, and so copy, the pages shared with the children
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 2)
        if not message:
            return
        child = os.fork()
        if child == 0:
            work(message, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        control.send(EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))


def preload() -> None:
    """Import what any file may need, without what pydicom would need to download test files."""
    for name in ("requests", "tqdm"):
        sys.modules[name] = None  # type: ignore[assignment]
    from PIL import Image
    from pydicom.pixels.decoders.base import get_decoder

    import medmo_edge.dicom_render  # noqa: F401

    Image.preinit()
    for syntax in DECODERS:
        get_decoder(syntax)
    for name in ("gdcm", "jpeg_ls", "openjpeg", "rle"):
        try:
            __import__(name)
        except ImportError:
            pass  # the frame that needs it says so


def work(message: bytes, file: int, pipe: int) -> NoReturn:
    """The life of a child. Standard input, the way to the template, is closed first."""
    code = 1
    try:
        os.dup2(file, 0)
        seconds, _, request = message.decode().partition(" ")
        limit_resources(float(seconds))
        # Should nobody be left to stop a child that stalls: its parent's deadline comes before.
        signal.alarm(math.ceil(float(seconds) * CHILD_WALL_FACTOR) + 5)
        with os.fdopen(file, "rb", buffering=2**16) as stream:
            send(pipe, *answer(stream, request))
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
