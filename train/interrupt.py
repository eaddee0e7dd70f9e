"""Ctrl-C and SIGTERM as requests: the step in progress is finished and saved first.

A second Ctrl-C stops at once. Under a launcher of several processes it does not: the terminal and
the launcher both pass the first one on, and the launcher itself kills what does not stop.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Give an event that the first signal sets; outside the main thread nothing is caught."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    launched = "RANK" in os.environ  # by torchrun
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        if number == signal.SIGINT and not launched:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, request)
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
