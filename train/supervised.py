"""One step of learning from answers: rows in, summed gradients, AdamW by the recipe's schedule.

The loss is the mean over all answer tokens of a step, whatever rows, micro-batches and processes
they lie in: cutting a step up differently changes nothing. Weights are moved only when loss and
gradients are finite. Which samples come is the mixture's affair, saving the loop's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medmo_edge.train.estimates import module_of
from medmo_edge.train.packing import PackedRow, row_loss
from medmo_edge.train.parallel import Group, arithmetic, without_exchange
from medmo_edge.train.stages import Tuning
from medmo_edge.train.steps import Diverged

if TYPE_CHECKING:
    import torch


def build_optimizer(model: Any, tuning: Tuning) -> "torch.optim.Optimizer":
    """AdamW over what learns in ``model``, by module; weight decay on matrices only.

    Each group keeps its full learning rate as "peak".
    """
    import torch

    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, is_matrix = module_of(name), parameter.ndim > 1
            rate = tuning.module_rates.get(module, tuning.learning_rate)
            decay = tuning.weight_decay if is_matrix else 0.0
            made = {"params": [], "peak": rate, "lr": rate, "weight_decay": decay}
            groups.setdefault((module, is_matrix), made)["params"].append(parameter)
    first, second = tuning.betas
    return torch.optim.AdamW(list(groups.values()), betas=(first, second), fused=True)


def rate_factor(step: int, total: int, tuning: Tuning) -> float:
    """The part of the full learning rate in ``step`` (from 0) of ``total``: warm-up, then decay.

    Cosine and linear end one step above 0, so that the last step still learns.
    """
    warmup = math.ceil(tuning.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    part = (step - warmup) / max(1, total - warmup)
    decays = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}
    return decays[tuning.schedule]


def set_rates(optimizer: "torch.optim.Optimizer", step: int, total: int, tuning: Tuning) -> float:
    """Give each group its rate in ``step``; returns the largest."""
    factor = rate_factor(step, total, tuning)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)


def clip(optimizer: "torch.optim.Optimizer", limit: float) -> float:
    """Scale all gradients to a joint norm of ``limit`` at most; gives the norm before.

    Every process of a sharded model must call it.
    """
    import torch

    learning = [one for group in optimizer.param_groups for one in group["params"]]
    norm: Any = torch.nn.utils.clip_grad_norm_(learning, limit)
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
    return float(whole)


def update(optimizer: "torch.optim.Optimizer", limit: float) -> float:
    """Clip, move the weights and drop the gradients; gives the norm before.

    Errors: Diverged, with the weights untouched, when a gradient is not finite.
    """
    norm = clip(optimizer, limit)
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise Diverged(f"the gradients' norm is {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@dataclass(slots=True, kw_only=True)
class Supervised:
    """Learns from the rows of one step after the other.

    ``call`` is the model as it is spread over processes; ``rows`` gives those of this process.
    """

    call: Any
    optimizer: "torch.optim.Optimizer"
    tuning: Tuning
    total: int
    group: Group
    precision: str
    rows: Iterator[Sequence[PackedRow]]

    def learn(self, step: int) -> dict[str, float]:
        """One step on the next rows: the loss, and what it took.

        Errors: Diverged when loss or gradients are not finite; no weight has moved then.
        """
        rows = next(self.rows)
        rate = set_rates(self.optimizer, step, self.total, self.tuning)
        counts = [sum(row.answer_tokens for row in rows), sum(row.tokens for row in rows)]
        samples = sum(len(row.sample_ids) for row in rows)
        answers, tokens, seen = self.group.total([*counts, samples])
        losses = self._backward(rows, self.group.world / max(1.0, answers))
        loss = self.group.total([sum(losses)])[0] / max(1.0, answers)
        if not math.isfinite(loss):
            self.optimizer.zero_grad(set_to_none=True)
            raise Diverged(f"the loss is {loss}{_named(rows, losses)}")
        norm = update(self.optimizer, self.tuning.clip_norm)
        sizes = {"samples": seen, "tokens": tokens, "answer_tokens": answers}
        return {"loss": loss, "learning_rate": rate, "norm": norm, **sizes}

    def _backward(self, rows: Sequence[PackedRow], scale: float) -> list[float]:
        """Add up the gradients of all rows; gives their summed losses."""
        import torch

        losses = []
        for index, row in enumerate(rows):
            with without_exchange(self.call, is_last=index == len(rows) - 1):
                with arithmetic(self.call, self.group, self.precision):
                    loss = row_loss(self.call, row, self.group.device)
                torch.autograd.backward(loss * scale)
            losses.append(loss.detach())
        return [float(loss) for loss in losses]  # only now: each waits for the device


def _named(rows: Sequence[PackedRow], losses: Sequence[float]) -> str:
    """The samples of the rows whose loss is not finite, as far as they are this process's."""
    found = [
        one
        for row, loss in zip(rows, losses, strict=True)
        if not math.isfinite(loss)
        for one in row.sample_ids
    ]
    return f" (samples {', '.join(found[:8])}{' ...' if len(found) > 8 else ''})" if found else ""
