"""Images to vision patches: the Qwen3-VL image processor in numpy and Pillow, our only copy.

Training, calibration, evaluation and every backend call these functions, so an artifact sees an
image exactly as its checkpoint did. Still images only: video is not handled. Source of the
arithmetic: transformers, models/qwen2_vl/image_processing_qwen2_vl.py (smart_resize, patch order,
fused normalisation), its Pillow twin (the resize: same bytes with and without torchvision) and
models/qwen3_vl/modeling_qwen3_vl.py (get_rope_index). benchmarks/preprocess_parity.py measures
the difference to both reference processors.

Shape suffixes: H W height and width in pixels, C channels, N patches, P values of one patch,
L prompt tokens.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmo_edge.errors import CheckpointError, ImageError, PromptError

MAX_ASPECT_RATIO = 200
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as preprocessor_config.json writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Image processor parameters of one checkpoint; pixel limits count pixels after the resize."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 65536
    max_pixels: int = 16777216
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def factor(self) -> int:
        """Side of one vision token in pixels; resized sides are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def sha256(self) -> str:
        """Hash of the parameters, written into manifests and calibration records."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Read what ``to_dict`` wrote."""
        known = dict(values)
        for name in ("image_mean", "image_std"):
            if name in known:
                known[name] = tuple(float(value) for value in known[name])
        return cls(**known)

    @classmethod
    def from_processor_config(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Read a checkpoint's preprocessor_config.json, or the image part of processor_config.json.

        Errors: CheckpointError when a value is missing (library defaults are Qwen2-VL's, not ours)
        or when the processor resizes or normalises in a way we do not implement.
        """
        config = config.get("image_processor", config)
        size = config.get("size") or {}
        try:
            values = cls(
                patch_size=int(config["patch_size"]),
                temporal_patch_size=int(config["temporal_patch_size"]),
                merge_size=int(config["merge_size"]),
                min_pixels=int(config.get("min_pixels") or size["shortest_edge"]),
                max_pixels=int(config.get("max_pixels") or size["longest_edge"]),
                image_mean=_triple(config["image_mean"]),
                image_std=_triple(config["image_std"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"image processor config is incomplete ({error}): copy preprocessor_config.json "
                "from the checkpoint this one was trained from"
            ) from error
        _refuse_other_processing(config)
        _check_values(values)
        return values


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _refuse_other_processing(config: Mapping[str, Any]) -> None:
    """A processor that skips a step or interpolates differently would shift boxes silently."""
    if config.get("resample", BICUBIC) not in (BICUBIC, None):
        raise CheckpointError(
            f"image processor resample={config['resample']}, only bicubic (3) works"
        )
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step) is False:
            raise CheckpointError(
                f"image processor has {step}=false, which this package cannot follow"
            )
    if not math.isclose(config.get("rescale_factor") or 1 / 255, 1 / 255):
        raise CheckpointError(
            f"image processor rescale_factor={config['rescale_factor']}, not 1/255"
        )


def _check_values(values: Preprocessing) -> None:
    sizes = (values.patch_size, values.temporal_patch_size, values.merge_size, values.min_pixels)
    if min(sizes) < 1 or values.max_pixels < values.min_pixels or min(values.image_std) <= 0:
        raise CheckpointError(
            "image processor config has sizes, pixel limits or std that cannot be"
        )


def smart_resize(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) in pixels that the model sees: multiples of ``factor`` within the limits.

    A very long image can exceed ``max_pixels``, because no side becomes shorter than ``factor``.

    Errors: ImageError for an empty image or an aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise ImageError(f"image of {width} x {height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"image of {width} x {height} pixels is longer than {MAX_ASPECT_RATIO}:1: crop it first"
        )
    factor = preprocessing.factor
    # Python's round (half to even) is part of the contract: C++ rounding gives another grid.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > preprocessing.max_pixels:
        beta = math.sqrt(height * width / preprocessing.max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < preprocessing.min_pixels:
        beta = math.sqrt(preprocessing.min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def resize(pixels_HWC: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The uint8 RGB image [H', W', 3] the model sees, bicubic as Pillow does it."""
    height, width = pixels_HWC.shape[:2]
    new_height, new_width = smart_resize(height, width, preprocessing)
    if (new_height, new_width) == (height, width):
        return np.ascontiguousarray(pixels_HWC)
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    return np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))


def patchify(resized_HWC: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Normalised patches [N, P] float32 of an image from ``resize``, P = 3 * temporal * patch**2.

    The patches of one vision token are adjacent rows; a still image fills both temporal slots.
    """
    patch, merge, temporal = (
        preprocessing.patch_size,
        preprocessing.merge_size,
        preprocessing.temporal_patch_size,
    )
    _, grid_h, grid_w = grid_thw(resized_HWC.shape[0], resized_HWC.shape[1], preprocessing)
    # One fused multiply-add per value, as the reference folds 1/255 into mean and std.
    mean = np.asarray(preprocessing.image_mean, np.float32) * np.float32(255)
    std = np.asarray(preprocessing.image_std, np.float32) * np.float32(255)
    normal_CHW = ((resized_HWC.astype(np.float32) - mean) / std).transpose(2, 0, 1)
    tiles = normal_CHW.reshape(3, grid_h // merge, merge, patch, grid_w // merge, merge, patch)
    tiles = tiles.transpose(1, 4, 2, 5, 0, 3, 6)  # block row, block column, row, column, C, y, x
    rows = tiles.reshape(grid_h * grid_w, 3, 1, patch * patch)
    return np.repeat(rows, temporal, axis=2).reshape(grid_h * grid_w, -1)


def grid_thw(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int, int]:
    """Patch grid (time, rows, columns) of a resized image."""
    return 1, height // preprocessing.patch_size, width // preprocessing.patch_size


def num_vision_tokens(grid: Sequence[int], preprocessing: Preprocessing) -> int:
    """Tokens the language model receives for one image of patch grid ``grid`` (t, h, w)."""
    return math.prod(grid) // preprocessing.merge_size**2


def mrope_positions(
    token_ids: Sequence[int],
    grids: Sequence[Sequence[int]],
    image_token_id: int,
    merge_size: int,
) -> tuple[NDArray[np.int64], int]:
    """Positions [3, L] (time, row, column) of a prompt and the rope delta for decoding.

    ``token_ids`` holds one ``image_token_id`` per vision token, ``grids`` one (t, h, w) per image
    in order. A decoded token at index i has position i + delta in all three rows.

    Errors: PromptError when the image tokens are not exactly one unbroken run per image.
    """
    ids = np.asarray(token_ids)
    pieces: list[NDArray[np.int64]] = []
    start, next_position = 0, 0
    for grid in grids:
        found = np.flatnonzero(ids[start:] == image_token_id)
        rows, columns = grid[1] // merge_size, grid[2] // merge_size
        run = found[: rows * columns]
        if run.size < rows * columns or run[-1] - run[0] >= run.size:
            raise PromptError(f"prompt needs {rows * columns} image tokens in a row for each image")
        pieces.append(_text_positions(int(found[0]), next_position))
        next_position += int(found[0])
        row, column = np.indices((rows, columns)).reshape(2, -1)
        pieces.append(np.stack([np.zeros_like(row), row, column]) + next_position)
        start += int(found[0]) + rows * columns
        next_position += max(rows, columns)
    if np.any(ids[start:] == image_token_id):
        raise PromptError(f"prompt has image tokens for more than its {len(grids)} images")
    pieces.append(_text_positions(len(ids) - start, next_position))
    next_position += len(ids) - start
    return np.concatenate(pieces, axis=1), next_position - len(ids)


def _text_positions(length: int, offset: int) -> NDArray[np.int64]:
    return np.tile(np.arange(offset, offset + length, dtype=np.int64), (3, 1))
