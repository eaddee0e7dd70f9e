"""Answers of a checkpoint to many questions, as the benchmarks of reinforcement ask them."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from medmo_edge.train.asked import Asked
from medmo_edge.train.base_model import Base
from medmo_edge.train.grpo_learner import decoding_of
from medmo_edge.train.packing import Encoded
from medmo_edge.train.reinforcement import Groups
from medmo_edge.train.rollouts import Answer, Decoding, sample_groups, uniforms
from medmo_edge.train.scene_stages import Asking


def decoding(base: Base, generations: int, tokens: int, temperature: float) -> Decoding:
    """How to draw groups of ``generations`` answers from a checkpoint."""
    groups = Groups(
        num_generations=generations,
        guided=False,
        max_completion_tokens=tokens,
        temperature=temperature,
    )
    return decoding_of(base.config, base.tokenizer.length, groups)


def answers(
    base: Base, asking: Asking, asked: Sequence[Asked], drawing: Decoding, chunk: int
) -> Iterator[tuple[Encoded, list[Answer]]]:
    """The prompt and the group of answers of each question, in order; ``chunk`` at a time."""
    for start in range(0, len(asked), chunk):
        prompts = [asking.question(one).prompt for one in asked[start : start + chunk]]
        random = uniforms(start, 0, 0, len(prompts), drawing)
        groups = sample_groups(
            base.model, prompts, drawing, random, chunk=chunk, precision=nullcontext
        )
        yield from zip(prompts, groups, strict=True)
