"""GRPO's arithmetic: advantages within groups, clipped ratios, and how tokens are averaged.

The objectives are those of TRL 1.16 under its names, which the tests hold it to: ``dapo`` (every
token of the batch counts the same, as MedMO has it), ``bnpo``, ``grpo`` and ``dr_grpo``. Pure
functions; where answers and rewards come from is not known here.

Suffixes: P prompts, G answers of a prompt, A answers, N tokens of all answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medmo_edge.train.reinforcement import Objective

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-4  # TRL's, beside a standard deviation
_FLAT = 1e-8  # a spread of rewards below it is rounding

Floats = NDArray[np.float64]


def advantages(rewards_PG: Floats, scale: str) -> Floats:
    """How much better than its group each answer is, over the spread of group, batch or 1 [P, G].

    ``scale`` is Objective.scale_rewards. An answer without a reward (nan) gets 0 and has no part in
    the mean of its group.
    """
    centred_PG = rewards_PG - _mean(rewards_PG, axis=1)[:, None]
    if scale == "group":
        centred_PG = centred_PG / (spread(rewards_PG)[:, None] + _EPSILON)
    elif scale == "batch":
        centred_PG = centred_PG / (float(spread(rewards_PG.reshape(1, -1))[0]) + _EPSILON)
    return np.nan_to_num(centred_PG, nan=0.0)


def spread(rewards_PG: Floats) -> Floats:
    """Standard deviation [P] of each row with Bessel's correction; nan below two known values."""
    known_P = (~np.isnan(rewards_PG)).sum(axis=1)
    off_PG = rewards_PG - _mean(rewards_PG, axis=1)[:, None]
    squares_P = np.nansum(off_PG**2, axis=1)
    result = np.full(len(rewards_PG), np.nan)
    np.sqrt(squares_P / np.maximum(known_P - 1, 1), out=result, where=known_P > 1)
    return result


def says_nothing(rewards_PG: Floats) -> NDArray[np.bool_]:
    """[P] groups whose answers are all worth the same, or of which at most one is known."""
    spread_P = spread(rewards_PG)
    return np.isnan(spread_P) | (spread_P < _FLAT)


def _mean(values_PG: Floats, axis: int) -> Floats:
    """Mean of the values that are known; nan where none is."""
    known = (~np.isnan(values_PG)).sum(axis=axis)
    total: Floats = np.nansum(values_PG, axis=axis)
    return np.where(known > 0, total / np.maximum(known, 1), np.nan)


def token_weights(
    lengths_A: Sequence[int],
    kept_A: Sequence[bool],
    objective: Objective,
    max_completion_tokens: int,
    *,
    tokens_everywhere: int | None = None,
    processes: int = 1,
) -> Floats:
    """What a token of each answer weighs in the loss [A]; 0 for answers that are not ``kept``.

    The loss is the weighted sum over tokens. ``tokens_everywhere`` are the kept tokens of all
    ``processes``, whose gradients are averaged (default: this one's).
    """
    lengths, kept = np.asarray(lengths_A, np.float64), np.asarray(kept_A, np.bool_)
    own = float(lengths[kept].sum())
    if objective.loss_type == "grpo":
        weights = 1 / (np.maximum(lengths, 1) * len(lengths))
    elif objective.loss_type == "dr_grpo":
        weights = np.full(len(lengths), 1 / (len(lengths) * max_completion_tokens))
    elif objective.loss_type == "bnpo":
        weights = np.full(len(lengths), 1 / max(own, 1.0))
    else:
        total = own if tokens_everywhere is None else tokens_everywhere
        weights = np.full(len(lengths), processes / max(total, 1.0))
    result: Floats = weights * kept
    return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Terms:
    """Log-probabilities [N] of the tokens now, when they were drawn, and in the reference."""

    now: "torch.Tensor"
    drawn: "torch.Tensor"
    reference: "torch.Tensor | None" = None


def policy_loss(
    terms: Terms, advantages_N: "torch.Tensor", weights_N: "torch.Tensor", objective: Objective
) -> tuple["torch.Tensor", Mapping[str, float]]:
    """The loss, and sums of what is watched over tokens of weight > 0 (``tokens`` counts them).

    Ratios are clipped to 1 - epsilon .. 1 + epsilon_high. With a reference, ``beta`` times the
    estimate exp(d) - d - 1 of its divergence is added, d = reference - now, weighted with the ratio
    as TRL does (its use_bias_correction_kl).
    """
    import torch

    ratio = torch.exp(terms.now - terms.drawn)
    low, high = 1 - objective.epsilon, 1 + objective.epsilon_high
    losses = -torch.min(ratio * advantages_N, ratio.clamp(low, high) * advantages_N)
    counted = (weights_N > 0).float()
    watched = {
        "tokens": counted.sum(),
        "clipped_low": (counted * ((ratio < low) & (advantages_N < 0))).sum(),
        "clipped_high": (counted * ((ratio > high) & (advantages_N > 0))).sum(),
    }
    if terms.reference is not None:
        apart = terms.reference - terms.now
        divergence = (torch.exp(apart) - apart - 1) * ratio
        losses = losses + objective.beta * divergence
        watched["kl"] = (counted * divergence).sum()
    sums = {name: float(value.detach()) for name, value in watched.items()}
    return (losses * weights_N).sum(), sums
