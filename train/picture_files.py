"""The picture files of samples: their sizes without pixels, and what identifies their content.

What was found out about a file is kept for the whole run: pictures may not change under it.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from medmo_edge.errors import ImageError, SampleError
from medmo_edge.evaluation.items import picture_size
from medmo_edge.images import SNIFF_BYTES, Frame, Source, read_image, sniff

_KEPT = 1 << 17  # files that are remembered


@lru_cache(maxsize=_KEPT)
def hollow_frame(path: Path) -> Frame:
    """A frame of the right sizes without pixels: only a header is read where the format allows.

    Errors: ImageError when the file is missing or no picture.
    """
    try:
        with path.open("rb") as file:
            is_dicom = sniff(file.read(SNIFF_BYTES)) == "dicom"
        width, height = (0, 0) if is_dicom else picture_size(path, "")
    except OSError as error:
        raise ImageError(f"picture {path} cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise ImageError(f"picture {path} is {error}") from error
    except SampleError as error:
        raise ImageError(str(error).removeprefix(": ")) from error
    if is_dicom:
        whole = read_image(path)
        return Frame(np.broadcast_to(np.uint8(0), whole.pixels.shape), whole.source)
    source = Source(path=str(path), format="picture", width=width, height=height)
    return Frame(np.broadcast_to(np.uint8(0), (height, width, 3)), source)


@lru_cache(maxsize=_KEPT)
def digest(path: Path) -> bytes:
    """sha256 of a picture's file. Errors: ImageError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror})") from error
