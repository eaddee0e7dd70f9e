"""Compares our preprocessing with transformers' two image processors: values and time.

    python benchmarks/preprocess_parity.py [IMAGE...] [--profile qwen3-vl|small]

Prints one row per image: its size, its patch grid, the largest difference of a pixel value and the
part of all values that differ by more than rounding, for the Pillow processor (no torchvision
needed) and, when torchvision can be imported, for the "fast" one. One grey level is 2/255 = 0.0078.
Without images it draws noise, the hardest case for a resize. Exit code 1 when a grid differs or the
Pillow processor differs by more than rounding. It does not judge which processor is right.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmo_edge.images import read_image
from medmo_edge.preprocess import Preprocessing, grid_thw, patchify, resize

ROUNDING = 6e-8
PROFILES = {
    "qwen3-vl": Preprocessing(),
    "small": Preprocessing(min_pixels=4096, max_pixels=262144),
}
NOISE_SIZES = (
    (1, 1),
    (3, 3),
    (7, 5),
    (200, 1),
    (64, 64),
    (640, 480),
    (480, 640),
    (1999, 33),
    (1009, 997),
    (1280, 1280),
    (2048, 2500),
    (5000, 4000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How one processor differs from ours on one image; seconds are the best of ``repeats``."""

    same_grid: bool
    largest: float
    part: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", metavar="IMAGE", nargs="*", type=Path)
    parser.add_argument("--profile", choices=PROFILES, default="qwen3-vl")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    prepare_torchvision()
    preprocessing = PROFILES[options.profile]
    processors = {"pillow": pillow_processor(preprocessing), "fast": fast_processor(preprocessing)}
    print(f"{'image':28} {'grid':>9} {'ours ms':>8}", end="")
    for name, processor in processors.items():
        print(f" | {name + ' max diff':>16} {'part':>7} {'ms':>6}" if processor else "", end="")
    print()
    good = True
    for name, pixels in pictures(options.images):
        good &= compare(name, pixels, preprocessing, processors, options.repeats)
    return 0 if good else 1


def pictures(paths: Sequence[Path]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The given images, or noise of many sizes; sizes are width x height."""
    for path in paths:
        yield path.name, read_image(path).pixels
    if not paths:
        random = np.random.default_rng(0)
        for width, height in NOISE_SIZES:
            yield "noise", random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def compare(
    name: str,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    processors: dict[str, Any],
    repeats: int,
) -> bool:
    """Print one row; False when a grid differs or the Pillow processor is not matched."""
    seconds, values = best_of(
        lambda: patchify(resize(pixels, preprocessing), preprocessing), repeats
    )
    height, width = resize(pixels, preprocessing).shape[:2]
    grid = grid_thw(height, width, preprocessing)
    label = f"{name[:16]} {pixels.shape[1]}x{pixels.shape[0]}"
    print(f"{label:28} {grid[1]:>4}x{grid[2]:<4} {1000 * seconds:8.1f}", end="")
    good = True
    for kind, processor in processors.items():
        if processor is None:
            continue
        found = difference(processor, pixels, grid, values, repeats)
        good &= found.same_grid and (kind != "pillow" or found.largest <= ROUNDING)
        largest = f"{found.largest:.2g}" if found.same_grid else "other grid"
        print(f" | {largest:>16} {found.part:>7.2%} {1000 * found.seconds:6.1f}", end="")
    print(flush=True)
    return good


def difference(
    processor: Any,
    pixels: NDArray[np.uint8],
    grid: tuple[int, int, int],
    values: NDArray[np.float32],
    repeats: int,
) -> Difference:
    """Run a transformers processor on the same picture."""
    image = Image.fromarray(pixels)
    seconds, result = best_of(lambda: processor(images=[image]), repeats)
    theirs = np.asarray(result["pixel_values"])
    if tuple(int(side) for side in result["image_grid_thw"][0]) != grid:
        return Difference(same_grid=False, largest=np.inf, part=1.0, seconds=seconds)
    apart = np.abs(theirs - values)
    return Difference(
        same_grid=True,
        largest=float(apart.max()),
        part=float((apart > ROUNDING).mean()),
        seconds=seconds,
    )


def best_of(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Shortest wall time in seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """The keyword arguments that give a transformers processor our parameters."""
    return {
        "size": {
            "shortest_edge": preprocessing.min_pixels,
            "longest_edge": preprocessing.max_pixels,
        },
        "patch_size": preprocessing.patch_size,
        "temporal_patch_size": preprocessing.temporal_patch_size,
        "merge_size": preprocessing.merge_size,
        "image_mean": list(preprocessing.image_mean),
        "image_std": list(preprocessing.image_std),
    }


def pillow_processor(preprocessing: Preprocessing) -> Any:
    """transformers' Pillow processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    return Qwen2VLImageProcessorPil(**settings(preprocessing))


def fast_processor(preprocessing: Preprocessing) -> Any:
    """transformers' torchvision processor, or None when torchvision is not installed."""
    try:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        return Qwen2VLImageProcessor(**settings(preprocessing))
    except ImportError as error:
        print(f"no fast processor: {str(error).strip().splitlines()[0]}")
        return None


@cache
def prepare_torchvision() -> object:
    """Make a torchvision wheel for CUDA importable beside a CPU torch.

    Such a wheel cannot load its operators, and its import fails. The resize needs none of them, so
    their schemas are enough. Returns what must stay alive for them.
    """
    import torch

    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library
        operators = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators
    return torchvision


if __name__ == "__main__":
    sys.exit(main())
