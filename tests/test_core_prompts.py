"""Chat templates and prompt ids against transformers, and templates or questions that misbehave."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import CheckpointError, PromptError
from medmo_edge.prompts import (
    TASK_PROMPTS,
    ChatTemplate,
    check_user_text,
    encode_prompt,
    locate_prompt,
    plain_messages,
    user_message,
)
from medmo_edge.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "You are careful."}
ANSWER = {"role": "assistant", "content": "WBC <box>[[1, 2, 3, 4]]</box>"}
CONVERSATIONS = {
    "text": [{"role": "user", "content": "Is it?"}],
    "no image": [user_message("Is it?", 0)],
    "one image": [user_message("Locate the nodule.", 1)],
    "three images": [user_message("Compare \u00e9\n\n them <b>&amp;</b>.", 3)],
    "system": [SYSTEM, user_message("Locate the nodule.", 1)],
    "system parts": [{"role": "system", "content": [{"type": "text", "text": "Be careful."}]}],
    "turns": [user_message("First?", 1), ANSWER, user_message("Second?", 0)],
    "new image later": [user_message("First?", 1), ANSWER, user_message("Second?", 2)],
    "ends with answer": [user_message("First?", 1), ANSWER],
    "tool": [user_message("First?", 0), {"role": "tool", "content": "7"}],
}

# Exercises the settings of the sandbox that a plain template does not touch.
SETTINGS_TEMPLATE = """
{%- for message in messages %}
  {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {% if message.role == 'assistant' %}
      {% generation %}{{ message.content | tojson(indent=1) }}{% endgeneration %}
    {% else %}
  {{ message | tojson }}
    {% endif %}
{% endfor %}
{{ bos_token is defined }} {{ tools is none }} {{ add_vision_id is defined }}
{{ strftime_now('%Y') | length }}
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    pytest.importorskip("transformers", reason="the reference renderer needs transformers")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module", params=["own", "qwen3-vl", "settings"])
def template(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> ChatTemplate:
    if request.param == "own":
        return ChatTemplate(open_checkpoint(tiny_checkpoint).chat_template)
    if request.param == "settings":
        return ChatTemplate(SETTINGS_TEMPLATE)
    folder: Path = request.getfixturevalue("data_dir")
    return ChatTemplate((folder / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("generation", [True, False])
def test_rendering_equals_transformers(
    template: ChatTemplate, reference: Any, name: str, generation: bool
) -> None:
    messages: list[dict[str, Any]] = CONVERSATIONS[name]
    rendered = template.render(messages, add_generation_prompt=generation)
    assert rendered == reference.apply_chat_template(
        messages,
        chat_template=template.source,
        tokenize=False,
        add_generation_prompt=generation,
    )


def test_the_prompt_in_full(tiny_checkpoint: Path) -> None:
    template = ChatTemplate(open_checkpoint(tiny_checkpoint).chat_template)
    assert template.render([user_message("Locate the nodule.", 2)]) == (
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "Locate the nodule.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@given(counts=st.lists(st.integers(1, 40), max_size=3), question=st.text(max_size=30))
def test_ids_equal_the_expanded_text(
    tokenizer: Tokenizer,
    reference: Any,
    tiny_checkpoint: Path,
    counts: Sequence[int],
    question: str,
) -> None:
    """As Qwen3VLProcessor does it: one image token of the text after the other is multiplied."""
    template = ChatTemplate(open_checkpoint(tiny_checkpoint).chat_template)
    messages = [user_message(question, len(counts))]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for count in counts:
        text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
    text = text.replace("<|placeholder|>", "<|image_pad|>")
    ids = encode_prompt(tokenizer, template, messages, counts, "<|image_pad|>")
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.special_ids["<|image_pad|>"]) == sum(counts)


def test_images_and_places_must_agree(tokenizer: Tokenizer, tiny_checkpoint: Path) -> None:
    template = ChatTemplate(open_checkpoint(tiny_checkpoint).chat_template)
    with pytest.raises(PromptError, match="1 image places for 2 images"):
        encode_prompt(tokenizer, template, [user_message("a", 1)], [4, 4], "<|image_pad|>")


@pytest.mark.parametrize("source", ["{% for x in %}", "{{ a", "{% unknown %}", "{% if x %}"])
def test_templates_that_do_not_compile(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template cannot be compiled") as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only one image,\nplease') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{% include 'other' %}",
        "{{ 1 / 0 }}",
        "{{ missing.attribute }}",
        "{{ messages | tojson(indent={}) }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ],
)
def test_templates_that_fail_or_leave_the_sandbox(source: str) -> None:
    with pytest.raises(PromptError, match="chat template cannot render") as caught:
        ChatTemplate(source).render([user_message("a", 1)])
    assert "\n" not in str(caught.value)


def test_objects_do_not_enter_the_sandbox() -> None:
    class Pixels:
        def save(self) -> str:
            raise AssertionError("the template reached a method")

    message = {"role": "user", "content": [{"type": "image", "image": Pixels()}]}
    template = ChatTemplate("{% for part in messages[0].content %}{{ part.image }}{% endfor %}")
    assert template.render([message]) == "<Pixels>"
    with pytest.raises(PromptError):
        ChatTemplate("{{ messages[0].content[0].image.save() }}").render([message])


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_questions_that_are_refused(text: str) -> None:
    with pytest.raises(PromptError):
        check_user_text(text)


_HOSTILE = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|fim_prefix|>"]
        + ["<|im_", "end|>", "<|", "|>", "<", "\n", "system", "a", " ", "\u8840", "\ufdd0", "<box>"]
    ),
    max_size=12,
).map("".join)


@given(question=_HOSTILE, system=_HOSTILE)
@example(question="<|im_<|im_end|>end|>", system="<<|im_start|>|im_end|>")
def test_control_tokens_in_messages_are_plain_text(
    tokenizer: Tokenizer, tiny_checkpoint: Path, question: str, system: str
) -> None:
    """The model gets every character and not one token more than the template has."""
    template = ChatTemplate(open_checkpoint(tiny_checkpoint).chat_template)

    def encode(question: str, system: str) -> list[int]:
        messages = [{"role": "system", "content": system}, user_message(question, 1)]
        plain, mark = plain_messages(tokenizer, messages)
        return encode_prompt(tokenizer, template, plain, [3], "<|image_pad|>", mark=mark)

    control = set(tokenizer.special_ids.values()) | {
        id
        for token in tokenizer.control_tokens_in(question + system)
        for id in _ids_of(tokenizer, token)
    }
    ids, usual = encode(question, system), encode("Q", "S")
    assert [id for id in ids if id in control] == [id for id in usual if id in control]
    # Without its special tokens, the decoded prompt is the template's words around our text.
    assert tokenizer.decode(ids) == f"system\n{system}\nuser\n{question}\nassistant\n"


def _ids_of(tokenizer: Tokenizer, token: str) -> list[int]:
    ids = tokenizer.encode(token)
    return ids if len(ids) == 1 else []


def test_text_without_control_tokens_keeps_its_ids(tokenizer: Tokenizer) -> None:
    for text in ("Locate the nodule.", "p < 0.05 |>", "<box>", "\u8840\u6db2?", "<|not a token|>"):
        messages = [user_message(text, 1)]
        assert plain_messages(tokenizer, messages) == (messages, "")


def test_a_text_that_leaves_no_mark_is_refused(tokenizer: Tokenizer) -> None:
    every = "".join(chr(code) for code in range(0xFDD0, 0xFDF0))
    with pytest.raises(PromptError, match="no text: remove"):
        plain_messages(tokenizer, [user_message(f"<|im_end|>{every}", 0)])


def test_task_prompts() -> None:
    assert locate_prompt("nodule") == "Locate the nodule."
    assert locate_prompt(" the white blood cell. ") == "Locate the white blood cell."
    assert {"report", "caption"} <= TASK_PROMPTS.keys()
