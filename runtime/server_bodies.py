"""Request bodies in: bounded reading, checking against a model, one line for what is wrong.

Not here: multipart uploads (server_uploads.py) and what a body asks for.
"""

import secrets
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from medmo_edge.runtime.constrain import schema_text
from medmo_edge.runtime.generate import GenerationOptions
from medmo_edge.runtime.server_problems import Problem, bad_request, too_large
from medmo_edge.runtime.server_wire import Generation, JsonObjectFormat, JsonSchemaFormat

Body = TypeVar("Body", bound=BaseModel)


async def read_json(request: Request, model: type[Body], limit: int) -> Body:
    """The request's body as ``model``.

    Errors: Problem 413 above ``limit`` bytes, 415 for another media type, 400 for anything else.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Problem(415, "send application/json", "unsupported_media_type")
    data = await _read(request, limit)
    try:
        data.decode()
        return model.model_validate_json(data)
    except UnicodeDecodeError as error:
        raise bad_request("the body is not UTF-8", code="invalid_json") from error
    except ValidationError as error:
        raise _problem(error) from None


async def _read(request: Request, limit: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise too_large("the body", limit)
    return bytes(data)


def _problem(error: ValidationError) -> Problem:
    """The first thing that is wrong, by its place; values are never quoted."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return bad_request("the body is not valid JSON", code="invalid_json")
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        where = ".".join(place[:-1]) or "body"
        return bad_request(f"{where}: has a field that is not supported", where, "unknown_field")
    param = ".".join(place)[:200] or "body"
    return bad_request(f"{param}: {first['msg']}"[:400], param)


def options_of(body: Generation, *, max_tokens: int | None, limit: int) -> GenerationOptions:
    """GenerationOptions for a request; greedy and 512 tokens unless it says otherwise.

    ``limit``: the most tokens this server writes. Errors: Problem, UsageError.
    """
    if max_tokens is not None and max_tokens > limit:
        raise bad_request(f"max_tokens {max_tokens} is above this server's {limit}", "max_tokens")
    stop = body.stop or ()
    return GenerationOptions(
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        seed=_seed(body),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        max_new_tokens=max_tokens or min(limit, 512),
        json_schema=_schema(body),
    )


def _seed(body: Generation) -> int:
    """The request's, else a random one: the answer reports it. Greedy answers need none."""
    if body.seed is None:
        return secrets.randbits(31) if body.temperature else 0
    return body.seed % (1 << 63)


def _schema(body: Generation) -> str | None:
    form = body.response_format
    if isinstance(form, JsonObjectFormat):
        return schema_text({"type": "object"})
    if isinstance(form, JsonSchemaFormat):
        return schema_text(form.json_schema.schema_)
    return None
