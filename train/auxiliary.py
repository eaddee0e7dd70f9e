"""A dense loss on the vision tokens: what lies under each one, and where that thing's box is.

Few pictures teach a language model slowly where things are; every vision token of every picture can
be asked directly. The head belongs to training alone and is not part of the checkpoint.

Suffixes: T vision tokens of a batch, K classes, 4 corners (x1, y1, x2, y2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box, Geometry, to_model
from medmo_edge.train.questions import PLATELET, TARGETS
from medmo_edge.train.recipe import AuxiliarySpec

if TYPE_CHECKING:
    import torch

CLASSES = tuple(target.label for target in TARGETS)
MIN_COVER = 0.3  # a token speaks for a box that covers this part of it, or whose middle it holds
HUNDREDS, TENS = 11, 10  # 0..1000 as leading and second digit
# Covered tokens are few, those of platelets (0.7 % of the tokens of smears) fewest.
COVERAGE_WEIGHT, RARE_WEIGHT = 3.0, {PLATELET.label: 20.0}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets:
    """cover [T, K] in 0..1; corners [T, K, 4] in 0..1000, -1 where a token speaks for no box."""

    cover: NDArray[np.float32]
    corners: NDArray[np.int64]


def dense_targets(boxes: Sequence[Box], geometry: Geometry, rows: int, columns: int) -> Targets:
    """Targets of one picture whose vision tokens form a grid of ``rows`` x ``columns``."""
    cover = np.zeros((rows, columns, len(CLASSES)), np.float32)
    corners = np.full((rows, columns, len(CLASSES), 4), -1, np.int64)
    best = np.zeros((rows, columns, len(CLASSES)), np.float32)
    for box in boxes:
        kind = CLASSES.index(box.label)
        part = _overlap(box.y1, box.y2, geometry.height, rows)[:, None] * _overlap(
            box.x1, box.x2, geometry.width, columns
        )
        cover[:, :, kind] = np.maximum(cover[:, :, kind], part)
        claim = np.where(part >= MIN_COVER, part, 0)
        claim[_cell(box.y1, box.y2, geometry.height, rows)][
            _cell(box.x1, box.x2, geometry.width, columns)
        ] = 1
        wins = claim > best[:, :, kind]
        best[:, :, kind] = np.where(wins, claim, best[:, :, kind])
        corners[:, :, kind][wins] = to_model(box.xyxy, geometry, "norm1000")
    return Targets(
        cover=cover.reshape(-1, len(CLASSES)), corners=corners.reshape(-1, len(CLASSES), 4)
    )


def _overlap(low: float, high: float, side: int, cells: int) -> NDArray[np.float32]:
    """The part of each of ``cells`` equal stretches of ``side`` that lies in [low, high]."""
    edges = np.linspace(0, side, cells + 1)
    inside = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
    return np.asarray(np.clip(inside / (side / cells), 0, 1), np.float32)


def _cell(low: float, high: float, side: int, cells: int) -> int:
    return min(cells - 1, int((low + high) / 2 / side * cells))


def build_head(width: int, seed: int) -> "torch.nn.Module":
    """Vision token [T, width] -> [T, K * (1 + 4 + 4 * 21)]."""
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, len(CLASSES) * (5 + 4 * (HUNDREDS + TENS))),
    )


def dense_loss(
    outputs: "torch.Tensor", targets: Sequence[Targets], spec: AuxiliarySpec
) -> "torch.Tensor":
    """The weighted sum of coverage, corner and digit losses for head outputs [T, ...].

    Corners and digits are means over the tokens of a class, then over the classes that are there:
    otherwise only the many red cells would be heard.
    """
    import torch
    from torch.nn import functional

    kinds = len(CLASSES)
    cover = torch.from_numpy(np.concatenate([target.cover for target in targets]))
    corners = torch.from_numpy(np.concatenate([target.corners for target in targets]))
    outputs = outputs.float().reshape(len(outputs), kinds, -1)
    weight = torch.tensor([RARE_WEIGHT.get(label, COVERAGE_WEIGHT) for label in CLASSES])
    loss = spec.coverage * functional.binary_cross_entropy_with_logits(
        outputs[:, :, 0], cover, pos_weight=weight
    )
    spoken = corners[:, :, 0] >= 0
    if not spoken.any():
        return loss
    mine, truth = outputs[spoken], corners[spoken]
    gaps = functional.smooth_l1_loss(mine[:, 1:5], truth / 1000, beta=0.02, reduction="none")
    digits = mine[:, 5:].reshape(-1, 4, HUNDREDS + TENS)
    wrong = _surprise(digits[:, :, :HUNDREDS], truth // 100)
    wrong = wrong + _surprise(digits[:, :, HUNDREDS:], truth // 10 % 10)
    per_token = spec.corners * gaps.mean(1) + spec.digits * wrong.mean(1)
    return loss + (per_token * _even(spoken)).sum()


def _surprise(logits: "torch.Tensor", truth: "torch.Tensor") -> "torch.Tensor":
    """Cross-entropy of each corner [S, 4] for logits [S, 4, digits]."""
    from torch.nn import functional

    flat = functional.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
    return flat.reshape(truth.shape)


def _even(spoken: "torch.Tensor") -> "torch.Tensor":
    """Weights [S] of the true entries of ``spoken`` [T, K] that sum to 1, equal for all classes."""
    counts = spoken.sum(0)
    return (1 / (counts * (counts > 0).sum()))[spoken.nonzero()[:, 1]]
