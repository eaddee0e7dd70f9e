"""The sampler against distributions computed by hand and by plain loops."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.errors import GenerationError, UsageError
from medmo_edge.runtime.sampling import Sampler, Sampling, distribution

LOGITS = st.lists(st.integers(-80, 80).map(lambda n: n / 8), min_size=1, max_size=12)


def _logits(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _reference(values: list[float], sampling: Sampling) -> list[float]:
    """Temperature, top-k, top-p with lists and sorting, as their papers state them."""
    scaled = [value / sampling.temperature for value in values]
    if sampling.top_k:
        least = sorted(scaled, reverse=True)[: sampling.top_k][-1]
        scaled = [value if value >= least else -math.inf for value in scaled]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    chances = [weight / sum(weights) for weight in weights]
    kept, mass = set(), 0.0
    for index in sorted(range(len(chances)), key=lambda i: (-chances[i], i)):
        if mass >= sampling.top_p and sampling.top_p < 1:
            break
        kept.add(index)
        mass += chances[index]
    total = sum(chances[index] for index in kept)
    return [chances[i] / total if i in kept else 0.0 for i in range(len(chances))]


@given(LOGITS, st.sampled_from([0.25, 1.0, 2.0]), st.integers(0, 14), st.integers(1, 100))
def test_distribution_is_what_the_definitions_say(
    values: list[float], temperature: float, top_k: int, percent: int
) -> None:
    # A cut exactly at a border depends on rounding: 1/3 of a percent is never one.
    top_p = 1.0 if percent == 100 else percent / 100 + 1 / 300
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = distribution(np.array(values, np.float64), sampling)
    assert found == pytest.approx(_reference(values, sampling), abs=1e-12)
    assert found.sum() == pytest.approx(1)


def test_distribution_by_hand() -> None:
    # Odds 4 : 2 : 1 : 1; top_p 0.6 needs the first two, top_k 1 only the first.
    values = np.log(np.array([1.0, 4.0, 1.0, 2.0]))
    plain = distribution(values, Sampling(temperature=1))
    assert plain == pytest.approx([1 / 8, 4 / 8, 1 / 8, 2 / 8])
    nucleus = distribution(values, Sampling(temperature=1, top_p=0.6))
    assert nucleus == pytest.approx([0, 4 / 6, 0, 2 / 6])
    assert distribution(values, Sampling(temperature=1, top_k=1)) == pytest.approx([0, 1, 0, 0])
    cold = distribution(values, Sampling(temperature=0.5))  # squares the odds
    assert cold == pytest.approx([1 / 22, 16 / 22, 1 / 22, 4 / 22])


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1, seed=7), vocabulary=3)
    logits = np.log(np.array([0.2, 0.5, 0.3], dtype=np.float32))
    counts = Counter(sampler.draw(logits) for _ in range(20_000))
    # Four standard deviations of a binomial count.
    for token, chance in enumerate((0.2, 0.5, 0.3)):
        spread = 4 * math.sqrt(20_000 * chance * (1 - chance))
        assert abs(counts[token] - 20_000 * chance) < spread


@given(LOGITS, st.integers(0, 2**32))
def test_equal_seeds_draw_equal_tokens(values: list[float], seed: int) -> None:
    sampling = Sampling(temperature=1.3, seed=seed)
    first, second = (Sampler(sampling, len(values)) for _ in range(2))
    drawn = [first.draw(_logits(values)) for _ in range(5)]
    assert drawn == [second.draw(_logits(values)) for _ in range(5)]


@given(LOGITS, st.integers(1, 12), st.sampled_from([0.0, 0.5, 3.0]))
def test_padding_ids_are_never_drawn(
    values: list[float], vocabulary: int, temperature: float
) -> None:
    vocabulary = min(vocabulary, len(values))
    raised = _logits(values)
    raised[vocabulary:] += 1000
    sampler = Sampler(Sampling(temperature=temperature), vocabulary)
    assert all(sampler.draw(raised) < vocabulary for _ in range(5))


@given(LOGITS)
def test_greedy_takes_the_first_of_the_most_likely(values: list[float]) -> None:
    assert Sampler(Sampling(), len(values)).draw(_logits(values)) == values.index(max(values))


def test_repetition_penalty_counts_the_prompt_and_presence_penalty_does_not() -> None:
    logits = _logits([2.0, 1.9, -1.0])
    assert Sampler(Sampling(repetition_penalty=1.1), 3, prompt_ids=[0]).draw(logits) == 1
    assert Sampler(Sampling(presence_penalty=0.5), 3, prompt_ids=[0]).draw(logits) == 0
    sampler = Sampler(Sampling(presence_penalty=0.5), 3)
    # Subtracted once, however often a token was said: 2.0 - 0.5, then 1.9 - 0.5, then 1.5 again.
    assert [sampler.draw(logits) for _ in range(4)] == [0, 1, 0, 0]


def test_a_repetition_penalty_lowers_negative_logits_too() -> None:
    assert Sampler(Sampling(repetition_penalty=2), 2, prompt_ids=[0]).draw(_logits([-1, -1.5])) == 1


def test_repetition_penalty_agrees_with_transformers() -> None:
    torch = pytest.importorskip("torch", reason="the reference is transformers")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    random = np.random.default_rng(3)
    logits = random.normal(0, 3, 50).astype(np.float32)
    prompt = [1, 7, 7, 30]
    penalise = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    expected = penalise(torch.tensor([prompt]), torch.tensor(logits)[None])[0].argmax()
    assert Sampler(Sampling(repetition_penalty=1.7), 50, prompt).draw(logits) == int(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), 3)
    with pytest.raises(GenerationError, match="not finite"):
        sampler.draw(_logits([0, bad, 1]))
    with pytest.raises(GenerationError, match="not finite"):
        sampler.draw(np.full(3, -np.inf, np.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": math.inf},
        {"seed": -1},
    ],
)
def test_impossible_values_name_the_option(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
