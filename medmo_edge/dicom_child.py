"""The child process of ``medmo_edge.dicom``: one DICOM file on standard input, one frame out.

Writes one line of JSON ({"error": ...} or {"shape": ..., "source": ...}) and then the raw pixels.
Limits itself before it imports anything large. Not an entry point for users.
"""

import io
import json
import logging
import math
import os
import sys
import warnings
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medmo_edge.dicom_decode import DECODER_MODULES, DECODERS
from medmo_edge.dicom_header import transfer_syntax
from medmo_edge.errors import ImageError
from medmo_edge.image_budgets import CHILD_MEMORY_BYTES


def main() -> None:
    """Answer the request in ``sys.argv``: JSON, then the seconds of processor time."""
    limit_resources(float(sys.argv[2]))
    # A C library that prints must not write into the answer.
    pipe = os.dup(1)
    os.dup2(2, 1)
    with io.BufferedReader(io.FileIO(0, closefd=False), 2**16) as file:
        hide_modules(transfer_syntax(file)[0])
        send(pipe, *answer(file, sys.argv[1]))


def hide_modules(syntax: str) -> None:
    """Keep pydicom from importing what this file does not need: half of its start-up.

    It looks for requests and tqdm to download test files, and imports every decoder it finds.
    """
    needed = DECODERS.get(syntax, ())
    unused = [module for plugin, module in DECODER_MODULES.items() if plugin not in needed]
    for name in ("requests", "tqdm", *unused):
        sys.modules[name] = None  # type: ignore[assignment]


def send(pipe: int, reply: dict[str, Any], pixels: NDArray[np.uint8] | None) -> None:
    """Write an answer into the descriptor ``pipe``."""
    parts = [memoryview(json.dumps(reply).encode() + b"\n")]
    if pixels is not None:
        parts.append(pixels.data.cast("B"))
    for view in parts:
        while view:
            view = view[os.write(pipe, view) :]


def limit_resources(seconds: float) -> None:
    """Cap address space, processor time and core dumps; Windows has only the parent's deadline."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    for kind, limit in (
        (resource.RLIMIT_AS, CHILD_MEMORY_BYTES),
        (resource.RLIMIT_CPU, math.ceil(seconds)),
        (resource.RLIMIT_CORE, 0),  # a core file would hold the picture
    ):
        _, hard = resource.getrlimit(kind)
        capped = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (capped, hard))


def answer(file: BinaryIO, request: str) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    """Render what ``request`` asks for: (source values, pixels) or (error, None)."""
    asked = json.loads(request)
    window = tuple(asked["window"]) if isinstance(asked["window"], list) else asked["window"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels, size, source = _render_quietly(file, asked["frame"], window)
    except ImageError as error:
        return {"error": str(error)}, None
    except MemoryError:
        limit = CHILD_MEMORY_BYTES // 2**20
        return {"error": f"decoding needs more than {limit} MiB of memory"}, None
    except RecursionError:
        return {"error": "is damaged: its sequences are nested too deeply"}, None
    # pydicom raises nearly anything on damaged bytes: struct.error, KeyError, EOFError, ...
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return {"error": f"is damaged or not supported ({type(error).__name__}: {reason})"}, None
    reply = {"shape": list(pixels.shape), "size": list(size), "source": source}
    return reply, np.ascontiguousarray(pixels)


def _render_quietly(
    file: BinaryIO, frame: int, window: Any
) -> tuple[NDArray[np.uint8], tuple[int, int], dict[str, Any]]:
    import pydicom.config

    from medmo_edge.dicom_render import render

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logger = logging.getLogger("pydicom")
    disabled, logger.disabled = logger.disabled, True
    try:
        return render(file, frame, window)
    finally:
        logger.disabled = disabled


if __name__ == "__main__":
    main()
