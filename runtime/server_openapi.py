"""The OpenAPI document, made from the models that check requests: it cannot say anything else."""

from functools import cache
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from medmo_edge import __version__
from medmo_edge.overlay import NOTICE
from medmo_edge.runtime import server_replies as replies
from medmo_edge.runtime.server_wire import AskRequest, ChatRequest

_REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, AskRequest)
_REPLIES: tuple[type[BaseModel], ...] = (
    replies.AnswerReply,
    replies.ChatReply,
    replies.ErrorReply,
    replies.Health,
    replies.ModelList,
    replies.ModelReply,
    replies.StudyList,
    replies.StudyReply,
)
_PROBLEMS = {
    "400": "Something in the request cannot work; the message says what",
    "401": "Wrong or missing token",
    "404": "No such model, study, image or answer",
    "405": "Another method is needed",
    "408": "No answer began in time",
    "413": "Larger than a limit",
    "415": "Another media type is needed",
    "421": "Another host name was asked for",
    "429": "The queue or the store is full; Retry-After says when to try again",
    "503": "The server is stopping, or its artifact was changed on disk",
}
_BYTES = {"type": "string", "format": "binary"}
_WINDOW = "CENTER,WIDTH in modality units, a CT preset, the number of a stored window, or auto"


@cache
def document() -> dict[str, Any]:
    """The document as JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MedMO Edge",
            "version": __version__,
            "description": f"{NOTICE}. Answers are unverified output of an algorithm.",
        },
        "security": [{"token": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
        },
    }


def _schemas() -> dict[str, Any]:
    wanted: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((model, "validation") for model in _REQUESTS),
        *((model, "serialization") for model in _REPLIES),
    ]
    _, definitions = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _paths() -> dict[str, Any]:
    study, index, answer = _path("study"), _path("index", _INDEX), _path("answer")
    frame = [_query("frame", _INDEX), _query("window", {"type": "string"}, _WINDOW)]
    view = _query("view", {"type": "string", "enum": ["source", "model"]})
    one_image = [study, index, *frame, view]
    kind = _path("kind", {"type": "string", "enum": ["sr", "gsps", "sc", "fhir", "overlay"]})
    kinds = ("application/dicom", "application/fhir+json", "image/png")
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    chat, asked = _json("ChatReply") | stream, _json("AnswerReply") | stream
    which = [study, answer, kind, _query("image", _INDEX, "Which image of an overlay")]
    return {
        "/healthz": {"get": _open("Whether the server can answer", _json("Health"))},
        "/openapi.json": {
            "get": _open("This document", {"application/json": {"schema": {"type": "object"}}})
        },
        "/metrics": {"get": _get("Prometheus metrics", {"text/plain": {"schema": {}}})},
        "/v1/models": {"get": _get("The model", _json("ModelList"))},
        "/v1/models/{model}": {"get": _get("The model", _json("ModelReply"), _path("model"))},
        "/v1/chat/completions": {"post": _post("Answer a chat", "ChatRequest", chat)},
        "/v1/studies": {
            "get": _get("All studies", _json("StudyList")),
            "post": _upload(),
        },
        "/v1/studies/{study}": {
            "get": _get("A study", _json("StudyReply"), study),
            "delete": _delete(study),
        },
        "/v1/studies/{study}/ask": {"post": _post("Ask about a study", "AskRequest", asked, study)},
        "/v1/studies/{study}/images/{index}": {
            "get": _get("A frame as PNG", {"image/png": {"schema": _BYTES}}, *one_image)
        },
        "/v1/studies/{study}/images/{index}/facts": {
            "get": _get("How a frame was read", _object(), *one_image)
        },
        "/v1/studies/{study}/answers/{answer}": {
            "get": _get("An answer", _json("AnswerReply"), study, answer)
        },
        "/v1/studies/{study}/answers/{answer}/{kind}": {
            "get": _get("An answer as a file", {name: {"schema": _BYTES} for name in kinds}, *which)
        },
    }


_INDEX = {"type": "integer", "minimum": 0, "maximum": 9_999_999}


def _path(name: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    known = schema or {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": known}


def _query(name: str, schema: dict[str, Any], description: str = "") -> dict[str, Any]:
    found = {"name": name, "in": "query", "required": False, "schema": schema}
    return found | ({"description": description} if description else {})


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _object() -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"}}}


def _operation(
    summary: str, status: str, content: dict[str, Any] | None, *parameters: dict[str, Any]
) -> dict[str, Any]:
    done: dict[str, Any] = {"description": summary}
    if content is not None:
        done["content"] = content
    failed = {
        code: {"description": text, "content": _json("ErrorReply")}
        for code, text in _PROBLEMS.items()
    }
    operation: dict[str, Any] = {"summary": summary, "responses": {status: done, **failed}}
    if parameters:
        operation["parameters"] = list(parameters)
    return operation


def _get(summary: str, content: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    return _operation(summary, "200", content, *parameters)


def _open(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    return _get(summary, content) | {"security": []}


def _delete(study: dict[str, Any]) -> dict[str, Any]:
    return _operation("Forget a study and delete its files", "204", None, study)


def _post(
    summary: str, body: str, content: dict[str, Any], *parameters: dict[str, Any]
) -> dict[str, Any]:
    operation = _operation(summary, "200", content, *parameters)
    return operation | {"requestBody": {"required": True, "content": _json(body)}}


def _upload() -> dict[str, Any]:
    files = {"type": "array", "items": _BYTES, "minItems": 1, "maxItems": 64}
    schema = {
        "type": "object",
        "required": ["file"],
        "additionalProperties": False,
        "properties": {
            "file": files,
            "frame": _INDEX,
            "window": {"type": "string", "maxLength": 64, "description": _WINDOW},
        },
    }
    operation = _operation("Upload files as a study", "201", _json("StudyReply"))
    content = {"multipart/form-data": {"schema": schema}}
    return operation | {"requestBody": {"required": True, "content": content}}
