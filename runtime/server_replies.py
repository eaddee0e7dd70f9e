"""The bodies that the server sends, as pydantic models, for the OpenAPI document and for tests.

The server builds plain dictionaries (streams have thousands); a test holds them against these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Exactly the named fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorDetail(Reply):
    """What is wrong and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """OpenAI's error form, used everywhere."""

    error: ErrorDetail


class ModelReply(Reply):
    """The one model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Reply):
    """All models."""

    object: Literal["list"]
    data: list[ModelReply]


class Health(Reply):
    """``ok``, or why a restart is needed."""

    status: Literal["ok", "artifact_changed"]
    version: str


class BoxReply(Reply):
    """A finding: XYXY, half-open, in source pixels of image number ``image`` of the question."""

    label: str
    image: int
    xyxy: list[float]


class TimingsReply(Reply):
    """Seconds and tokens."""

    load_seconds: float
    image_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    reused_tokens: int


class ArtifactReply(Reply):
    """Which weights answered."""

    target: str
    manifest_sha256: str


class Facts(Reply):
    """Everything about an answer but its text."""

    boxes: list[BoxReply]
    finish_reason: Literal["stop", "length", "cancelled", "timeout"]
    backend: str
    device: str
    timings: TimingsReply
    source: list[dict[str, Any]]
    artifact: ArtifactReply
    rejected_boxes: list[str]
    seed: int
    notice: str


class CachedTokens(Reply):
    """Prompt tokens that needed no evaluation."""

    cached_tokens: int


class Usage(Reply):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatText(Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class TokenChoice(Reply):
    """A token, its natural log-probability and its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenReply(TokenChoice):
    """A token of the answer."""

    top_logprobs: list[TokenChoice]


class Logprobs(Reply):
    """The tokens of the answer."""

    content: list[TokenReply]
    refusal: None


class ChatChoice(Reply):
    """The only choice."""

    index: int
    message: ChatText
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class ChatReply(Reply):
    """OpenAI's ``chat.completion`` with ``medmo_edge`` added."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    medmo_edge: Facts


class ImageReply(BaseModel):
    """One file of a study: the frame that was read first. More fields say how it was read."""

    model_config = ConfigDict(strict=True)

    index: int
    format: str
    width: int
    height: int
    frame: int
    num_frames: int


class StudyReply(Reply):
    """An uploaded study."""

    id: str
    object: Literal["study"]
    created: int
    expires_at: int
    images: list[ImageReply]
    answers: list[str]
    notice: str


class StudyList(Reply):
    """All studies."""

    object: Literal["list"]
    data: list[StudyReply]


class AskedView(Reply):
    """One frame that was asked about."""

    index: int
    frame: int
    window: str | None


class AnswerReply(Facts):
    """An answer that a study keeps."""

    id: str
    object: Literal["study.answer"]
    study: str
    question: str
    text: str
    images: list[AskedView]
