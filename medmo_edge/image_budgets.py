"""The limits every picture must keep before memory or time is spent on it. Nothing else.

A header that promises more is refused with one line that names the limit. The limits are generous
for clinical pictures (a mammogram has 14 million pixels, a chest radiograph up to 20 million) and
small enough that a hostile file costs neither the machine nor the next patient's answer.
"""

from medmo_edge.errors import ImageError

MAX_PIXELS = 2**26  # 8192 x 8192; 192 MiB as uint8 RGB
MAX_FRAME_BYTES = 2**28  # one decoded frame in its stored form
MAX_FILE_BYTES = 2**32
MAX_FRAMES = 2**20

# Deflated data sets. A blank picture deflates about 1000:1, so small ones may have any ratio.
MAX_INFLATED_BYTES = 2**28
FREE_INFLATED_BYTES = 2**26
MAX_INFLATE_RATIO = 100

# The decoding child. 8 s of processor time keep the promise of an answer within 10 s for any small
# broken file; large files carry real pixels and get time for them. Wall-clock time is limited too,
# but loosely: a busy workstation must not refuse a sound picture.
CHILD_MEMORY_BYTES = 2**30
CHILD_SECONDS = 8.0
CHILD_SECONDS_PER_MEGABYTE = 0.25
CHILD_WALL_FACTOR = 5.0


def check_pixels(width: int, height: int) -> None:
    """Refuse an empty picture or one above ``MAX_PIXELS``.

    Errors: ImageError.
    """
    if width < 1 or height < 1:
        raise ImageError(f"picture of {width} x {height} pixels is empty")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"picture of {width} x {height} pixels is above the limit of {MAX_PIXELS} pixels: "
            "scale it down first"
        )


def child_seconds(file_bytes: int) -> float:
    """Seconds of processor time that one frame of a file of ``file_bytes`` may take."""
    return CHILD_SECONDS + CHILD_SECONDS_PER_MEGABYTE * file_bytes / 1e6
