"""Drawing a batch and learning from it: AdamW, cosine, bf16 autocast, on a CPU.

Every row of every step draws from its own seed, so a resumed run sees what an uninterrupted one
would. Packing over rows and reinforcement are not here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medmo_edge.preprocess import Preprocessing
from medmo_edge.train.attention import additive
from medmo_edge.train.auxiliary import Targets, dense_loss, dense_targets
from medmo_edge.train.collator import Batch, Row, collate, encode_row, see
from medmo_edge.train.questions import PLATELET, WBC, Turn, sample_turns
from medmo_edge.train.recipe import MERGE, Phase, Recipe
from medmo_edge.train.scenes import Scene, augment, chest_scene, vary_resolution
from medmo_edge.train.steps import Diverged
from medmo_edge.train.vocabulary import SpecialIds
from medmo_edge.train.writer import COORDS, processing

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen3VLForConditionalGeneration

CHAINED = 0.15  # part of the questions that follow another one in the same conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Draws the rows of a step from the training scenes."""

    recipe: Recipe
    blood: Sequence[Scene]
    radiology: Sequence[Scene]
    tokenizer: "Tokenizer"
    ids: SpecialIds

    def batch(self, step: int) -> tuple[Batch, list[Targets]]:
        """The batch of ``step`` with its dense targets, the same on every call."""
        phase = self.recipe.phase_at(step)
        drawn = [self._row(step, place, processing(phase)) for place in range(phase.rows)]
        return collate([row for row, _ in drawn], self.ids), [dense for _, dense in drawn]

    def _row(self, step: int, place: int, limits: Preprocessing) -> tuple[Row, Targets]:
        rng = np.random.default_rng([self.recipe.seed, step, place])
        phase = self.recipe.phase_at(step)
        scene = self.scene(rng, phase)
        small = scene.kind == "blood" and rng.random() < phase.platelet_share
        view = augment(scene, rng, PLATELET.label if small else WBC.label)
        picture = see(view.pixels, vary_resolution(limits, rng))
        turns = sample_turns(view, picture.geometry, COORDS, rng, of_platelets=small)
        row = encode_row(
            self.tokenizer, self.ids, picture, chain(turns, rng), phase.turn_tokens, MERGE
        )
        _, height, width = picture.grid
        return row, dense_targets(view.boxes, picture.geometry, height // MERGE, width // MERGE)

    def scene(self, rng: np.random.Generator, phase: Phase) -> Scene:
        """A training scene before augmentation."""
        for scenes, share in (
            (self.blood, phase.blood_share),
            # the share of what the smears left over
            (self.radiology, phase.radiology_share / max(1e-9, 1 - phase.blood_share)),
        ):
            if scenes and share and rng.random() < share:
                return scenes[int(rng.integers(len(scenes)))]
        return chest_scene(int(rng.integers(self.recipe.data.phantoms)))


def chain(turns: Iterator[Turn], rng: np.random.Generator) -> Iterator[list[Turn]]:
    """Most questions alone, some as the second of a conversation."""
    waiting: list[Turn] = []
    for turn in turns:
        waiting.append(turn)
        if len(waiting) == 2 or rng.random() > CHAINED:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Model, dense head and optimiser of a run; ``step`` takes one batch."""

    model: "Qwen3VLForConditionalGeneration"
    head: "torch.nn.Module"
    optimizer: "torch.optim.Optimizer"
    recipe: Recipe

    def step(self, number: int, batch: Batch, dense: list[Targets]) -> dict[str, float]:
        """Learn from ``batch`` as step ``number``; gives the two losses and the gradient norm.

        Errors: Diverged when one of them is not finite; no weight has moved then.
        """
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.recipe)
        with torch.autocast("cpu", torch.bfloat16):
            answers, vision = self._forward(batch)
            outputs = self.head(vision)
        aux = dense_loss(outputs, dense, self.recipe.auxiliary)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(answers + aux)
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters(), self.recipe.optimizer.clip_norm, foreach=True
        )
        found = {"loss": answers.item(), "aux": aux.item(), "norm": norm.item()}
        for name, value in found.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value}")
        self.optimizer.step()
        return found

    def parameters(self) -> "list[torch.nn.Parameter]":
        """Everything that learns."""
        return [*self.model.parameters(), *self.head.parameters()]

    def _forward(self, batch: Batch) -> "tuple[torch.Tensor, torch.Tensor]":
        """Weighted answer loss, and the vision tokens [T, width] for the dense head."""
        import torch

        seen: list[torch.Tensor] = []
        tower: Any = self.model.model.visual
        mask = additive(batch.inputs["attention_mask"], torch.bfloat16)
        inputs = batch.inputs | {"attention_mask": mask}
        hook = tower.register_forward_hook(lambda _, __, output: seen.append(output.pooler_output))
        try:
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        finally:
            hook.remove()
        return answer_loss(hidden, self.model.lm_head, batch), seen[0]


def answer_loss(hidden: "torch.Tensor", lm_head: "torch.nn.Module", batch: Batch) -> "torch.Tensor":
    """Weighted mean cross-entropy of the next token, only where there is a label.

    Branches begin with a question, so no label is ever predicted from another branch's last token.
    """
    import torch

    wanted = batch.labels[:, 1:] != -100
    logits = lm_head(hidden[:, :-1][wanted]).float()
    losses = torch.nn.functional.cross_entropy(
        logits, batch.labels[:, 1:][wanted], reduction="none"
    )
    weights = batch.weights[:, 1:][wanted]
    return (losses * weights).sum() / weights.sum()


def build_optimizer(
    modules: "Sequence[torch.nn.Module]", recipe: Recipe
) -> "torch.optim.Optimizer":
    """AdamW with weight decay on matrices only."""
    import torch

    spec = recipe.optimizer
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    first, second = spec.betas
    return torch.optim.AdamW(groups, lr=learning_rate(0, recipe), betas=(first, second), fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to ``final_fraction`` of the peak, for each schedule."""
    course, warmup = recipe.course_at(step), recipe.warmup_steps
    done = step - course.first
    if done < warmup:
        return course.peak * (done + 1) / warmup
    part = (done - warmup) / max(1, course.steps - warmup)
    wave = (1 + math.cos(math.pi * min(1.0, part))) / 2
    final = recipe.optimizer.final_fraction
    return course.peak * (final + (1 - final) * wave)
