"""What a DICOM frame costs: a fresh interpreter each, a fork of a pool's template, no process.

    python benchmarks/dicom_pool.py [--rounds 20] [FILE.dcm ...]

The three take turns file by file, so that they see the same machine. Printed: median wall time per
frame, and processor time per frame of all processes together, the start of the pool's template
included. Without files: four that pydicom installs, and a drawn radiograph of 2500 x 2048. Not
measured: the pixels, which tests/test_core_dicom_pool.py compares.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom.data

from medmo_edge.dicom_pool import DecoderPool
from medmo_edge.dicom_process import IN_PROCESS
from medmo_edge.dicom_write import write_radiograph
from medmo_edge.images import read_image

INSTALLED = Path(pydicom.data.__file__).parent / "test_files"
NAMES = ("CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "examples_palette.dcm")
WAYS = ("interpreter", "pool", "in process")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files or [*(INSTALLED / name for name in NAMES), _radiograph(folder)]
        walls, cpu = measure(files, arguments.rounds)
    print("| file | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for path in files:
        cells = (f"{1000 * statistics.median(walls[way, path]):.0f} ms" for way in WAYS)
        print(f"| {path.name} | " + " | ".join(cells) + " |")
    each = (f"{1000 * cpu[way] / len(files) / arguments.rounds:.0f} ms" for way in WAYS)
    print("| processor time a frame | " + " | ".join(each) + " |")


def measure(
    files: list[Path], rounds: int
) -> tuple[dict[tuple[str, Path], list[float]], dict[str, float]]:
    """(wall seconds of every read, processor seconds of each way)."""
    walls: dict[tuple[str, Path], list[float]] = defaultdict(list)
    cpu: dict[str, float] = defaultdict(float)
    pool = DecoderPool(1)
    read_image(files[0], decoders=pool)
    for _ in range(rounds):
        for path in files:
            for way in WAYS:
                before, start = _cpu_seconds(), time.perf_counter()
                with _environment(way):
                    read_image(path, decoders=pool if way == "pool" else None)
                walls[way, path].append(time.perf_counter() - start)
                cpu[way] += _cpu_seconds() - before
    before = _cpu_seconds()
    pool.close()  # the time of its children is counted when it is reaped
    cpu["pool"] += _cpu_seconds() - before
    return walls, cpu


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


@contextmanager
def _environment(way: str) -> Iterator[None]:
    if way == "in process":
        os.environ[IN_PROCESS] = "1"
    try:
        yield
    finally:
        os.environ.pop(IN_PROCESS, None)


def _radiograph(folder: str) -> Path:
    """A frame as large as a chest radiograph, of noise that no window flattens."""
    path = Path(folder) / "radiograph.dcm"
    pixels = np.random.default_rng(0).integers(0, 4096, (2500, 2048)).astype(np.uint16)
    write_radiograph(path, pixels)
    return path


if __name__ == "__main__":
    main()
