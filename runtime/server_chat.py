"""``POST /v1/chat/completions``: OpenAI's chat API, as its own client and response models expect.

Images come as data URLs only. An answer carries one field of ours, ``medmo_edge``: boxes in source
pixels, timings, provenance. Not offered: several choices, tools, audio, fetching addresses.
"""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from medmo_edge.errors import MedmoError
from medmo_edge.prompts import Message
from medmo_edge.runtime.generate import GenerationOptions
from medmo_edge.runtime.sampling import Choice
from medmo_edge.runtime.server_answers import facts
from medmo_edge.runtime.server_bodies import options_of, read_json
from medmo_edge.runtime.server_engine import Finished, Job
from medmo_edge.runtime.server_problems import Problem, bad_request, of_error
from medmo_edge.runtime.server_state import State, state_of
from medmo_edge.runtime.server_stream import cancelled_with, event, event_stream
from medmo_edge.runtime.server_wire import (
    AnyMessage,
    AssistantMessage,
    ChatRequest,
    ImagePart,
    SystemMessage,
)
from medmo_edge.runtime.session import Answer, Stream

#: OpenAI knows no other reasons; ours is in the field ``medmo_edge``
_FINISH = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "length"}


async def complete(request: Request) -> Response:
    """The endpoint. Errors: Problem."""
    state = state_of(request)
    state.require_unchanged()
    body = await read_json(request, ChatRequest, state.settings.max_body_bytes)
    if body.model not in state.model_names:
        message = f"this server has one model: {state.model}"
        raise Problem(404, message, "model_not_found", "model")
    job, options = await _submit(state, body, _asker(request, body))
    reply = _Reply.of(state, body, options)
    if body.stream:
        return await event_stream(request, job, _events(reply, job))
    async with cancelled_with(request, job):
        answer, choices = await job.finish()
    return JSONResponse(reply.whole(answer, choices))


async def _submit(state: State, body: ChatRequest, who: str) -> tuple[Job, GenerationOptions]:
    try:
        options = _options(state, body)
        study = await state.chats.study(_images(body.messages))
    except MedmoError as error:
        raise of_error(error) from None
    messages = [_message(each) for each in body.messages]

    def start(seconds: float, cancel: Event) -> Stream:
        limits = replace(options, timeout_seconds=seconds, cancel=cancel)
        return study.converse(messages, options=limits)

    return state.engine.submit(who, start, state.settings.timeout_seconds), options


def _options(state: State, body: ChatRequest) -> GenerationOptions:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs", "top_logprobs")
    wanted = body.max_completion_tokens or body.max_tokens
    options = options_of(body, max_tokens=wanted, limit=state.settings.max_tokens)
    return replace(options, logprobs=(body.top_logprobs or 0) if body.logprobs else None)


def _asker(request: Request, body: ChatRequest) -> str:
    """Whose line a question joins: the named user's, else the connection's."""
    named = body.safety_identifier or body.user
    return f"user {named}" if named else f"peer {request.client}"


def _images(messages: Sequence[AnyMessage]) -> list[tuple[str, str]]:
    """(place in the body, data URL) of every image, in order."""
    found = []
    for at, message in enumerate(messages):
        if not isinstance(message.content, str):
            for index, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    found.append((f"messages.{at}.content.{index}", part.image_url.url))
    return found


def _message(message: AnyMessage) -> Message:
    """The message as the runtime takes it."""
    role = "system" if isinstance(message, SystemMessage) else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[Message] = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
    ]
    if isinstance(message, AssistantMessage):  # templates expect a plain answer
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """What all parts of one answer share, and how they look."""

    state: State
    id: str
    created: int
    options: GenerationOptions
    usage: bool

    @classmethod
    def of(cls, state: State, body: ChatRequest, options: GenerationOptions) -> "_Reply":
        return cls(
            state=state,
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            options=options,
            usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.state.model,
            "system_fingerprint": self.state.fingerprint,
            "choices": choices,
            **more,
        }

    def whole(self, answer: Answer, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(choices),
            "finish_reason": _FINISH[answer.finish_reason],
        }
        ours = facts(answer, self.options.seed)
        return self._object("chat.completion", [choice], usage=usage(answer), medmo_edge=ours)

    def chunk(
        self,
        delta: dict[str, Any],
        choices: Sequence[Choice] = (),
        finish: str | None = None,
        **more: Any,
    ) -> bytes:
        """One event of a stream."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(choices),
            "finish_reason": finish,
        }
        if self.usage:
            more["usage"] = None
        return event(self._object("chat.completion.chunk", [choice], **more))

    def end(self, finished: Finished) -> bytes:
        """The last events of a stream."""
        answer = finished.answer
        ours = facts(answer, self.options.seed)
        finish = _FINISH[answer.finish_reason]
        last = self.chunk({}, finished.choices, finish, medmo_edge=ours)
        if self.usage:
            last += event(self._object("chat.completion.chunk", [], usage=usage(answer)))
        return last + b"data: [DONE]\n\n"

    def _logprobs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if self.options.logprobs is None:
            return None
        special = self.state.special_ids
        content = [
            {
                **self._token(each.id, each.logprob),
                "top_logprobs": [self._token(*t) for t in each.top],
            }
            for each in choices
            if each.id not in special
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        data = self.state.token_bytes(id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


def usage(answer: Answer) -> dict[str, Any]:
    """OpenAI's token counts."""
    times = answer.timings
    return {
        "prompt_tokens": times.prompt_tokens,
        "completion_tokens": times.new_tokens,
        "total_tokens": times.prompt_tokens + times.new_tokens,
        "prompt_tokens_details": {"cached_tokens": times.reused_tokens},
    }


async def _events(reply: _Reply, job: Job) -> AsyncIterator[bytes]:
    head = reply.chunk({"role": "assistant", "content": ""})
    async for batch in job.batches():
        events = [
            reply.end(item)
            if isinstance(item, Finished)
            else reply.chunk({"content": item.text}, item.choices)
            for item in batch
        ]
        yield head + (b"".join(events) or b": waiting\n\n")
        head = b""
