"""Choosing the next token from logits, in numpy: the same for every backend.

Order of the steps, as in transformers' generate: penalties, the mask of a JSON schema
(constrain.py), temperature, top-k, top-p, draw. There is no beam search. Everything is float64 and
one uniform number per token from numpy's PCG64, so equal logits and an equal seed give equal tokens
on every machine.

Shape suffix: V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError, UsageError
from medmo_edge.runtime.constrain import Constraint


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw; temperature 0 takes the most likely token (the lowest id among equals).

    ``repetition_penalty`` (> 1 discourages) counts prompt and answer, as transformers does;
    ``presence_penalty`` is subtracted once from every token of the answer so far, as vLLM does.
    Zero means off for ``top_k``. ``logprobs``: report the log-probability of each token, and of
    this many of the most likely ones, as the model gave them, before any of the above.
    Errors: UsageError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "temperature must be 0 or more": self.temperature >= 0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "presence_penalty must be a finite number": np.isfinite(self.presence_penalty),
            "seed must be 0 or more": self.seed >= 0,
            "logprobs must be 0 or more": self.logprobs is None or self.logprobs >= 0,
        }
        for rule, holds in ranges.items():
            if not holds:
                raise UsageError(rule)


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that was drawn, its natural log-probability, and (id, log-probability) of the best.

    ``top`` is in falling order and as long as ``Sampling.logprobs`` asks.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one answer; ``vocabulary`` is the tokenizer's length.

    Ids from ``vocabulary`` on are padding of the embedding table and are never drawn.
    ``constraint`` says which tokens may come; ``choices`` receives what ``logprobs`` asks for.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocabulary: int,
        prompt_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
        choices: list[Choice] | None = None,
    ) -> None:
        self._constraint = constraint
        self._choices = choices
        self._sampling = sampling
        self._vocabulary = vocabulary
        unchanged = (sampling.repetition_penalty, sampling.presence_penalty) == (1, 0)
        self._most_likely = sampling.temperature == 0 and unchanged and constraint is None
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._seen = np.zeros(vocabulary, dtype=bool)
        self._said = np.zeros(vocabulary, dtype=bool)
        self._seen[[id for id in prompt_ids if id < vocabulary]] = True

    def draw(self, logits_V: NDArray[np.float32]) -> int:
        """The next token id. Errors: GenerationError when the logits are not numbers."""
        logits_V = logits_V[: self._vocabulary]
        chosen = int(logits_V.argmax())  # the first that is not a number, if there is any
        if not np.isfinite(logits_V[chosen]):
            raise GenerationError(
                "the model returned logits that are not finite: export it again in a wider format"
            )
        if not self._most_likely:
            chosen = self._choose(logits_V.astype(np.float64))
        self._seen[chosen] = self._said[chosen] = True
        if self._constraint is not None:
            self._constraint.accept(chosen)
        if self._choices is not None and self._sampling.logprobs is not None:
            plain_V = logits_V.astype(np.float64)
            self._choices.append(_choice(plain_V, chosen, self._sampling.logprobs))
        return chosen

    def _choose(self, plain_V: NDArray[np.float64]) -> int:
        scores_V = self._allowed(self._penalised(plain_V))
        if self._sampling.temperature == 0:
            return int(scores_V.argmax())
        return self._random_choice(distribution(scores_V, self._sampling))

    def _allowed(self, scores_V: NDArray[np.float64]) -> NDArray[np.float64]:
        """``scores_V`` without the tokens that the constraint forbids."""
        if self._constraint is None:
            return scores_V
        scores_V = np.where(self._constraint.allowed(), scores_V, -np.inf)
        if not np.isfinite(scores_V.max()):
            raise UsageError("the model gives no probability to what the JSON schema allows")
        return scores_V

    def _penalised(self, plain_V: NDArray[np.float64]) -> NDArray[np.float64]:
        penalty, presence = self._sampling.repetition_penalty, self._sampling.presence_penalty
        if penalty == 1 and presence == 0:
            return plain_V
        scores_V = plain_V.copy()
        if penalty != 1:
            seen = scores_V[self._seen]
            scores_V[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        scores_V[self._said] -= presence
        return scores_V

    def _random_choice(self, probabilities_V: NDArray[np.float64]) -> int:
        cumulative = probabilities_V.cumsum()
        point = self._random.random() * cumulative[-1]
        chosen = int(np.searchsorted(cumulative, point, side="right"))
        return min(chosen, int(np.flatnonzero(probabilities_V)[-1]))  # the product may round up


def _choice(scores_V: NDArray[np.float64], chosen: int, count: int) -> Choice:
    shifted_V = scores_V - scores_V.max()
    logprobs_V = shifted_V - np.log(np.exp(shifted_V).sum())
    count = min(count, scores_V.size)
    best = np.argpartition(-logprobs_V, count - 1)[:count] if count else np.empty(0, np.intp)
    best = best[np.argsort(-logprobs_V[best], kind="stable")]
    top = tuple((int(id), float(logprobs_V[id])) for id in best)
    return Choice(chosen, float(logprobs_V[chosen]), top)


def distribution(scores_V: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities [V] after temperature, top-k and top-p; zero for what was cut away."""
    scores_V = (scores_V - scores_V.max()) / sampling.temperature  # shifted: no overflow
    if 0 < sampling.top_k < scores_V.size:
        kept = np.partition(scores_V, -sampling.top_k)[-sampling.top_k]
        scores_V = np.where(scores_V < kept, -np.inf, scores_V)  # ties stay, as in transformers
    weights_V = np.exp(scores_V)
    probabilities_V = weights_V / weights_V.sum()
    if sampling.top_p < 1:
        probabilities_V = _nucleus(probabilities_V, sampling.top_p)
    return np.asarray(probabilities_V)


def _nucleus(probabilities_V: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """The most likely tokens that together reach ``top_p``, and no more."""
    # All tokens below this share together have less than 1 - top_p: none is in the nucleus, and
    # sorting the few others is fast.
    share = (1 - top_p) / probabilities_V.size
    candidates = np.flatnonzero(probabilities_V >= share)
    order = candidates[np.argsort(-probabilities_V[candidates], kind="stable")]
    before = np.cumsum(probabilities_V[order]) - probabilities_V[order]
    kept = order[before < top_p]
    nucleus_V = np.zeros_like(probabilities_V)
    nucleus_V[kept] = probabilities_V[kept] / probabilities_V[kept].sum()
    return nucleus_V
