"""What the ONNX graphs expect from the host: position tables and rotary angles, in numpy.

Everything that depends on an image's grid or on a prompt's layout is computed here, so the graphs
hold no data-dependent shapes. Preprocessing of pixels and position ids is in ``preprocess``; no
model is run here. Still images only (one temporal slot); tables are square.
Source: transformers 5.23, vision_utils.py and models/qwen3_vl/modeling_qwen3_vl.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_VISION_THETA = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionGeometry:
    """The sizes of a vision tower that its inputs depend on."""

    head_dim: int
    num_position_embeddings: int
    merge_size: int

    @classmethod
    def from_manifest(cls, vision: Mapping[str, Any]) -> Self:
        """From the "vision" object of an artifact's model facts."""
        return cls(
            head_dim=vision["hidden_size"] // vision["num_heads"],
            num_position_embeddings=vision["num_position_embeddings"],
            merge_size=vision["merge_size"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInputs:
    """Inputs of vision.onnx beside the pixels, for one image of n patches in merge order.

    ``pos_idx`` int64 [4, n] are rows of the position table, ``pos_weight`` float32 [4, n] their
    bilinear weights; ``cos`` and ``sin`` float32 [n, head_dim], second half equal to the first.
    """

    pos_idx: NDArray[np.int64]
    pos_weight: NDArray[np.float32]
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]


def vision_inputs(grid: Sequence[int], geometry: VisionGeometry) -> VisionInputs:
    """Position inputs of one image of patch grid ``grid`` (1, rows, columns)."""
    _, height, width = grid
    pos_idx, pos_weight = _position_taps(height, width, geometry)
    cos, sin = _vision_rotary(height, width, geometry)
    return VisionInputs(pos_idx=pos_idx, pos_weight=pos_weight, cos=cos, sin=sin)


def merge_order(values: NDArray[Any], merge_size: int) -> NDArray[Any]:
    """[..., h, w] -> [..., h * w] with the patches of one vision token adjacent."""
    *lead, height, width = values.shape
    blocks = values.reshape(
        *lead, height // merge_size, merge_size, width // merge_size, merge_size
    )
    return blocks.swapaxes(-3, -2).reshape(*lead, height * width)


def rope_cos_sin(
    positions: NDArray[np.int64],
    *,
    head_dim: int,
    rope_theta: float,
    mrope_section: Sequence[int],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Interleaved M-RoPE: positions [3, ...] (time, row, column) -> cos, sin [..., head_dim / 2].

    Frequency i follows the row when i % 3 == 1 and i < 3 * mrope_section[1], the column when
    i % 3 == 2 and i < 3 * mrope_section[2], else time. The other half of a head repeats this one.
    """
    index = np.arange(head_dim // 2)
    axis = np.where(index < 3 * np.asarray(mrope_section)[index % 3], index % 3, 0)
    by_frequency = np.moveaxis(positions, 0, -1)[..., axis].astype(np.float32)
    angle = by_frequency * _inverse_frequencies(head_dim, rope_theta)
    return np.cos(angle), np.sin(angle)


def _inverse_frequencies(dim: int, theta: float) -> NDArray[np.float32]:
    """1 / theta^(2i / dim), i < dim / 2, rounded where the reference rounds to float32."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.power(theta, exponent.astype(np.float64)).astype(np.float32)


def _position_taps(
    height: int, width: int, geometry: VisionGeometry
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    side, merge = math.isqrt(geometry.num_position_embeddings), geometry.merge_size
    row, row_weight = _axis_taps(height, side)
    column, column_weight = _axis_taps(width, side)
    # Corner order: upper left, upper right, lower left, lower right.
    index = row[:, None, :, None] * side + column[None, :, None, :]
    weight = row_weight[:, None, :, None] * column_weight[None, :, None, :]
    shape = (4, height, width)
    return merge_order(index.reshape(shape), merge), merge_order(weight.reshape(shape), merge)


def _axis_taps(size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Lower and upper table index and their weights, each [2, size]; ends meet ends."""
    source = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    lower = np.floor(source)
    upper_weight = source - lower
    indexes = np.stack([lower, np.minimum(lower + 1, side - 1)]).astype(np.int64)
    return indexes, np.stack([1 - upper_weight, upper_weight])


def _vision_rotary(
    height: int, width: int, geometry: VisionGeometry
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    inverse = _inverse_frequencies(geometry.head_dim // 2, _VISION_THETA)
    row, column = merge_order(np.indices((height, width)), geometry.merge_size).astype(np.float32)
    angle = np.concatenate([row[:, None] * inverse, column[:, None] * inverse], axis=1)
    doubled = np.concatenate([angle, angle], axis=1)
    return np.cos(doubled), np.sin(doubled)
