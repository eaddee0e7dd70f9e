"""Pixels in: any picture or DICOM file becomes an 8-bit RGB frame that knows where it came from.

Ordinary pictures are read by ``medmo_edge.pictures`` in this process, DICOM files by
``medmo_edge.dicom`` in a child process with a memory limit and a timeout. Not done here: resizing
for the model (``medmo_edge.preprocess``), ICC colour management, overlays, de-identification,
video.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medmo_edge.errors import ImageError, UsageError
from medmo_edge.image_budgets import MAX_FILE_BYTES, check_pixels

if TYPE_CHECKING:
    from medmo_edge.dicom_pool import DecoderPool

SNIFF_BYTES = 144
MAX_MESSAGE = 1000

WindowRequest = str | int | tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a frame came from and what was done to its pixels.

    ``width`` and ``height`` are the pixels that boxes refer to: the displayed picture after EXIF
    rotation, or DICOM Columns and Rows. They differ from ``Frame.pixels`` only where a DICOM
    PixelAspectRatio made the frame square. ``sha256`` is of the file. ``notes`` says in plain words
    what was decided on the way. No patient name, ID or birth date is ever in here; ``path`` is as
    the caller gave it.
    """

    path: str
    format: str
    width: int
    height: int
    frame: int = 0
    num_frames: int = 1
    sha256: str | None = None
    window: dict[str, Any] | None = None
    dicom: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; absent parts are left out."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["notes"] = list(self.notes)
        return {name: value for name, value in values.items() if value not in (None, [])}


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture as the model may see it: ``pixels`` uint8 [H, W, 3], C-contiguous, RGB."""

    pixels: NDArray[np.uint8] = field(repr=False)
    source: Source

    @classmethod
    def from_pixels(cls, array: ArrayLike, *, path: str = "") -> "Frame":
        """A frame of pixels the caller already has: uint8 [H, W], [H, W, 1] or [H, W, 3].

        Errors: ImageError for another shape or type (16-bit values need a window: write them as
        DICOM or PNG and use ``read_image``).
        """
        pixels = np.asarray(array)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        if pixels.dtype != np.uint8 or not (
            pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
        ):
            raise ImageError(
                f"array of {pixels.dtype} {list(pixels.shape)} is not uint8 [H, W] or [H, W, 3]"
            )
        height, width = pixels.shape[:2]
        check_pixels(width, height)
        return cls(as_rgb(pixels), Source(path=path, format="array", width=width, height=height))


def as_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [H, W] or [H, W, 3] as a contiguous RGB array of its own memory."""
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, np.newaxis], 3, axis=2)
    return np.array(pixels, order="C", copy=True)


def read_image(
    path: str | os.PathLike[str],
    frame: int = 0,
    window: WindowRequest = None,
    *,
    decoders: "DecoderPool | None" = None,
) -> Frame:
    """Read one frame of a picture (PNG, JPEG, TIFF, BMP, WebP, GIF) or DICOM file.

    ``window`` chooses how stored values become grey levels and is accepted for grayscale DICOM and
    for grayscale pictures deeper than 8 bits: None takes the file's own first window or LUT (else
    the defaults of ``medmo_edge.dicom_window``), an int the file's n-th from 0, (center, width) a
    LINEAR window in output units of the modality transformation (HU for CT), a str a CT preset
    ("lung", "bone", "brain", ...), the file's own name for one of its windows, or "auto": the range
    of the frame. ``decoders`` makes many DICOM frames cheap; without, each starts an interpreter.

    Errors: ImageError, one line starting with the path, for everything that can be wrong with the
    file or the arguments.
    """
    name = os.fspath(path)
    try:
        if frame < 0:
            raise ImageError(f"frame {frame} does not exist: frames count from 0")
        with _open_regular(name) as file:
            return replace_path(_read(file, frame, window, decoders), name)
    except ImageError as error:
        # Parts of a damaged file may be in the message: it stays one readable line all the same.
        raise ImageError(_printable(f"{name}: {error}")) from error.__cause__


def parse_window(text: str | None) -> WindowRequest:
    """A window as people write it: ``CENTER,WIDTH``, the number of a stored window, or a name.

    Errors: UsageError when a pair does not hold two numbers.
    """
    if text is None:
        return None
    if "," in text:
        try:
            center, width = (float(part) for part in text.split(","))
        except ValueError as error:
            raise UsageError(f"--window {text}: expected CENTER,WIDTH, e.g. -600,1500") from error
        return center, width
    return int(text) if text.isdecimal() and len(text) < 10 else text


def replace_path(frame: Frame, path: str) -> Frame:
    """The same frame with ``path`` as its provenance."""
    return Frame(frame.pixels, replace(frame.source, path=path))


def _read(
    file: BufferedReader, frame: int, window: WindowRequest, decoders: "DecoderPool | None"
) -> Frame:
    start = file.read(SNIFF_BYTES)
    kind = sniff(start)
    sha256 = _sha256(file)
    file.seek(0)
    if kind == "dicom":
        from medmo_edge.dicom import read_dicom
        from medmo_edge.dicom_process import Interpreter

        process = Interpreter if decoders is None else decoders.start
        pixels, source = read_dicom(file, frame, window, process)
    else:
        from medmo_edge.pictures import read_picture

        pixels, source = read_picture(file, frame, window)
    return Frame(pixels, Source(path="", sha256=sha256, **source))


def sniff(start: bytes) -> str:
    """ "dicom" or "picture" from the first ``SNIFF_BYTES`` bytes of a file.

    The DICM mark wins over any other signature: a DICOM preamble may legally be a TIFF header.

    Errors: ImageError when neither.
    """
    if start[128:132] == b"DICM" or start[:4] in _BARE_DATASETS:
        return "dicom"
    if start.startswith(_PICTURE_MARKS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return "picture"
    raise ImageError("neither a DICOM file nor a PNG, JPEG, TIFF, BMP, WebP or GIF picture")


_PICTURE_MARKS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF8")
# Files without preamble start with the first elements of group 2 or 8, in either byte order.
_BARE_DATASETS = frozenset(
    bytes([group, 0, element, 0]) if little else bytes([0, group, 0, element])
    for group in (2, 8)
    for element in (0, 1, 2, 5, 8, 0x10, 0x16)
    for little in (True, False)
)


@contextmanager
def _open_regular(path: str) -> Iterator[BufferedReader]:
    """Open a file for reading; directories, pipes, devices and empty files are refused."""
    try:
        # Non-blocking: opening a pipe that nobody writes must not hang.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"cannot be opened ({reason or error})") from error
    try:
        _check_facts(os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _check_facts(facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise ImageError("is not a regular file")
    if facts.st_size == 0:
        raise ImageError("is empty")
    if facts.st_size > MAX_FILE_BYTES:
        raise ImageError(f"has {facts.st_size} bytes, above the limit of {MAX_FILE_BYTES}")


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends otherwise


def _sha256(file: BufferedReader) -> str:
    file.seek(0)
    try:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error


def _printable(text: str) -> str:
    """``text`` as one line, whatever bytes the file or the file system holds."""
    clean = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in clean)[:MAX_MESSAGE]
