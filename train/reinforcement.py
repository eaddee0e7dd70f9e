"""What recipes say of reinforcement learning: groups of answers, objective, rewards, curriculum.

Both kinds of recipe share it: stages on a checkpoint (``stages``) and the last stage of a recipe
that starts from nothing (``recipe``). Nothing is trained here.
"""

from dataclasses import dataclass
from typing import Literal

from medmo_edge.train.recipe_toml import Path, Rules, weights_rule
from medmo_edge.train.rewards import REWARDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How many answers to a question are drawn, how long at most, and how boldly.

    ``guided`` adds the wanted answer to every group.
    """

    num_generations: int
    guided: bool
    max_completion_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """GRPO with DAPO's settings, under TRL's names."""

    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"]
    epsilon: float
    epsilon_high: float
    beta: float
    scale_rewards: Literal["group", "batch", "none"]
    num_iterations: int
    mask_truncated_completions: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """The overlap below which a box earns nothing in the reward ``iou``, loose to strict.

    It goes from ``iou_from`` to ``iou_to`` in the first part ``until`` (0..1) of the stage's steps.
    """

    iou_from: float
    iou_to: float
    until: float

    def threshold(self, progress: float) -> float:
        """The smallest overlap that counts when the part ``progress`` of all steps is done."""
        done = min(1.0, progress / self.until)
        return self.iou_from + (self.iou_to - self.iou_from) * done


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforcement:
    """The rl stage of a recipe from nothing: ``prompts`` questions a step about drawn scenes.

    ``blood_share`` of them are about smears, ``radiology_share`` VQA-RAD's own with yes or no for
    an answer, the rest about phantoms. Of smears and phantoms, the part ``located`` asks for boxes,
    ``present`` whether there are any, the rest how many. ``row_tokens`` bound a row of answers
    behind their prompt.
    """

    learning_rate: float
    warmup_steps: int
    steps: int
    prompts: int
    blood_share: float
    radiology_share: float
    located: float
    present: float
    row_tokens: int
    rollouts: Groups
    objective: Objective
    rewards: dict[str, float]
    curriculum: Curriculum


def group_rules(
    path: Path,
    groups: Groups,
    objective: Objective,
    rewards: dict[str, float],
    curriculum: Curriculum,
) -> Rules:
    """What settings below ``path`` must fulfil in either kind of recipe."""
    overlaps = (curriculum.iou_from, curriculum.iou_to)
    return {
        (*path, "rewards"): weights_rule("rewards", rewards, tuple(REWARDS)),
        (*path, "rollouts", "num_generations"): (
            "num_generations must be 2 or more: an advantage is a difference",
            groups.num_generations >= 2,
        ),
        (*path, "curriculum"): (
            "iou_from and iou_to must be in 0..1, and until above 0 and at most 1",
            0 <= min(overlaps) and max(overlaps) < 1 and 0 < curriculum.until <= 1,
        ),
        (*path, "objective", "beta"): ("beta must be 0 or more", objective.beta >= 0),
        (*path, "objective", "epsilon_high"): (
            "epsilon must be above 0 and epsilon_high no less",
            0 < objective.epsilon <= objective.epsilon_high,
        ),
    }


def parts_rule(first: str, one: float, second: str, other: float) -> tuple[str, bool]:
    """The rule that two parts of the same whole leave something or nothing, but no less."""
    problem = f"{first} and {second} must be 0 or more, together at most 1"
    return problem, min(one, other) >= 0 and one + other <= 1


def stage_rules(spec: Reinforcement, path: Path) -> Rules:
    """What the rl stage of a recipe from nothing must fulfil."""
    counts = (spec.steps, spec.prompts, spec.rollouts.max_completion_tokens)
    return {
        (*path, "steps"): ("steps, prompts and completion tokens must be above 0", min(counts) > 0),
        (*path, "learning_rate"): ("learning_rate must be above 0", spec.learning_rate > 0),
        (*path, "blood_share"): parts_rule(
            "blood_share", spec.blood_share, "radiology_share", spec.radiology_share
        ),
        (*path, "located"): parts_rule("located", spec.located, "present", spec.present),
        (*path, "rollouts", "temperature"): (
            "temperature must be above 0: equal answers teach nothing",
            spec.rollouts.temperature > 0,
        ),
        **group_rules(path, spec.rollouts, spec.objective, spec.rewards, spec.curriculum),
    }
