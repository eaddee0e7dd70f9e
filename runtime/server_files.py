"""Uploaded files: kept in a private folder under random names, read within limits, then deleted.

The folder (mode 0700) is removed when the server ends; what a killed server left behind is removed
by the next one. A caller's file name is neither used nor kept: names often hold a patient's.
Decoding is bounded: at most two files at once, each DICOM frame in a process of its own.
"""

import asyncio
import base64
import binascii
import os
import re
import secrets
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from medmo_edge.dicom_pool import DecoderPool
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame, WindowRequest, read_image
from medmo_edge.runtime.server_problems import bad_request, image_message, too_large

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MAX_DECODERS = 2
FRAME_CACHE_BYTES = 256 << 20

_PREFIX = "medmo-edge-serve-"
_DATA_URL = re.compile(r"data:[\w.+/-]{0,100}(?:;[\w.+=-]{0,100}){0,4};base64,")
_COPY_BYTES = 1 << 20


class Spool:
    """The folder of one running server."""

    def __init__(self, parent: Path | None = None) -> None:
        """Errors: OSError when no folder can be made."""
        parent = parent or Path(tempfile.gettempdir())
        remove_abandoned(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))

    def add(self, source: BinaryIO, limit: int) -> tuple[Path, int]:
        """Copy ``source`` into a new file: (path, bytes). Errors: Problem 413 above ``limit``."""
        path = self.folder / secrets.token_hex(16)
        size = 0
        try:
            with path.open("xb") as target:
                while chunk := source.read(_COPY_BYTES):
                    size += len(chunk)
                    if size > limit:
                        raise too_large("the upload", limit)
                    target.write(chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path, size

    def close(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Delete folders of servers that no longer run."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not _runs(int(pid)) and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class Reader:
    """Decodes frames in threads, a few at a time, and keeps the latest ones."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(MAX_DECODERS)
        self._decoders = DecoderPool(MAX_DECODERS)
        self._frames: OrderedDict[tuple[str, int, WindowRequest], Frame] = OrderedDict()

    def warm(self) -> None:
        """Make the first DICOM file as fast as the others. Errors: ImageError."""
        self._decoders.warm()

    def close(self) -> None:
        """End the decoding processes."""
        self._decoders.close()

    async def read(
        self, path: Path, frame: int = 0, window: WindowRequest = None, *, name: str
    ) -> Frame:
        """One frame of a file that errors call ``name``. Errors: Problem 400 without the path."""
        key = (str(path), frame, window)
        if key in self._frames:
            self._frames.move_to_end(key)
            return self._frames[key]
        found = await self.work(self.decode, path, frame, window, name=name)
        self._frames[key] = found
        while sum(each.pixels.nbytes for each in self._frames.values()) > FRAME_CACHE_BYTES:
            self._frames.popitem(last=False)
        return found

    async def work(
        self, decode: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """What ``decode`` gives, in a thread, when it is its turn."""
        async with self._turns:
            return await asyncio.to_thread(decode, *args, **kwargs)

    def decode(
        self, path: Path, frame: int = 0, window: WindowRequest = None, *, name: str
    ) -> Frame:
        """``read`` without looking at what is kept, nor keeping it; for ``work``."""
        try:
            return read_image(path, frame, window, decoders=self._decoders)
        except ImageError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise bad_request(
                f"{name}: {image_message(ImageError(reason))}", code="invalid_image"
            ) from None

    def forget(self, path: Path) -> None:
        """Drop the frames of a deleted file."""
        for key in [key for key in self._frames if key[0] == str(path)]:
            del self._frames[key]


def decode_data_url(url: str, param: str) -> bytes:
    """The bytes of a base64 data URL. Errors: Problem 400 for any other address."""
    found = _DATA_URL.match(url)
    if found is None:
        raise bad_request(
            f"{param}: only base64 data URLs are read here; addresses are never fetched",
            param,
            "unsupported_image_url",
        )
    try:
        data = base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{param}: is not valid base64", param, "invalid_image") from None
    if not data:
        raise bad_request(f"{param}: is empty", param, "invalid_image")
    return data
