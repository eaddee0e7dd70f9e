"""Keep libraries from printing what they were given: for servers, whose logs are for everybody.

pydicom, pynetdicom, highdicom and Pillow warn and fail with the values that they find odd, a
patient's name among them; Python prints what ends a thread or a destructor. Nothing of that is
printed afterwards: only the type of the error is told. For a process of its own, never for a
library: it changes the whole interpreter.
"""

import logging
import sys
import threading
import warnings
from collections.abc import Callable

LIBRARIES = ("pydicom", "pynetdicom", "highdicom", "PIL", "asyncio", "uvicorn", "py.warnings")

#: told of an error that nobody caught: where ("thread", "destructor"), and its type's name
Told = Callable[[str, str], None]


def silence_libraries(told: Told) -> None:
    """No warning, log record or traceback of a library is printed from now on."""

    def thread_ended(details: threading.ExceptHookArgs) -> None:
        if details.exc_type is not SystemExit:
            told("thread", details.exc_type.__name__)

    def destructor_failed(details: "sys.UnraisableHookArgs") -> None:
        told("destructor", details.exc_type.__name__)

    threading.excepthook = thread_ended
    sys.unraisablehook = destructor_failed
    warnings.simplefilter("ignore")
    # catch_warnings puts filters back, in any thread: what slips through is not printed either.
    warnings.showwarning = _say_nothing
    logging.raiseExceptions = False  # a failing handler would print the record
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
        logger.setLevel(logging.CRITICAL + 1)


def _say_nothing(*_: object, **__: object) -> None:
    """In place of ``warnings.showwarning``."""
