"""Conversations side by side in one llama.cpp context: to the bit what each is alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.errors import GenerationError
from medmo_edge.images import Frame
from medmo_edge.runtime.backends import START, Lanes, lanes_of
from medmo_edge.runtime.crew import Crew
from medmo_edge.runtime.exactness import exact_rows
from medmo_edge.runtime.llamacpp_lanes import lane_cells, runs
from medmo_edge.runtime.session import Session, load

pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")

# The last one is longer than the step in which llama.cpp widens attention for all.
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3], [2, 3, 8] * 100]
SAID = [[4, 6, 2], [6, 4, 3], [3, 8, 3], [2, 7, 9]]


@pytest.fixture
def session(tiny_artifacts: Callable[..., Path]) -> Iterator[Session]:
    with load(tiny_artifacts("gguf-q8_0"), threads=1) as opened:
        yield opened


def _lanes(session: Session) -> Lanes:
    lanes = lanes_of(session.backend)
    assert lanes is not None
    return lanes


def _pixels(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def _prompt(lanes: Lanes, lane: int) -> None:
    lanes.select(lane)
    lanes.append_image(_pixels(lane))
    lanes.decode_tokens(PROMPTS[lane])


def _alone(session: Session) -> list[list[Any]]:
    """Logits after every token of SAID, one conversation after the other."""
    backend, found = session.backend, []
    for lane, said in enumerate(SAID):
        backend.append_image(_pixels(lane))
        backend.decode_tokens(PROMPTS[lane])
        found.append([backend.decode_tokens([token]) for token in said])
        backend.rewind(START)
    return found


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 1), (0, 2, 3), (1, 3)])
def test_lanes_give_the_logits_of_one_alone(session: Session, present: tuple[int, ...]) -> None:
    expected, lanes = _alone(session), _lanes(session)
    rows = exact_rows(lanes, 4, session.tokenizer.length)
    assert rows >= 1 and lanes.lanes == 1 and lanes.mark() == START
    lanes.rows = rows
    lanes.hold(4)
    for lane in present:
        _prompt(lanes, lane)
    for step in range(3):
        found = lanes.decode_lanes({lane: SAID[lane][step] for lane in present[::-1]})
        for lane in present:
            np.testing.assert_array_equal(found[lane], expected[lane][step])
    for lane in set(range(4)) - set(present):  # empty all along, and still
        lanes.select(lane)
        assert lanes.mark() == START
        _prompt(lanes, lane)
        np.testing.assert_array_equal(lanes.decode_tokens(SAID[lane][:1]), expected[lane][0])


def test_a_lane_that_fills_a_gap_keeps_what_it_holds(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, lanes = _alone(session), _lanes(session)
    lanes.rows = exact_rows(lanes, 4, session.tokenizer.length)
    lanes.hold(4)
    for lane in range(3):
        _prompt(lanes, lane)
    llama: Any = session.backend._library.llama  # type: ignore[attr-defined]
    decode, sizes = llama.llama_decode, []

    def count(context: Any, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(llama, "llama_decode", count)
    found = lanes.decode_lanes({0: SAID[0][0], 2: SAID[2][0]})
    assert sizes == ([3] if lanes.rows >= 3 else [1, 1])
    later = lanes.decode_lanes({1: SAID[1][0]})
    for lane in (0, 2):
        np.testing.assert_array_equal(found[lane], expected[lane][0])
    np.testing.assert_array_equal(later[1], expected[1][0])


def test_rows_beyond_the_exact_ones_are_close(session: Session) -> None:
    expected, lanes = _alone(session), _lanes(session)
    lanes.rows = 4
    lanes.hold(4)
    for lane in range(4):
        _prompt(lanes, lane)
    found = lanes.decode_lanes({lane: SAID[lane][0] for lane in range(4)})
    for lane in range(4):
        np.testing.assert_allclose(found[lane], expected[lane][0], atol=0.05)


def test_more_fewer_and_larger_lanes_keep_what_they_hold(session: Session) -> None:
    expected, lanes = _alone(session), _lanes(session)
    capacity = session.backend._capacity  # type: ignore[attr-defined]
    _prompt(lanes, 0)
    lanes.hold(2)
    _prompt(lanes, 1)
    lanes.hold(4)
    for lane in range(2):
        lanes.select(lane)
        np.testing.assert_array_equal(lanes.decode_tokens(SAID[lane][:1]), expected[lane][0])
    lanes.select(2)
    lanes.decode_tokens([1] * (capacity + 1))  # all lanes grow
    assert session.backend._capacity == 2 * capacity  # type: ignore[attr-defined]
    for lane in range(2):
        lanes.select(lane)
        np.testing.assert_array_equal(lanes.decode_tokens(SAID[lane][1:2]), expected[lane][1])
    lanes.hold(1)
    lanes.select(0)
    np.testing.assert_array_equal(lanes.decode_tokens(SAID[0][2:]), expected[0][2])


def test_a_refused_batch_leaves_every_lane_as_it_was(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, lanes = _alone(session), _lanes(session)
    lanes.rows = 1  # two calls, of which the second fails
    lanes.hold(2)
    for lane in range(2):
        _prompt(lanes, lane)
    llama: Any = session.backend._library.llama  # type: ignore[attr-defined]
    decode, calls = llama.llama_decode, []

    def refuse(context: Any, batch: Any) -> int:
        calls.append(batch)
        return int(decode(context, batch)) if len(calls) == 1 else 1

    monkeypatch.setattr(llama, "llama_decode", refuse)
    with pytest.raises(GenerationError, match=r"could not evaluate the tokens of 1 answers"):
        lanes.decode_lanes({0: SAID[0][0], 1: SAID[1][0]})
    monkeypatch.undo()
    found = lanes.decode_lanes({0: SAID[0][0], 1: SAID[1][0]})
    for lane in range(2):
        np.testing.assert_array_equal(found[lane], expected[lane][0])


def test_memory_bounds_all_lanes_together(session: Session) -> None:
    lanes, backend = _lanes(session), session.backend
    backend._all_cells = 4096  # type: ignore[attr-defined]
    assert lanes.fits(2, 2048) and not lanes.fits(3, 2048) and lanes.fits(16, 256)
    lanes.hold(4)
    assert backend._capacity == 1024  # type: ignore[attr-defined]
    with pytest.raises(GenerationError, match="17 answers at once do not fit"):
        lanes.hold(17)
    lanes.select(3)
    with pytest.raises(GenerationError, match="1025 tokens do not fit beside the other answers"):
        lanes.decode_tokens([1] * 1025)
    assert lanes.lanes == 4 and lanes.mark() == START


@pytest.mark.parametrize("total", [None, 2048])
def test_a_crew_on_it_says_what_each_says_alone(session: Session, total: int | None) -> None:
    frames = [Frame.from_pixels(_pixels(seed)) for seed in range(2)]
    asked = [(frame, f"Is it {number}?") for number in range(3) for frame in frames]
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 7, "max_new_tokens": 24}
    expected = [session.ask(frame, question, **settings).text for frame, question in asked]
    assert session.prepare(4)[0] == 4
    if total is not None:
        session.backend._all_cells = total  # type: ignore[attr-defined]
    crew, texts = Crew(4), dict[int, str]()

    class Reader:
        def __init__(self, number: int) -> None:
            self.number = number

        def piece(self, text: str) -> None:
            pass

        def ended(self, answer: Any) -> None:
            texts[self.number] = answer.text

        def failed(self, error: Exception) -> None:
            raise error

    studies = {id(frame): session.study(frame) for frame in frames}
    for number, (frame, question) in enumerate(asked):
        while not crew.has_room:
            crew.advance()
        crew.add(studies[id(frame)].stream(question, **settings), Reader(number))
    while len(texts) < len(asked):
        crew.advance()
    assert [texts[number] for number in range(len(asked))] == expected
    assert len(set(expected)) > 1
    crew.advance()
    crew.dismiss()


def test_cells_of_a_lane() -> None:
    assert lane_cells(1, 10, 16, 1000) == 16
    assert lane_cells(1, 700, 16, 1000) == 1000
    assert lane_cells(1, 1001, 16, 1000) is None
    assert lane_cells(4, 300, 2048, 4096) == 1024
    assert lane_cells(3, 1280, 2048, 4096) == 1280
    assert lane_cells(3, 1281, 2048, 4096) is None


def test_runs_of_lanes() -> None:
    assert runs([0, 1, 2, 4, 5, 7], 8) == [range(3), range(4, 6), range(7, 8)]
    assert runs([0, 1, 2, 4, 5, 7], 8, {3}) == [range(6), range(7, 8)]
    assert runs([0, 1, 2, 4, 5, 7], 8, {3, 6}) == [range(8)]
    assert runs([0, 2, 4], 3, {1, 3}) == [range(3), range(4, 5)]
    assert runs([0, 3], 8, {1, 2}) == [range(1), range(3, 4)]  # two missing: no gain
    assert runs([0, 2], 1, {1}) == [range(1), range(2, 3)]
    assert runs([0, 1, 2, 3, 4], 2) == [range(2), range(2, 4), range(4, 5)]
    assert runs([], 2) == []
