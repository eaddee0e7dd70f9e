"""The figures of a step of reinforcement learning, under TRL's names.

Means over answers and over tokens of one process; ``grpo`` joins those of several.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.train.grpo_loss import says_nothing, spread
from medmo_edge.train.rollouts import Answer

FIGURES = (
    "loss",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)
Floats = NDArray[np.float64]


def figures(
    answers: Sequence[Answer], values: Mapping[str, Floats], rewards_PG: Floats
) -> dict[str, float]:
    """What answers were like, with their rewards [P, G]; what no answer has is left out."""
    lengths = [len(answer.ids) for answer in answers]
    found: dict[str, Any] = {
        "reward": _mean(rewards_PG),
        "reward_std": _spread(rewards_PG),
        "frac_reward_zero_std": says_nothing(rewards_PG).mean(),
        "entropy": np.average([answer.entropy for answer in answers], weights=lengths),
        "completions/mean_length": np.mean(lengths),
        "completions/clipped_ratio": np.mean([answer.truncated for answer in answers]),
    }
    for name, value in values.items():
        found |= {f"rewards/{name}/mean": _mean(value), f"rewards/{name}/std": _spread(value)}
    return {name: float(value) for name, value in found.items() if not np.isnan(value)}


def _spread(values: Floats) -> float:
    return float(spread(values.reshape(1, -1))[0])


def _mean(values: Floats) -> float:
    """nan, without a warning, where nothing is known."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def ratios(sums: Mapping[str, float], iterations: int) -> dict[str, float]:
    """Sums over tokens as means, under TRL's names; the loss is the updates' mean."""
    tokens = max(1.0, sums.get("tokens", 0.0))
    low, high = (sums.get(f"clipped_{side}", 0.0) / tokens for side in ("low", "high"))
    means = {
        "loss": sums.get("loss", 0.0) / iterations,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }
    return means | ({"kl": sums["kl"] / tokens} if "kl" in sums else {})
