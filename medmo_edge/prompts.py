"""Prompts: the checkpoint's chat template, our task questions, and the token ids of both.

The template is code that came with a checkpoint: it runs in jinja2's sandbox and sees only plain
data. Nothing here knows pixels; an image is a number of vision tokens. Tools, reasoning fields and
videos are not offered, though a template may use them.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import CheckpointError, PromptError, one_line
from medmo_edge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]

#: questions of the named tasks, in the words of MedMO's own examples
TASK_PROMPTS: dict[str, str] = {
    "report": "Generate a detailed radiology report for this image.",
    "caption": "Describe this medical image.",
    "detect": "Detect and localize all abnormalities in this image.",
}


def locate_prompt(target: str) -> str:
    """The question for the boxes of ``target``, e.g. "nodule" -> "Locate the nodule."."""
    return f"Locate the {target.strip().rstrip('.').removeprefix('the ')}."


def user_message(question: str, num_images: int, image_texts: Sequence[str] = ()) -> Message:
    """One user turn: the images first, then the question.

    ``image_texts``: a text before each image, such as "<image_1>: ", or none.
    """
    content: list[Message] = []
    for index in range(num_images):
        if image_texts:
            content.append({"type": "text", "text": image_texts[index]})
        content.append({"type": "image"})
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


class ChatTemplate:
    """A checkpoint's chat_template.jinja, compiled; renders as ``apply_chat_template`` does."""

    def __init__(self, source: str) -> None:
        """Errors: CheckpointError when ``source`` is not a valid template."""
        import jinja2

        self.source = source
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(
                f"chat template cannot be compiled: {one_line(error, named=True)}"
            ) from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text, with one image token per image.

        Errors: PromptError when the template refuses the messages, fails or leaves its sandbox.
        """
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is foreign code and can fail in any way
            raise PromptError(
                f"chat template cannot render this conversation: {one_line(error, named=True)}"
            ) from error


@cache
def _environment() -> "ImmutableSandboxedEnvironment":
    """The sandbox with transformers' settings (utils/chat_template_utils.py of 5.23)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what training learns from; in a prompt it means nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces jinja2's filter, which escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _plain(value: Any) -> Any:
    """``value`` rebuilt from plain types: objects with methods must not enter the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    vision_token_counts: Sequence[int],
    image_token: str,
    *,
    mark: str = "",
) -> list[int]:
    """Token ids of a conversation, ``image_token`` repeated once per vision token of each image.

    ``mark``: the character that ``plain_messages`` put where text must be cut before it is encoded.
    Errors: PromptError when the conversation does not hold exactly one image token per image.
    """
    text, (image_id, *more) = template.render(messages), tokenizer.encode(image_token)
    parts = text.split(mark) if mark else [text]
    ids = [id for part in parts for id in tokenizer.encode(part)]
    places = ids.count(image_id)
    if more or places != len(vision_token_counts):
        raise PromptError(
            f"conversation has {places} image places for {len(vision_token_counts)} images"
        )
    # Repeated here and not in the text: a large image has thousands of them.
    counts = iter(vision_token_counts)
    return [each for id in ids for each in [id] * (next(counts) if id == image_id else 1)]


def plain_messages(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[Sequence[Message], str]:
    """(``messages``, mark) for ``encode_prompt``, with control tokens in them as plain text.

    Whoever writes ``<|im_end|>`` must not end a turn: the characters reach the model, the token
    does not. The mark is "" when nothing had to be cut, so that all other text has its usual ids.
    Errors: PromptError for text that holds all characters which could be the mark.
    """
    texts = [text for message in messages for text in texts_of(message)]
    if not any(tokenizer.control_tokens_in(text) for text in texts):
        return messages, ""
    mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
    if mark is None:
        raise PromptError("question holds too many characters that are no text: remove them")
    return [_broken(tokenizer, message, mark) for message in messages], mark


_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never characters, says Unicode


def texts_of(message: Message) -> list[str]:
    """The texts of a message, whose content is a text or a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if "text" in part]


def _broken(tokenizer: Tokenizer, message: Message, mark: str) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": tokenizer.break_control_tokens(content, mark)}
    parts = [
        {**part, "text": tokenizer.break_control_tokens(part["text"], mark)}
        if "text" in part
        else part
        for part in content
    ]
    return {**message, "content": parts}


def check_user_text(text: str) -> None:
    """Errors: PromptError when ``text`` is empty."""
    if not text.strip():
        raise PromptError("question is empty: ask something about the image")
