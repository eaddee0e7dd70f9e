"""GRPO's arithmetic against values computed by hand."""

import math

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from medmo_edge.train.grpo_loss import (
    Terms,
    advantages,
    policy_loss,
    says_nothing,
    spread,
    token_weights,
)
from medmo_edge.train.reinforcement import Objective

NAN = float("nan")


def objective(**changes: object) -> Objective:
    """DAPO as MedMO has it."""
    values = {
        "loss_type": "dapo",
        "epsilon": 0.15,
        "epsilon_high": 0.25,
        "beta": 0.0,
        "scale_rewards": "group",
        "num_iterations": 1,
        "mask_truncated_completions": True,
    }
    return Objective(**(values | changes))  # type: ignore[arg-type]


def test_advantages_are_differences_within_the_group() -> None:
    rewards = np.array([[1.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]])
    # Group 1: mean 0.5, squares 0.25 + 0.25, over 3: spread sqrt(1 / 6) = 0.408248.
    top = 0.5 / (math.sqrt(1 / 6) + 1e-4)
    expected = [[top, -top, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(advantages(rewards, "group"), expected, atol=1e-12)
    np.testing.assert_allclose(
        advantages(rewards, "none"), [[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], atol=1e-12
    )
    # All eight: mean 0.35, squares .4225 + .1225 + 2 * .0225 + 4 * .0225 = .68, over 7.
    top = 0.5 / (math.sqrt(0.68 / 7) + 1e-4)
    np.testing.assert_allclose(
        advantages(rewards, "batch"), [[top, -top, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], atol=1e-12
    )


def test_an_answer_without_reward_has_no_part_in_its_group() -> None:
    rewards = np.array([[1.0, NAN, 0.0], [NAN, NAN, NAN], [NAN, 0.7, NAN]])
    found = advantages(rewards, "none")
    np.testing.assert_allclose(found, [[0.5, 0.0, -0.5], [0.0] * 3, [0.0] * 3])
    np.testing.assert_allclose(advantages(rewards, "group")[1:], 0)
    assert spread(rewards)[0] == pytest.approx(math.sqrt(0.5))
    assert says_nothing(rewards).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Three answers of 2, 4 and 10 tokens, the last one masked; at most 20 tokens.
        ("dapo", [1 / 6, 1 / 6, 0]),
        ("bnpo", [1 / 6, 1 / 6, 0]),
        ("grpo", [1 / (2 * 3), 1 / (4 * 3), 0]),
        ("dr_grpo", [1 / (3 * 20), 1 / (3 * 20), 0]),
    ],
)
def test_tokens_weigh_as_the_objective_says(kind: str, expected: list[float]) -> None:
    found = token_weights([2, 4, 10], [True, True, False], objective(loss_type=kind), 20)
    np.testing.assert_allclose(found, expected)


def test_dapo_counts_the_tokens_of_all_processes() -> None:
    """Gradients of two processes are averaged, so each token must weigh twice 1 / 12."""
    found = token_weights([2, 4], [True, True], objective(), 20, tokens_everywhere=12, processes=2)
    np.testing.assert_allclose(found, [2 / 12, 2 / 12])


def test_ratios_are_clipped_unevenly() -> None:
    """Ratios 2, 2, 0.5, 0.5, 1.1 with advantages 1, -1, 1, -1, 3; every token weighs 0.2."""
    ratio = torch.tensor([2.0, 2.0, 0.5, 0.5, 1.1])
    now = torch.log(ratio).requires_grad_()
    side = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0])
    terms = Terms(now=now, drawn=torch.zeros(5))
    loss, sums = policy_loss(terms, side, torch.full((5,), 0.2), objective())
    # min(r A, clip(r) A): 1.25, -2, 0.5, -0.85, 3.3
    assert loss.item() == pytest.approx(-0.2 * (1.25 - 2 + 0.5 - 0.85 + 3.3))
    assert sums == {"tokens": 5, "clipped_low": 1, "clipped_high": 1}
    loss.backward()  # type: ignore[no-untyped-call]
    # Nothing flows where the clipped side was taken; else -A r w.
    assert now.grad is not None
    np.testing.assert_allclose(now.grad, [0, 0.4, -0.1, 0, -0.66], atol=1e-6)


def test_the_divergence_pulls_back_to_the_reference() -> None:
    """exp(d) - d - 1 with d = reference - now, times the ratio, times beta."""
    now = torch.tensor([math.log(0.5), math.log(0.2)])
    reference = torch.tensor([math.log(0.25), math.log(0.2)])
    terms = Terms(now=now, drawn=now.clone(), reference=reference)
    loss, sums = policy_loss(terms, torch.zeros(2), torch.full((2,), 0.5), objective(beta=0.1))
    one = 0.5 + math.log(2) - 1
    assert loss.item() == pytest.approx(0.5 * 0.1 * one, rel=1e-5)
    assert sums["kl"] == pytest.approx(one, rel=1e-5)


def test_masked_tokens_are_not_counted() -> None:
    now = torch.zeros(3)
    terms = Terms(now=now, drawn=torch.tensor([0.0, -1.0, -1.0]))
    loss, sums = policy_loss(terms, torch.ones(3), torch.tensor([0.5, 0.5, 0.0]), objective())
    assert loss.item() == pytest.approx(-0.5 * (1 + 1.25))
    assert sums == {"tokens": 2, "clipped_low": 0, "clipped_high": 1}
