"""Sessions, studies and streams with the fake backend: turns, limits, boxes, JSON form, errors."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import medmo_edge
from medmo_edge.boxes import Box
from medmo_edge.errors import ArtifactError, GenerationError, PromptError, UsageError
from medmo_edge.images import Frame
from medmo_edge.runtime import fake
from medmo_edge.runtime.chat import Chat
from medmo_edge.runtime.session import GenerationOptions, Session, load

FINDING = "WBC <box>[[100, 200, 300, 400]]</box>"


@pytest.fixture
def frame() -> Frame:
    """640 x 480 grey pixels."""
    return Frame.from_pixels(np.full((480, 640, 3), 128, np.uint8))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake backend takes 20 ms per token."""
    decode: Callable[..., NDArray[np.float32]] = fake.Fake.decode_tokens

    def decode_slowly(self: fake.Fake, ids: list[int]) -> NDArray[np.float32]:
        time.sleep(0.02)
        return decode(self, ids)

    monkeypatch.setattr(fake.Fake, "decode_tokens", decode_slowly)


def test_the_fake_answers_and_its_boxes_are_source_pixels(frame: Frame) -> None:
    with load(f"fake:{FINDING}") as session:
        answer = session.ask(frame, "Locate the cell.")
    assert answer.text == FINDING
    assert answer.boxes == (Box("WBC", 64.0, 96.0, 192.0, 192.0),)
    assert answer.finish_reason == "stop"
    # 300 vision tokens; "<|im_start|>user\n" is 6 byte tokens, and so on.
    assert answer.timings.prompt_tokens == 6 + 302 + 16 + 2 + 11
    assert answer.timings.new_tokens == len(FINDING)


def test_public_names_work_from_the_top(frame: Frame) -> None:
    with medmo_edge.load("fake:no") as session:
        answer: medmo_edge.Answer = session.ask(frame, "Is there a nodule?")
    assert answer.text == "no"


def test_json_form_has_exactly_the_published_keys(frame: Frame) -> None:
    with load(f"fake:{FINDING}") as session:
        values = json.loads(json.dumps(session.ask(frame, "Locate it.").to_dict()))
    assert list(values) == [
        "text",
        "boxes",
        "finish_reason",
        "backend",
        "device",
        "timings",
        "source",
        "artifact",
    ]
    assert values["boxes"] == [{"label": "WBC", "image": 0, "xyxy": [64.0, 96.0, 192.0, 192.0]}]
    assert list(values["timings"]) == [
        "load_seconds",
        "image_seconds",
        "prefill_seconds",
        "decode_seconds",
        "prompt_tokens",
        "new_tokens",
    ]
    assert (values["source"]["width"], values["source"]["height"]) == (640, 480)
    assert values["artifact"] == {"target": "fake", "manifest_sha256": ""}


def test_several_images_and_none(frame: Frame) -> None:
    with load("fake:Image 2: mass <box>[[0, 0, 500, 500]]</box>") as session:
        small = Frame.from_pixels(np.zeros((100, 200), np.uint8))
        answer = session.ask([frame, small], "Locate the mass.")
        assert answer.boxes == (Box("mass", 0.0, 0.0, 100.0, 50.0, image=1),)
        assert [source["width"] for source in answer.to_dict()["source"]] == [640, 200]
        text_only = session.ask([], "What is a mass?")
        assert text_only.to_dict()["source"] is None
        assert text_only.boxes == ()


def test_a_study_reuses_its_images(frame: Frame) -> None:
    with load("fake:yes") as session, session.study(frame) as study:
        first, second = study.ask("Is it?"), study.ask("Is it not?")
    prefix = 6 + 302
    assert first.timings.reused_tokens == 0
    assert second.timings.reused_tokens == prefix
    assert second.timings.image_seconds == 0
    assert second.timings.prompt_tokens == first.timings.prompt_tokens + 4


def test_task_prompts_reach_the_model(frame: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    chat_prompt = Chat.prompt

    def remember(self: Chat, question: str, *rest: Any) -> Any:
        asked.append(question)
        return chat_prompt(self, question, *rest)

    monkeypatch.setattr(Chat, "prompt", remember)
    with load("fake:x") as session, session.study(frame) as study:
        session.locate(frame, "nodule")
        study.locate("the nodule.", max_new_tokens=1)
        session.report(frame)
        study.report()
        session.caption(frame)
        study.caption()
    assert asked[:2] == ["Locate the nodule."] * 2
    assert asked[2] == asked[3] != asked[4] == asked[5]


def test_streaming_gives_final_pieces_and_then_the_answer(frame: Frame) -> None:
    with load(f"fake:{FINDING} \u00e9nd") as session, session.study(frame) as study:
        stream = study.stream("Locate it.", stop=(" \u00e9n",))
        assert stream.answer is None
        pieces = list(stream)
        assert stream.answer is not None
        assert "".join(pieces) == stream.answer.text == FINDING
        assert list(stream) == []


def test_options_come_whole_or_one_by_one(frame: Frame) -> None:
    options = GenerationOptions(max_new_tokens=3)
    with load("fake:abcdef") as session, session.study(frame) as study:
        assert study.ask("What?", options=options).text == "abc"
        assert study.ask("What?", options=options, max_new_tokens=2).text == "ab"
        assert session.ask(frame, "What?", max_new_tokens=4).text == "abcd"
        with pytest.raises(UsageError, match="max_tokens"):
            study.ask("What?", max_tokens=3)


def test_an_abandoned_stream_gives_its_turn_away(frame: Frame) -> None:
    with load("fake:abcdef") as session, session.study(frame) as study:
        next(study.stream("What?"))  # dropped at once
        stream = study.stream("What?")
        assert next(stream) == "a"
        stream.close()
        assert stream.answer is None
        with study.stream("What?") as entered:
            next(entered)
        kept = study.stream("What?")
        assert next(kept) == "a"
        assert study.ask("What?").text == "abcdef"  # ends ``kept``, or it would wait forever
        assert list(kept) == []
        with pytest.raises(GenerationError, match="turn"):
            kept.finish()


@pytest.mark.usefixtures("slow")
def test_cancelling_a_stream_keeps_what_was_said(frame: Frame) -> None:
    with load("fake:abcdef") as session, session.study(frame) as study:
        stream = study.stream("What?")
        assert next(stream) == "a"
        stream.cancel()
        answer = stream.finish()
        assert answer.finish_reason == "cancelled"
        assert "abcdef".startswith(answer.text)
        assert study.ask("What?").text == "abcdef"


@pytest.mark.usefixtures("slow")
def test_threads_take_turns_and_each_gets_its_own_answer(frame: Frame) -> None:
    with load("fake:yes, one.") as session:
        studies = [session.study(frame) for _ in range(4)]
        texts: list[str] = []
        threads = [
            threading.Thread(target=lambda s=study: texts.append(s.ask("Is it?").text))
            for study in studies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert texts == ["yes, one."] * 4


@pytest.mark.usefixtures("slow")
def test_waiting_for_a_turn_ends_with_the_limits(frame: Frame) -> None:
    with load("fake:" + "a" * 60) as session, session.study(frame) as study:
        stream = study.stream("What?")
        next(stream)
        answers: list[medmo_edge.Answer] = []
        other = threading.Thread(
            target=lambda: answers.append(study.ask("What?", timeout_seconds=0.2))
        )
        other.start()
        other.join(10)
        assert answers[0].finish_reason == "timeout"
        assert answers[0].text == ""
        assert stream.finish().text == "a" * 60


def test_interrupted_before_the_first_token(frame: Frame) -> None:
    event = threading.Event()
    event.set()
    with load("fake:abc") as session, session.study(frame) as study:
        answer = study.ask("What?", cancel=event)
        assert (answer.text, answer.finish_reason) == ("", "cancelled")
        assert answer.timings.new_tokens == 0
        assert study.ask("What?").text == "abc"


def test_questions_that_cannot_be_asked(frame: Frame) -> None:
    with load("fake:abc", max_context=400) as session, session.study(frame) as study:
        for question in ("", "  \n"):
            with pytest.raises(PromptError):
                study.ask(question)
        plain = study.ask("done and out of it").timings.prompt_tokens
        for question in ("done <|im_end|> it", "<|image_pad|> here"):  # of the same length
            assert study.ask(question).timings.prompt_tokens == plain
        with pytest.raises(GenerationError, match=r"6\d\d tokens, the context holds 400"):
            session.ask([frame, frame], "What?")
        assert study.ask("What?").text == "abc"


def test_use_after_close_is_an_error_not_a_crash(frame: Frame) -> None:
    session = load("fake:abc")
    study = session.study(frame)
    study.close()
    study.close()
    with pytest.raises(GenerationError, match="study is closed"):
        study.ask("What?")
    study = session.study(frame)
    session.close()
    session.close()
    for use in (lambda: study.ask("What?"), lambda: session.study(frame)):
        with pytest.raises(GenerationError, match="session is closed"):
            use()


def test_closing_ends_a_stream_of_the_same_thread(frame: Frame) -> None:
    session = load("fake:abc")
    stream = session.study(frame).stream("What?")
    next(stream)
    session.close()
    assert list(stream) == []


def test_closing_ends_a_stream_that_another_thread_left_alone(frame: Frame) -> None:
    session = load("fake:abc")
    study = session.study(frame)
    streams = [study.stream("What?")]
    other = threading.Thread(target=lambda: next(streams[0]))
    other.start()
    other.join(10)
    session.close()  # would wait forever for its turn
    assert list(streams[0]) == []


@pytest.mark.usefixtures("slow")
def test_closing_cancels_an_answer_in_another_thread(frame: Frame) -> None:
    session = load("fake:" + "a" * 500)
    study = session.study(frame)
    answers: list[medmo_edge.Answer] = []
    other = threading.Thread(target=lambda: answers.append(study.ask("What?")))
    other.start()
    time.sleep(0.3)
    session.close()
    other.join(10)
    assert answers[0].finish_reason == "cancelled"
    assert 0 < len(answers[0].text) < 500


def test_paths_that_are_no_artifacts(tmp_path: Any) -> None:
    with pytest.raises(ArtifactError):
        load(tmp_path / "absent")
    with pytest.raises(ArtifactError):
        load(tmp_path)
    with pytest.raises(UsageError, match="no backend is called 'gpu'"):
        load("fake:x", "gpu")
    with pytest.raises(UsageError, match="threads"):
        load("fake:x", threads=0)


def test_a_session_type_is_public() -> None:
    assert medmo_edge.Session is Session
