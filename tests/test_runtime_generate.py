"""The token loop with a scripted backend: stop strings, limits, UTF-8, what is emitted when."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmo_edge.errors import UsageError
from medmo_edge.runtime import fake
from medmo_edge.runtime.backends import Mark
from medmo_edge.runtime.generate import (
    Decoding,
    GenerationOptions,
    Limits,
    Outcome,
    StopFilter,
)
from medmo_edge.runtime.sampling import Sampler
from medmo_edge.runtime.steps import pieces

TEXT = st.text(alphabet="ab|<", max_size=24)
STOPS = st.lists(st.text(alphabet="ab|<", min_size=1, max_size=4), max_size=3)


class Script:
    """A backend that says ``ids``, then end of text; ``at`` runs before each decoded token."""

    name, device = "script", "none"

    def __init__(
        self, text: str, max_cells: int = 1 << 20, at: Callable[[int], None] = lambda _: None
    ) -> None:
        self.chat = fake.chat()
        self.max_cells = max_cells
        self.decoded: list[int] = []
        self._at = at
        self._ids = [*self.chat.tokenizer.encode(text), *self.chat.eos_token_ids]

    def first_logits(self) -> NDArray[np.float32]:
        """What the model would say after its prompt."""
        return self._logits()

    def _logits(self) -> NDArray[np.float32]:
        logits = np.zeros(self.chat.tokenizer.length, np.float32)
        logits[self._ids[len(self.decoded)]] = 9
        return logits

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        self._at(len(self.decoded))
        self.decoded += ids
        return self._logits()

    def mark(self) -> Mark:
        return Mark(len(self.decoded), len(self.decoded))


def _run(script: Script, **options: Any) -> tuple[list[str], Outcome]:
    return _drain(_generate(script, GenerationOptions(**options)))


def _generate(script: Script, options: GenerationOptions) -> Generator[str, None, Outcome]:
    """The answer of ``script`` piece by piece, starting from the logits after its prompt."""
    decoding = Decoding(
        Sampler(options, script.chat.tokenizer.length),
        script.chat.tokenizer.stream(),
        script.chat.eos_token_ids,
        options,
        Limits(options),
        script.max_cells - script.mark().cells,
    )
    backend: Any = script
    return pieces(backend, decoding.steps(script.first_logits()))


def _drain(pieces: Any) -> tuple[list[str], Outcome]:
    said = []

    def take() -> Iterator[str]:
        outcome.append((yield from pieces))

    outcome: list[Outcome] = []
    said = list(take())
    return said, outcome[0]


def _first_stop(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first, found letter by letter."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


@given(TEXT, STOPS, st.lists(st.integers(1, 5), min_size=1))
@example("ab|<b", ["|<b", "<"], [1])
def test_stop_strings_cut_the_same_however_the_text_arrives(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    held, emitted, position, step = StopFilter(stops), "", 0, 0
    while position < len(text):
        size = sizes[step % len(sizes)]
        emitted += held.push(text[position : position + size])
        position, step = position + size, step + 1
        assert (_first_stop(text, stops) or text).startswith(emitted)
    emitted += held.flush()
    expected = _first_stop(text, stops)
    assert held.found == (expected is not None)
    assert emitted == (text if expected is None else expected)


@given(TEXT, STOPS)
def test_text_is_not_held_back_without_need(text: str, stops: list[str]) -> None:
    held = StopFilter(stops)
    emitted = "".join(held.push(letter) for letter in text)
    if not held.found:
        waiting = text.removeprefix(emitted)
        assert any(stop.startswith(waiting) for stop in stops) or not waiting


@given(st.text(max_size=20).filter(lambda text: "<|" not in text))  # control tokens are no text
def test_pieces_join_to_the_whole_text_and_never_break_a_character(text: str) -> None:
    pieces, outcome = _run(Script(text))
    assert "".join(pieces) == outcome.text == text
    assert outcome.finish_reason == "stop"
    assert outcome.num_tokens == len(text.encode())
    assert "" not in pieces


def test_a_stop_string_across_tokens_is_never_emitted() -> None:
    pieces, outcome = _run(Script("Finding: nodule.\nUser: next"), stop=("\nUser:",))
    assert "".join(pieces) == outcome.text == "Finding: nodule."
    assert outcome.finish_reason == "stop"


def test_the_beginning_of_a_stop_string_is_said_when_nothing_follows() -> None:
    assert _run(Script("size 3\nUs"), stop=("\nUser:",))[1].text == "size 3\nUs"


def test_a_character_cut_by_the_length_limit_becomes_a_replacement() -> None:
    _, outcome = _run(Script("caf\u00e9"), max_new_tokens=4)
    assert outcome == Outcome("caf\ufffd", "length", 4, outcome.seconds)


def test_the_length_limit_counts_tokens_and_skips_useless_work() -> None:
    script = Script("abcdef")
    _, outcome = _run(script, max_new_tokens=3)
    assert (outcome.text, outcome.finish_reason) == ("abc", "length")
    assert len(script.decoded) == 2  # the last token is never evaluated


def test_a_full_context_ends_the_answer() -> None:
    _, outcome = _run(Script("abcdef", max_cells=4))
    assert (outcome.text, outcome.finish_reason) == ("abcde", "length")


def test_a_cancelled_answer_keeps_what_was_said() -> None:
    event = threading.Event()
    script = Script("abcdef", at=lambda step: event.set() if step == 2 else None)
    _, outcome = _run(script, cancel=event)
    assert (outcome.text, outcome.finish_reason) == ("abcd", "cancelled")


def test_a_late_answer_keeps_what_was_said() -> None:
    script = Script("abcdef", at=lambda step: time.sleep(0.3 if step == 2 else 0))
    _, outcome = _run(script, timeout_seconds=0.25)
    assert (outcome.text, outcome.finish_reason) == ("abcd", "timeout")


def test_time_spent_by_the_reader_is_not_decoding_time() -> None:
    said = _generate(Script("abc"), GenerationOptions())
    next(said)
    time.sleep(0.5)
    assert _drain(said)[1].seconds < 0.4


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"stop": "a string"},
        {"stop": ("",)},
        {"timeout_seconds": 0},
        {"timeout_seconds": float("nan")},
        {"top_p": 2},
    ],
)
def test_impossible_options_name_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        GenerationOptions(**wrong)
