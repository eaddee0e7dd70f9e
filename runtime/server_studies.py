"""``/v1/studies``: upload images once, ask about them many times, fetch results as DICOM or FHIR.

A question says which files, frames and windows it is about; without, it is about all files as
uploaded. Not here: what a structured report looks like (results.py).
"""

import asyncio
import io
import math
import secrets
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from datetime import datetime
from threading import Event
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from medmo_edge.errors import MedmoError, UsageError
from medmo_edge.images import Frame, WindowRequest, parse_window
from medmo_edge.overlay import NOTICE, draw_overlay
from medmo_edge.prompts import TASK_PROMPTS, locate_prompt
from medmo_edge.runtime import results
from medmo_edge.runtime.server_answers import facts, without_path
from medmo_edge.runtime.server_bodies import options_of, read_json
from medmo_edge.runtime.server_engine import Finished, Job
from medmo_edge.runtime.server_problems import Problem, bad_request, not_found, of_error
from medmo_edge.runtime.server_state import State, state_of
from medmo_edge.runtime.server_store import Entry, Kept, View
from medmo_edge.runtime.server_stream import cancelled_with, event, event_stream
from medmo_edge.runtime.server_wire import AskRequest, ViewBody
from medmo_edge.runtime.session import Answer, Stream

T = TypeVar("T")

MAX_FILES = 64
_RESULTS = {
    "sr": (results.make_sr, "application/dicom", "dcm"),
    "gsps": (results.make_gsps, "application/dicom", "dcm"),
    "sc": (results.make_sc, "application/dicom", "dcm"),
    "fhir": (results.make_fhir, "application/fhir+json", "json"),
}


async def create(request: Request) -> Response:
    """``POST /v1/studies``."""
    state = state_of(request)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        message = "send multipart/form-data with one or more parts named file"
        raise Problem(415, message, "unsupported_media_type")
    async with request.form(max_files=MAX_FILES, max_fields=8, max_part_size=4096) as form:
        unknown = set(form) - {"file", "frame", "window"}
        if unknown:
            raise bad_request("the form may hold file, frame and window only", code="unknown_field")
        files = [part.file for part in form.getlist("file") if isinstance(part, UploadFile)]
        if not files or len(files) != len(form.getlist("file")):
            raise bad_request("send one or more files in parts named file", "file")
        frame, window = _number(form.get("frame"), "frame"), _window(form.get("window"))
        entry = await state.store.add(files, frame, window)
    headers = {"Location": f"/v1/studies/{entry.id}"}
    return JSONResponse(_describe(state, entry), 201, headers=headers)


async def listing(request: Request) -> Response:
    """``GET /v1/studies``."""
    state = state_of(request)
    data = [_describe(state, entry) for entry in state.store.entries()]
    return JSONResponse({"object": "list", "data": data})


async def show(request: Request) -> Response:
    """``GET /v1/studies/{study}``."""
    state = state_of(request)
    return JSONResponse(_describe(state, _entry(request)))


async def delete(request: Request) -> Response:
    """``DELETE /v1/studies/{study}``."""
    state_of(request).store.delete(request.path_params["study"])
    return Response(status_code=204)


async def image(request: Request) -> Response:
    """``GET /v1/studies/{study}/images/{index}``: a frame as PNG, windowed as the model gets it."""
    state = state_of(request)
    kind = request.query_params.get("view", "source")
    if kind not in ("source", "model"):
        raise bad_request("view is source or model", "view")
    frame = await _frame(request)
    pixels = frame.pixels
    if kind == "model":
        study = await _medmo(asyncio.to_thread(state.session.study, frame))
        pixels = study.pictures[0].resized_HWC
    return Response(await asyncio.to_thread(_png, pixels), media_type="image/png")


async def image_facts(request: Request) -> Response:
    """``GET /v1/studies/{study}/images/{index}/facts``: size, window, modality, notes."""
    return JSONResponse(_source(await _frame(request)))


async def ask(request: Request) -> Response:
    """``POST /v1/studies/{study}/ask``."""
    state, entry = state_of(request), _entry(request)
    state.require_unchanged()
    body = await read_json(request, AskRequest, state.settings.max_body_bytes)
    asked = await _prepare(state, entry, body)
    if body.stream:
        return await event_stream(request, asked.job, _events(asked))
    async with cancelled_with(request, asked.job):
        answer, _ = await asked.job.finish()
    return JSONResponse(asked.finished(answer))


async def answer(request: Request) -> Response:
    """``GET /v1/studies/{study}/answers/{answer}``."""
    entry = _entry(request)
    return JSONResponse(_answer(entry, entry.answer(request.path_params["answer"])))


async def result(request: Request) -> Response:
    """``GET /v1/studies/{study}/answers/{answer}/{kind}``: sr, gsps, sc, fhir or overlay."""
    kept = _entry(request).answer(request.path_params["answer"])
    kind = request.path_params["kind"]
    if kind == "overlay":
        return await _overlay(request, kept)
    if kind not in _RESULTS:
        raise not_found("kind of result")
    make, media, suffix = _RESULTS[kind]
    # The same answer gives the same UIDs whenever it is fetched.
    options = results.ResultOptions(seed=kept.id, moment=kept.made, question=kept.question)
    try:
        data = await asyncio.to_thread(make, kept.frames, kept.answer, options)
    except MedmoError as error:
        raise _without_paths(error, kept.frames) from None
    return _attachment(data, media, f"medmo-edge-{kind}.{suffix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A question about a study on its way to an answer that the study keeps."""

    entry: Entry
    job: Job
    frames: tuple[Frame, ...]
    views: tuple[View, ...]
    question: str
    seed: int

    def finished(self, answer: Answer) -> dict[str, Any]:
        kept = Kept(
            id=f"answer-{secrets.token_hex(8)}",
            made=datetime.now().astimezone(),
            answer=answer,
            frames=self.frames,
            views=self.views,
            question=self.question,
            seed=self.seed,
        )
        self.entry.keep(kept)
        return _answer(self.entry, kept)


async def _prepare(state: State, entry: Entry, body: AskRequest) -> _Asked:
    """Queue the question of ``body``. Errors: Problem."""
    views = tuple(entry.views if body.images is None else [_asked_view(v) for v in body.images])
    if len(views) > state.settings.max_images:
        raise bad_request(f"{len(views)} images are above {state.settings.max_images}", "images")
    frames = await state.store.frames(entry, views)
    study = await _medmo(state.store.study(entry, state.session, views, frames))
    question = _question(body)
    try:
        options = options_of(body, max_tokens=body.max_tokens, limit=state.settings.max_tokens)
    except MedmoError as error:
        raise of_error(error) from None

    def start(seconds: float, cancel: Event) -> Stream:
        return study.stream(question, options=options, timeout_seconds=seconds, cancel=cancel)

    job = state.engine.submit(entry.id, start, state.settings.timeout_seconds)
    return _Asked(
        entry=entry, job=job, frames=frames, views=views, question=question, seed=options.seed
    )


async def _events(asked: _Asked) -> AsyncIterator[bytes]:
    async for batch in asked.job.batches():
        for item in batch:
            if isinstance(item, Finished):
                yield event({"type": "answer", "answer": asked.finished(item.answer)})
            else:
                yield event({"type": "text", "text": item.text})
        if not batch:
            yield event({"type": "waiting"})


def _question(body: AskRequest) -> str:
    if body.task == "locate":
        if not (body.target or "").strip():
            raise bad_request("task locate needs a target, e.g. nodule", "target")
        return locate_prompt(body.target or "")
    if body.target is not None:
        raise bad_request("a target belongs to task locate", "target")
    if (body.task is None) == (body.question is None):
        raise bad_request("give either a question or a task", "question")
    return body.question if body.question is not None else TASK_PROMPTS[str(body.task)]


def _entry(request: Request) -> Entry:
    return state_of(request).store.get(request.path_params["study"])


async def _frame(request: Request) -> Frame:
    """The frame that path and query name. Errors: Problem."""
    entry, query = _entry(request), request.query_params
    if set(query) - {"frame", "window", "view"}:
        raise bad_request("the query may hold frame, window and view only", code="unknown_field")
    index = _number(request.path_params["index"], "index")
    if index >= len(entry.views):
        raise not_found("image")
    first = entry.views[index]
    frame = _number(query["frame"], "frame") if "frame" in query else first.frame
    window = _window(query["window"]) if "window" in query else first.window
    (found,) = await state_of(request).store.frames(entry, [View(index, frame, window)])
    return found


def _asked_view(body: ViewBody) -> View:
    return View(body.index, body.frame, _window(body.window))


def _number(value: object, name: str) -> int:
    """A number from 0 in a path, query or form; 0 when absent. Errors: Problem 400."""
    if value is None:
        return 0
    if not (isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 8):
        raise bad_request(f"{name} is a number from 0", name)
    return int(value)


def _window(value: object) -> WindowRequest:
    """A window as ``ask --window`` takes it. Errors: Problem 400."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > 64:
        raise bad_request("window is a name, a number or CENTER,WIDTH", "window")
    try:
        window = parse_window(value)
    except UsageError:
        raise bad_request("window is a name, a number or CENTER,WIDTH", "window") from None
    if isinstance(window, tuple) and not (all(map(math.isfinite, window)) and window[1] > 0):
        raise bad_request("window needs a finite center and a width above 0", "window")
    return window


def _describe(state: State, entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "object": "study",
        "created": int(entry.created),
        "expires_at": state.store.expires(entry),
        "images": [{"index": index, **_source(first)} for index, first in enumerate(entry.firsts)],
        "answers": list(entry.answers),
        "notice": NOTICE,
    }


def _answer(entry: Entry, kept: Kept) -> dict[str, Any]:
    return {
        "id": kept.id,
        "object": "study.answer",
        "study": entry.id,
        "question": kept.question,
        "text": kept.answer.text,
        "images": [
            {"index": view.index, "frame": view.frame, "window": _window_text(view.window)}
            for view in kept.views
        ],
        **facts(kept.answer, kept.seed),
    }


def _source(frame: Frame) -> dict[str, Any]:
    return without_path(frame.source.to_dict())


def _window_text(window: WindowRequest) -> str | None:
    if isinstance(window, tuple):
        return f"{window[0]:g},{window[1]:g}"
    return None if window is None else str(window)


async def _overlay(request: Request, kept: Kept) -> Response:
    index = _number(request.query_params.get("image"), "image")
    if index >= len(kept.frames):
        raise not_found("image")
    boxes = [box for box in kept.answer.boxes if box.image == index]
    drawn = await asyncio.to_thread(draw_overlay, kept.frames[index], boxes)
    data = await asyncio.to_thread(_png, drawn)
    return _attachment(data, "image/png", "medmo-edge-overlay.png")


def _attachment(data: bytes, media: str, name: str) -> Response:
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type=media, headers=disposition)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG of uint8 [H, W, 3]; grey pictures in one channel, fast rather than small."""
    grey = bool((pixels[..., :1] == pixels).all())
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels).save(
        buffer, "PNG", compress_level=1
    )
    return buffer.getvalue()


def _without_paths(error: MedmoError, frames: tuple[Frame, ...]) -> Problem:
    message = str(error)
    for index, frame in enumerate(frames):
        message = message.replace(frame.source.path, f"image {index + 1}")
    return bad_request(message, code="no_result")


async def _medmo(work: Awaitable[T]) -> T:
    """``work`` with our errors as problems."""
    try:
        return await work
    except MedmoError as error:
        raise of_error(error) from None
