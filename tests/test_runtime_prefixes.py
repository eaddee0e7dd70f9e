"""Kept prompt beginnings: whatever was asked before, the backend holds what a fresh one would."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmo_edge.boxes import Geometry
from medmo_edge.runtime.backends import Interrupted
from medmo_edge.runtime.chat import Picture
from medmo_edge.runtime.fake import Fake
from medmo_edge.runtime.prefixes import Cost, Prefix, PrefixCache, Segment

SIDE = 64
GEOMETRY = Geometry(
    width=SIDE,
    height=SIDE,
    frame_width=SIDE,
    frame_height=SIDE,
    resized_width=SIDE,
    resized_height=SIDE,
)
PICTURES = [
    Picture(resized_HWC=np.full((SIDE, SIDE, 3), grey, np.uint8), num_tokens=4, geometry=GEOMETRY)
    for grey in range(3)
]


class Watched(Fake):
    """A backend that writes down what it holds, pictures by their grey, and what it evaluated."""

    def __init__(self) -> None:
        super().__init__("x", 1 << 20)
        self.work: list[Any] = []

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        grey = int(resized_HWC[0, 0, 0])
        self.work.append(f"picture {grey}")
        self._append([-1 - grey] * 4)

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        self.work.append(tuple(ids))
        return super().decode_tokens(ids)

    @property
    def held(self) -> list[int]:
        return list(self._ids)


def _expected(segments: list[Segment]) -> list[int]:
    held: list[int] = []
    for segment in segments:
        if isinstance(segment, Picture):
            held += [-1 - int(segment.resized_HWC[0, 0, 0])] * 4
        else:
            held += segment
    return held


SEGMENT = st.one_of(st.sampled_from(PICTURES), st.lists(st.integers(0, 2), min_size=1, max_size=2))
CHAINS = st.lists(st.lists(SEGMENT, max_size=4), min_size=1, max_size=12)


@settings(max_examples=40)
@given(CHAINS, st.sampled_from([0, 100, 1 << 20]))
def test_history_never_shows(chains: list[list[Segment]], budget: int) -> None:
    backend = Watched()
    cache = PrefixCache(backend, budget)
    for chain in chains:
        cost = Cost()
        before = len(backend.work)
        cache.bring(Prefix([], chain), cost)
        assert backend.held == _expected(chain)
        evaluated = backend.work[before:]
        assert len(evaluated) <= len(chain)
        worked = sum(4 if isinstance(each, str) else len(each) for each in evaluated)
        assert cost.reused_tokens == len(backend.held) - worked
        backend.decode_tokens([1, 2, 3])  # an answer: the next question must not see it


def test_a_conversation_costs_only_what_is_new() -> None:
    backend = Watched()
    cache = PrefixCache(backend, 1 << 20)
    first: list[Segment] = [[1], PICTURES[0], [2]]
    cache.bring(Prefix([], first), Cost())
    cache.bring(Prefix([], [*first, [3, 4]]), Cost())
    cache.bring(Prefix([], first), Cost())
    assert backend.work == [(1,), "picture 0", (2,), (3, 4)]


def test_pictures_that_would_be_lost_are_parked_within_the_budget() -> None:
    backend = Watched()
    cache = PrefixCache(backend, 1 << 20)
    for _ in range(3):
        for picture in PICTURES:
            cache.bring(Prefix([], [[1], picture]), Cost())
    assert [each for each in backend.work if isinstance(each, str)] == [
        "picture 0",
        "picture 1",
        "picture 2",
    ]
    poor = PrefixCache(other := Watched(), 0)
    for _ in range(2):
        for picture in PICTURES:
            poor.bring(Prefix([], [[1], picture]), Cost())
    assert len([each for each in other.work if isinstance(each, str)]) == 6


def test_a_forgotten_owner_keeps_nothing() -> None:
    backend = Watched()
    cache = PrefixCache(backend, 1 << 20)
    owner, other = object(), object()
    cache.bring(Prefix([], [[1], PICTURES[0]], owner), Cost())
    cache.bring(Prefix([], [[1], PICTURES[1]], other), Cost())
    cache.forget(owner)
    cache.forget(other)
    assert cache._parked == [] and cache._residents == {}
    cost = Cost()
    cache.bring(Prefix([], [[1], PICTURES[0]], owner), cost)
    assert cost.reused_tokens == 0 and backend.held == _expected([[1], PICTURES[0]])


def test_an_interrupted_picture_leaves_an_empty_backend() -> None:
    backend = Watched()
    cache = PrefixCache(backend, 1 << 20)
    cache.bring(Prefix([], [[1], PICTURES[0]]), Cost())
    backend.set_interrupt(lambda: True)
    with pytest.raises(Interrupted):
        cache.bring(Prefix([], [[1], PICTURES[1]]), Cost())
    backend.set_interrupt(None)
    assert backend.held == []
    cost = Cost()
    cache.bring(Prefix([], [[1], PICTURES[0]]), cost)  # it was parked before
    assert cost.reused_tokens == 5 and backend.held == _expected([[1], PICTURES[0]])
