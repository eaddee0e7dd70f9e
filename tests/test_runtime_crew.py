"""Several answers at once: each is what it would be alone, whoever comes and goes beside it."""

import threading
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes_fake import LanesFake, grey_frame, session_on

from medmo_edge.errors import GenerationError
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.crew import Crew
from medmo_edge.runtime.session import Session, Study, load
from medmo_edge.runtime.streams import Stream

QUESTIONS = ("Is it?", "Where is it?", "What is this?")
SIZE = 4


@dataclass
class Heard:
    """What a reader was told."""

    pieces: list[str] = field(default_factory=list)
    answer: Answer | None = None
    error: Exception | None = None
    order: list[int] = field(default_factory=list)
    number: int = 0

    def piece(self, text: str) -> None:
        assert not self.over and text
        self.pieces.append(text)

    def ended(self, answer: Answer) -> None:
        assert not self.over
        self.answer = answer
        self.order.append(self.number)

    def failed(self, error: Exception) -> None:
        assert not self.over
        self.error = error
        self.order.append(self.number)

    @property
    def over(self) -> bool:
        return self.answer is not None or self.error is not None


def _finish(crew: Crew, *heard: Heard) -> None:
    until = time.monotonic() + 20
    while not all(each.over for each in heard):
        assert time.monotonic() < until, "an answer never ends"
        crew.advance()


def _perform(crew: Crew, streams: list[Stream]) -> list[Heard]:
    """All of them, each as soon as there is room."""
    order: list[int] = []
    heard = [Heard(order=order, number=number) for number in range(len(streams))]
    for stream, reader in zip(streams, heard, strict=True):
        while not crew.has_room:
            crew.advance()
        crew.add(stream, reader)
    _finish(crew, *heard)
    return heard


@cache
def _alone(question: str, greys: tuple[int, ...], **options: Any) -> str:
    with session_on(LanesFake()) as session:
        return session.ask([grey_frame(grey) for grey in greys], question, **options).text


@dataclass(frozen=True)
class Asked:
    """A question, when it comes (rounds after the last one) and when it is cancelled."""

    question: str
    greys: tuple[int, ...]
    length: int
    after: int
    cancelled: int | None


ASKED = st.builds(
    Asked,
    question=st.sampled_from(QUESTIONS),
    greys=st.lists(st.integers(0, 2), max_size=2).map(tuple),
    length=st.integers(1, 40),
    after=st.integers(0, 6),
    cancelled=st.none() | st.integers(0, 12),
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(ASKED, min_size=1, max_size=10),
    st.integers(1, SIZE),
    st.sampled_from([200, 1000, 1 << 20]),
    st.sampled_from([0, 1 << 20]),
)
def test_every_answer_is_what_it_is_alone(
    asked: list[Asked], size: int, total: int, budget: int
) -> None:
    backend = LanesFake(total)
    session = session_on(backend, budget)
    crew = Crew(size)
    studies: dict[tuple[int, ...], Study] = {}
    frames = {grey: grey_frame(grey) for grey in range(3)}
    heard: list[Heard] = []
    events: list[tuple[int, threading.Event]] = []
    for number, each in enumerate(asked):
        for _ in range(each.after):
            crew.advance()
        while not crew.has_room:
            crew.advance()
        if each.greys not in studies:
            studies[each.greys] = session.study([frames[grey] for grey in each.greys])
        event = threading.Event()
        stream = studies[each.greys].stream(each.question, max_new_tokens=each.length, cancel=event)
        reader = Heard(number=number)
        crew.add(stream, reader)
        heard.append(reader)
        if each.cancelled == 0:
            event.set()
        elif each.cancelled is not None:
            events.append((number + each.cancelled, event))
        for at, late in events:
            if at <= number:
                late.set()
    for _, event in events:
        crew.advance()
        event.set()
    _finish(crew, *heard)
    for each, reader in zip(asked, heard, strict=True):
        assert reader.error is None and reader.answer is not None
        assert "".join(reader.pieces) == reader.answer.text
        expected = _alone(each.question, each.greys, max_new_tokens=each.length)
        if reader.answer.finish_reason == "cancelled":
            assert expected.startswith(reader.answer.text) and each.cancelled is not None
        else:
            assert reader.answer.text == expected
    assert crew.size == 0
    for greys, study in studies.items():  # the session is as good as new
        assert study.ask(QUESTIONS[0]).text == _alone(QUESTIONS[0], greys)
    crew.dismiss()


def test_tokens_of_several_answers_are_evaluated_together() -> None:
    backend = LanesFake()
    session = session_on(backend)
    crew = Crew(SIZE)
    study = session.study([])
    streams = [study.stream(f"Question {number}?", max_new_tokens=30) for number in range(8)]
    heard = _perform(crew, streams)
    for number, each in enumerate(heard):
        assert each.answer is not None
        assert each.answer.text == _alone(f"Question {number}?", (), max_new_tokens=30)
    assert max(backend.batches) == SIZE
    crew.dismiss()


def test_an_image_is_encoded_once_for_all_who_ask_about_it() -> None:
    backend = LanesFake()
    backend.look_seconds = 0.05
    session = session_on(backend)
    crew = Crew(SIZE)
    study = session.study(grey_frame(1))
    heard = _perform(crew, [study.stream(question) for question in QUESTIONS])
    assert backend.encoded == [1]
    reused = sorted(each.answer.timings.reused_tokens for each in heard if each.answer)
    assert reused[0] == 0 and reused[1] == reused[2] > 4
    (later,) = _perform(crew, [study.stream("And now?")])
    assert backend.encoded == [1] and later.answer is not None
    assert later.answer.timings.reused_tokens == reused[2]
    assert later.answer.text == _alone("And now?", (1,))
    crew.dismiss()


def test_whoever_waits_for_an_image_goes_on_when_its_first_asker_leaves() -> None:
    backend = LanesFake()
    backend.look_seconds = 0.2
    session = session_on(backend)
    crew, gone = Crew(SIZE), threading.Event()
    study = session.study(grey_frame(1))
    first, second = Heard(), Heard()
    crew.add(study.stream("Is it?", cancel=gone), first)
    crew.advance()
    crew.add(study.stream("Is it?"), second)
    crew.advance()
    gone.set()
    _finish(crew, first, second)
    assert first.answer is not None and second.answer is not None
    assert (first.answer.text, first.answer.finish_reason) == ("", "cancelled")
    assert second.answer.text == _alone("Is it?", (1,))
    crew.dismiss()


def test_running_answers_get_tokens_while_an_image_is_encoded() -> None:
    backend = LanesFake()
    session = session_on(backend)
    crew = Crew(SIZE)
    text, look = Heard(), Heard()
    crew.add(session.study([]).stream("Question 0?", max_new_tokens=200), text)
    crew.advance()
    backend.look_seconds = 0.3
    crew.add(session.study(grey_frame(2)).stream("Is it?"), look)
    _finish(crew, text)
    assert not look.over  # still looking
    _finish(crew, look)
    assert look.answer is not None and look.answer.text == _alone("Is it?", (2,))
    crew.dismiss()


def test_a_queued_image_is_given_up_at_once() -> None:
    backend = LanesFake()
    backend.look_seconds = 5.0
    session = session_on(backend)
    crew, events = Crew(SIZE), [threading.Event() for _ in range(2)]
    heard = [Heard(), Heard()]
    for grey, (event, reader) in enumerate(zip(events, heard, strict=True)):
        crew.add(session.study(grey_frame(grey)).stream("Is it?", cancel=event), reader)
        crew.advance()
    started = time.monotonic()
    events[1].set()
    _finish(crew, heard[1])
    events[0].set()
    _finish(crew, heard[0])
    assert time.monotonic() - started < 2
    assert backend.encoded == []
    crew.dismiss()


def test_one_thread_at_a_time_looks_at_images() -> None:
    backend = LanesFake()
    backend.look_seconds = 0.05  # brisk: only those that come before this is known go aside
    session = session_on(backend)
    crew = Crew(SIZE)
    streams = [session.study(grey_frame(grey)).stream("Is it?") for grey in range(12)]
    heard = _perform(crew, streams)
    for grey, each in enumerate(heard):
        assert each.answer is not None and each.answer.text == _alone("Is it?", (grey,))
    assert sorted(backend.encoded) == list(range(12))
    crew.dismiss()


def test_whoever_leaves_during_the_prompt_has_said_nothing() -> None:
    backend = LanesFake()
    backend.look_seconds = 0.2
    session = session_on(backend)
    crew, events, heard = Crew(SIZE), [threading.Event() for _ in range(3)], list[Heard]()
    study = session.study(grey_frame(1))
    for event in events:  # one looks, two wait for the same picture
        heard.append(Heard())
        crew.add(study.stream("Is it?", cancel=event), heard[-1])
        crew.advance()
    events[1].set()
    _finish(crew, heard[1])
    assert not heard[0].over and not heard[2].over
    events[2].set()
    backend.look_seconds = 0
    _finish(crew, *heard)
    for number in (1, 2):
        answer = heard[number].answer
        assert answer is not None and (answer.text, answer.finish_reason) == ("", "cancelled")
    assert heard[0].answer is not None and heard[0].answer.text == _alone("Is it?", (1,))
    crew.dismiss()


def test_what_does_not_fit_beside_the_others_waits_and_is_not_overtaken() -> None:
    backend = LanesFake(total=1000)
    session = session_on(backend)
    crew = Crew(SIZE)
    study = session.study([])
    lengths = [200, 900, 10, 10]
    streams = [study.stream(f"Question {n}?", max_new_tokens=n) for n in lengths]
    heard = _perform(crew, streams)
    assert [each.answer is not None for each in heard] == [True] * 4
    assert heard[0].order[:2] == [0, 1]  # the long one waited for the first, the rest for it
    for length, each in zip(lengths, heard, strict=True):
        assert each.answer is not None
        assert each.answer.text == _alone(f"Question {length}?", (), max_new_tokens=length)
    crew.dismiss()


def test_a_waiting_answer_ends_with_its_limits() -> None:
    session = session_on(LanesFake(total=600))
    crew, study = Crew(SIZE), session.study([])
    first, late = Heard(), Heard()
    gone = threading.Event()
    crew.add(study.stream("Question 0?", max_new_tokens=500), first)
    crew.advance()
    crew.add(study.stream("Question 1?", max_new_tokens=500, cancel=gone), late)
    crew.advance()
    assert not crew.has_room and not late.over
    gone.set()
    crew.advance()
    assert late.answer is not None and late.answer.finish_reason == "cancelled"
    _finish(crew, first)
    crew.dismiss()


def test_one_that_fails_does_not_touch_the_others() -> None:
    backend = LanesFake()
    session = session_on(backend)
    crew, study = Crew(SIZE), session.study([])
    marker = session.tokenizer.encode("Question 1?")

    def broken(held: list[int]) -> bool:
        asked = any(held[at : at + len(marker)] == marker for at in range(len(held)))
        return asked and len(held) > 40

    backend.broken = broken
    streams = [study.stream(f"Question {number}?", max_new_tokens=60) for number in range(3)]
    heard = _perform(crew, streams)
    assert isinstance(heard[1].error, GenerationError)
    for number in (0, 2):
        answer = heard[number].answer
        assert answer is not None
        assert answer.text == _alone(f"Question {number}?", (), max_new_tokens=60)
    crew.dismiss()


def test_a_crew_and_single_answers_take_turns() -> None:
    session = session_on(LanesFake())
    crew, study, heard = Crew(SIZE), session.study([]), Heard()
    stream = study.stream("Question 0?")
    next(stream)  # is on stage, in this thread
    crew.add(study.stream("Question 1?"), heard)
    crew.advance()
    assert not heard.over and not heard.pieces
    stream.close()
    crew.advance()
    texts: list[str] = []
    other = threading.Thread(target=lambda: texts.append(study.ask("Question 2?").text))
    other.start()
    _finish(crew, heard)
    crew.advance()
    other.join(10)
    assert texts == [_alone("Question 2?", ())]
    crew.dismiss()


def test_closing_the_session_ends_a_crew() -> None:
    session = session_on(LanesFake())
    crew, heard = Crew(SIZE), [Heard(), Heard()]
    study = session.study([])
    for number, reader in enumerate(heard):
        crew.add(study.stream(f"Question {number}?", max_new_tokens=5000, seed=1), reader)
        crew.advance()
    closing = threading.Thread(target=session.close)
    closing.start()
    _finish(crew, *heard)
    crew.advance()
    closing.join(10)
    assert not closing.is_alive()
    crew.dismiss()


@pytest.mark.parametrize("answers", [1, 3])
def test_a_backend_without_lanes_answers_one_after_the_other(answers: int) -> None:
    with load("fake:yes") as session:
        assert session.prepare(8) == (1, 1)
        crew = Crew(1)
        study = session.study(grey_frame(1))
        heard = _perform(crew, [study.stream("Is it?") for _ in range(answers)])
        assert [each.answer.text for each in heard if each.answer] == ["yes"] * answers
        assert heard[0].order == list(range(answers))
        crew.dismiss()


def test_preparing_measures_how_many_rows_are_exact() -> None:
    class Rounding(LanesFake):
        """Three rows together are still exact, four are not."""

        def decode_lanes(self, tokens: Any) -> Any:
            found = super().decode_lanes(tokens)
            return {lane: row + (len(tokens) > 3) * 1e-6 for lane, row in found.items()}

    def session() -> Session:
        return session_on(Rounding())

    assert session().prepare(8) == (8, 3)
    assert session().prepare(2) == (2, 2)
    assert session().prepare(8, exact=False) == (8, 8)
    used = session()
    with used.study(grey_frame(1)) as study:
        study.ask("Is it?")
        assert used.prepare(8) == (8, 3)
        assert used.backend.mark().cells == 0
        again = study.ask("Where is it?")
        assert again.text == _alone("Where is it?", (1,)) and again.timings.reused_tokens > 0
