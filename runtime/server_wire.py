"""The bodies of the chat API as pydantic models: one source for checking and for the OpenAPI file.

Fields of OpenAI's API that would change an answer and that we cannot honour are refused by name;
fields that change nothing here (``user``, ``metadata``, ...) are accepted. Not here: what the
fields do.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_MESSAGES = 256
MAX_PARTS = 64
MAX_TEXT = 1 << 20
MAX_STOPS = 16


class Strict(BaseModel):
    """No conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is the integer 3 there."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]
Absent = Annotated[None, Field(description="Not supported.")]


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    """``data:<type>;base64,<bytes>`` of a PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM file."""

    url: Annotated[str, Field(description="A data URL; addresses are never fetched.")]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image, in the place where the model sees it."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Strict):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
    name: str | None = None


class UserMessage(Strict):
    """A question, with images."""

    role: Literal["user"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
    name: str | None = None


class AssistantMessage(Strict):
    """An earlier answer; the empty fields are those that OpenAI's client sends back."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
    name: str | None = None
    refusal: Absent = None
    audio: Absent = None
    tool_calls: Absent = None
    function_call: Absent = None
    annotations: Ignored = None
    medmo_edge: Ignored = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class JsonSchema(Strict):
    """A named JSON Schema that the answer must follow."""

    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema", default_factory=dict)]
    strict: bool | None = None


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class Generation(Strict):
    """How to answer; shared by chats and studies."""

    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1 << 20)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STOPS)
        ]
        | None
    ) = None
    max_tokens: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = None
    response_format: ResponseFormat | None = None


class ChatRequest(Generation):
    """The body of ``POST /v1/chat/completions``."""

    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, Field(ge=1, le=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Ignored = None
    modalities: list[Literal["text"]] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None


class ViewBody(Strict):
    """One frame of one file of a study."""

    index: Annotated[Whole, Field(ge=0, lt=1 << 20)] = 0
    frame: Annotated[Whole, Field(ge=0, lt=1 << 20)] = 0
    window: (
        Annotated[
            str, Field(max_length=64, description="CENTER,WIDTH, a preset, a number, or auto")
        ]
        | None
    ) = None


class AskRequest(Generation):
    """The body of ``POST /v1/studies/{study}/ask``: a question, or a task in the model's words."""

    question: Text | None = None
    task: Literal["report", "caption", "detect", "locate"] | None = None
    target: Annotated[str, Field(max_length=200)] | None = None
    images: Annotated[list[ViewBody], Field(min_length=1, max_length=64)] | None = None
