"""Several turns: the model sees all, keeps what it can, and answers as if nothing had been kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.errors import PromptError
from medmo_edge.images import Frame
from medmo_edge.runtime import fake
from medmo_edge.runtime.session import load

IMAGE = {"type": "image"}
FRAME = Frame.from_pixels(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


FIRST = {"role": "user", "content": [IMAGE, _text("Where is the nodule?")]}
TALK = [FIRST, {"role": "assistant", "content": "On the left."}]
SECOND = {"role": "user", "content": "How large is it?"}


def test_one_message_is_the_same_as_a_question() -> None:
    chat = fake.chat()
    with load("fake:x") as session:
        (picture,) = session.study(FRAME).pictures
    asked = chat.prompt("Where is the nodule?", [picture])
    ids, rest, cuts = chat.conversation([FIRST], [picture])
    assert (ids, rest) == asked and cuts == []


def test_the_prompt_is_the_rendered_template_cut_after_answers() -> None:
    chat = fake.chat()
    ids, rest, cuts = chat.conversation(
        [{"role": "system", "content": [_text("Be brief.")]}, *_plain(), _question("And?")], []
    )
    # written out by hand from the fake's template
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids + rest == chat.tokenizer.encode(expected)
    assert ids == chat.tokenizer.encode(expected[: expected.index("Hi<|im_end|>") + 12])
    assert cuts == [len(ids)]


def _plain() -> list[dict[str, Any]]:
    return [_question("Hello"), {"role": "assistant", "content": [_text("Hi")]}]


def _question(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [_text(text)]}


def test_turns_reuse_what_was_evaluated_and_answer_the_same(tiny_artifact: Path) -> None:
    talk = [FIRST, {"role": "assistant", "content": [_text("On the left.")]}, _question("Large?")]
    with load(tiny_artifact, threads=1) as fresh:
        expected = fresh.study(FRAME).converse(talk, max_new_tokens=12).finish()
    with load(tiny_artifact, threads=1) as session:
        study = session.study(FRAME)
        first = study.converse([FIRST], max_new_tokens=12).finish()
        again = study.converse(talk, max_new_tokens=12).finish()
        other = study.converse([*talk[:2], _question("Round?")], max_new_tokens=12).finish()
    assert again.text == expected.text
    assert first.timings.reused_tokens == 0 and again.timings.image_seconds == 0
    assert 0 < again.timings.reused_tokens < other.timings.reused_tokens


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "last message"),
        (TALK, "last message"),
        ([{"role": "user", "content": ""}], "empty"),
        ([FIRST, *TALK], "last message"),
        ([*TALK, FIRST], "2 image places for 1"),
    ],
)
def test_conversations_that_cannot_be_carried(messages: list[Any], words: str) -> None:
    with load("fake:x") as session, session.study(FRAME) as study:
        with pytest.raises(PromptError, match=words):
            study.converse(messages)
