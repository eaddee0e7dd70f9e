"""Groups of sampled answers: a prompt and its pictures are computed once for its whole group.

The answers of a group grow side by side as branches of one row (see ``branches``): a prompt's keys
and values lie in memory once, and one step of all groups is one call of the model. What is drawn
depends on the numbers given and on nothing else, so a resumed run draws the same. Rewards are not
known here.

Suffixes: P prompts, G answers of a prompt, L tokens of the longest prompt, T steps, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.train.branches import branch_row, collate_branches, mask_for
from medmo_edge.train.packing import Encoded

if TYPE_CHECKING:
    import torch

SHRINK = 0.75  # groups that are finished leave the batch when no more than this part is left
Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How answers are drawn; ``temperature`` 0 takes the likeliest token.

    ``ends`` are the ids that end an answer; ``suppressed`` ids are never drawn and have no part in
    the probabilities.
    """

    num_generations: int
    max_new_tokens: int
    temperature: float
    ends: tuple[int, ...]
    suppressed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """Token ids with the one that ended it, their log-probabilities, and the mean entropy.

    A ``truncated`` answer was stopped by the limit and has no end.
    """

    ids: tuple[int, ...]
    log_probs: NDArray[np.float32]
    entropy: float
    truncated: bool


def uniforms(
    seed: int, step: int, rank: int, places: int, decoding: Decoding
) -> NDArray[np.float64]:
    """The random numbers [P, G, T] of a step: each place's are its own, however many there are."""
    shape = (decoding.num_generations, decoding.max_new_tokens)
    drawn = [np.random.default_rng([seed, step, rank, i]).random(shape) for i in range(places)]
    return np.stack(drawn)


def sample_groups(
    model: Any,
    prompts: Sequence[Encoded],
    decoding: Decoding,
    random_PGT: NDArray[np.float64],
    *,
    chunk: int,
    precision: Precision,
) -> list[list[Answer]]:
    """``num_generations`` answers to every prompt, ``chunk`` prompts at a time.

    ``precision`` opens the arithmetic to use, such as autocast. In several processes every one must
    call it for as many prompts. The model is left in the mode it was in.
    """
    import torch

    training = model.training
    model.train(False)
    try:
        with torch.no_grad(), precision():
            return [
                group
                for start in range(0, len(prompts), chunk)
                for group in _Decoder.begin(
                    getattr(model, "module", model),
                    prompts[start : start + chunk],
                    decoding,
                    torch.from_numpy(random_PGT[start : start + chunk]),
                ).run()
            ]
    finally:
        model.train(training)


@dataclass(slots=True)
class _Cache:
    """Keys and values of all layers [P, heads, capacity, width], ``used`` places of them full."""

    capacity: int
    used: int = 0
    layers: dict[int, tuple["torch.Tensor", "torch.Tensor"]] = field(default_factory=dict)

    def update(
        self, key: "torch.Tensor", value: "torch.Tensor", layer_idx: int, *_: Any, **__: Any
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Add what one call of the model computed; gives everything so far. Called by the model."""
        if layer_idx not in self.layers:
            self.layers[layer_idx] = tuple(  # type: ignore[assignment]
                new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in (key, value)
            )
        end = self.used + key.shape[2]
        for kept, new in zip(self.layers[layer_idx], (key, value), strict=True):
            kept[:, :, self.used : end] = new
        keys, values = self.layers[layer_idx]
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many places are full. Called by the model."""
        return self.used

    def keep(self, rows: "torch.Tensor") -> None:
        """Keep these prompts only."""
        self.layers = {
            layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()
        }


@dataclass(slots=True)
class _Decoder:
    """Groups in the making. ``rows`` are the prompts still in the batch; tensors are of all."""

    model: Any
    decoding: Decoding
    random_PGT: "torch.Tensor"
    cache: _Cache
    seen_PL: "torch.Tensor"
    starts_P: "torch.Tensor"
    first_PV: "torch.Tensor"
    tokens_PGT: "torch.Tensor"
    log_probs_PGT: "torch.Tensor"
    entropies_PGT: "torch.Tensor"
    lengths_PG: "torch.Tensor"

    @classmethod
    def begin(
        cls,
        model: Any,
        prompts: Sequence[Encoded],
        decoding: Decoding,
        random_PGT: "torch.Tensor",
    ) -> "_Decoder":
        """Run the prompts, each once."""
        import torch

        batch = collate_branches([branch_row(prompt) for prompt in prompts], model)
        device = batch.inputs["input_ids"].device
        tokens = [prompt.tokens for prompt in prompts]
        starts = [int(prompt.positions.max()) + 1 for prompt in prompts]
        last, picks = np.unique(np.array(tokens) - 1, return_inverse=True)
        size = (len(prompts), decoding.num_generations, decoding.max_new_tokens)
        longest = batch.inputs["input_ids"].shape[1]
        cache = _Cache(longest + size[1] * (size[2] - 1))
        keep = torch.from_numpy(last).to(device)
        output = model(**batch.inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        cache.used = longest
        filled = torch.arange(longest)[None] < torch.tensor(tokens)[:, None]
        return cls(
            model=model,
            decoding=decoding,
            random_PGT=random_PGT.to(device),
            cache=cache,
            seen_PL=filled.to(device),
            starts_P=torch.tensor(starts, device=device),
            first_PV=output.logits[range(len(prompts)), picks.tolist()],
            tokens_PGT=torch.zeros(size, dtype=torch.long, device=device),
            log_probs_PGT=torch.zeros(size, device=device),
            entropies_PGT=torch.zeros(size, device=device),
            lengths_PG=torch.full(size[:2], size[2], device=device),
        )

    def run(self) -> list[list[Answer]]:
        """All answers, prompt by prompt."""
        import torch

        decoding = self.decoding
        rows = torch.arange(len(self.tokens_PGT), device=self.tokens_PGT.device)
        logits = self.first_PV[:, None].expand(-1, decoding.num_generations, -1)
        for step in range(decoding.max_new_tokens):
            self._choose(rows, step, logits)
            alive = (self.lengths_PG[rows] > step + 1).any(dim=1)
            if step + 1 == decoding.max_new_tokens or not _anywhere(alive):
                break
            if 0 < int(alive.sum()) <= SHRINK * len(rows):
                self.cache.keep(alive)
                rows = rows[alive]
            logits = self._advance(rows, step)
        return self._answers()

    def _choose(self, rows: "torch.Tensor", step: int, logits_PGV: "torch.Tensor") -> None:
        """Draw token ``step`` of every answer that is not finished."""
        import torch

        chosen, log_probs, entropies = choose(
            logits_PGV, self.random_PGT[rows, :, step], self.decoding
        )
        self.tokens_PGT[rows, :, step] = chosen
        self.log_probs_PGT[rows, :, step] = log_probs
        self.entropies_PGT[rows, :, step] = entropies
        ends = torch.tensor(self.decoding.ends, device=chosen.device)
        running = self.lengths_PG[rows] > step
        ended = torch.isin(chosen, ends) & running
        lengths = self.lengths_PG[rows]
        self.lengths_PG[rows] = torch.where(ended, step + 1, lengths)

    def _advance(self, rows: "torch.Tensor", step: int) -> "torch.Tensor":
        """Feed token ``step`` of all branches; gives the next logits [P, G, V]."""
        import torch

        count = self.decoding.num_generations
        own = torch.eye(count, dtype=torch.bool, device=rows.device).repeat(1, step + 1)
        seen = torch.cat(
            [
                self.seen_PL[rows, None].expand(-1, count, -1),
                own[None].expand(len(rows), -1, -1),
            ],
            dim=2,
        )
        positions = (self.starts_P[rows] + step)[None, :, None].expand(4, -1, count)
        output = self.model(
            input_ids=self.tokens_PGT[rows, :, step],
            position_ids=positions,
            attention_mask=mask_for(self.model, seen[:, None]),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.used += count
        logits: torch.Tensor = output.logits
        return logits

    def _answers(self) -> list[list[Answer]]:
        tokens, log_probs, entropies, lengths = (
            values.cpu().numpy()
            for values in (
                self.tokens_PGT,
                self.log_probs_PGT,
                self.entropies_PGT,
                self.lengths_PG,
            )
        )
        return [
            [
                self._answer(tokens[p, g, :n], log_probs[p, g, :n], entropies[p, g, :n])
                for g, n in enumerate(lengths[p])
            ]
            for p in range(len(tokens))
        ]

    def _answer(
        self,
        ids: NDArray[np.int64],
        log_probs: NDArray[np.float32],
        entropies: NDArray[np.float32],
    ) -> Answer:
        return Answer(
            ids=tuple(ids.tolist()),
            log_probs=log_probs.copy(),
            entropy=float(entropies.mean()),
            truncated=int(ids[-1]) not in self.decoding.ends,
        )


def scaled_log_probs(
    logits: "torch.Tensor", temperature: float, suppressed: Sequence[int]
) -> "torch.Tensor":
    """Log-probabilities [..., V] in float32 of the policy that is sampled from.

    That is the model at ``temperature`` (0 counts as 1) without the ``suppressed`` tokens.
    """
    import torch

    values = logits.float() / (temperature or 1.0)
    if suppressed:
        gone = torch.tensor(suppressed, device=values.device)
        values = values.index_fill(-1, gone, float("-inf"))
    known: torch.Tensor = torch.log_softmax(values, dim=-1)
    return known


def entropy_of(log_probs: "torch.Tensor") -> "torch.Tensor":
    """Entropy [...] in nats of log-probabilities [..., V]; impossible tokens count 0."""
    import torch

    entropies: torch.Tensor = torch.special.entr(log_probs.exp()).sum(dim=-1)
    return entropies


def choose(
    logits: "torch.Tensor", random: "torch.Tensor", decoding: Decoding
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Tokens for logits [..., V] by the numbers ``random`` [...] in [0, 1), as quantiles.

    Gives ids, their log-probabilities and the entropy, all [...].
    """
    import torch

    log_probs = scaled_log_probs(logits, decoding.temperature, decoding.suppressed)
    if decoding.temperature == 0:
        chosen = log_probs.argmax(dim=-1)
    else:
        total = log_probs.double().exp().cumsum(dim=-1)
        wanted = random[..., None] * total[..., -1:]
        chosen = torch.searchsorted(total, wanted, right=True)[..., 0]
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
    picked = log_probs.gather(-1, chosen[..., None])[..., 0]
    return chosen, picked, entropy_of(log_probs)


def _anywhere(alive: "torch.Tensor") -> bool:
    """Whether an answer is unfinished in any process: sharded models are called by all or none."""
    import torch

    some = alive.any()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flag = some.to(torch.int32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)
    return bool(some)
