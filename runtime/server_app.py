"""The HTTP application: routes, who may call them, headers, and what happens to errors.

Every request passes one gate: host name, token, a number for the log, the same security headers.
The page, its files, ``/healthz`` and ``/openapi.json`` hold no data and need no token; everything
else does. Nothing answers to other origins (no CORS headers).
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmo_edge import __version__
from medmo_edge.runtime import server_chat as chat
from medmo_edge.runtime import server_studies as studies
from medmo_edge.runtime.server_metrics import CONTENT_TYPE
from medmo_edge.runtime.server_openapi import document
from medmo_edge.runtime.server_problems import Problem, not_found, too_large
from medmo_edge.runtime.server_state import State, state_of

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CSP,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_PAGE = {
    "/": ("viewer.html", "text/html; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
    "/viewer_answer.js": ("viewer_answer.js", "text/javascript; charset=utf-8"),
    "/viewer_frame.js": ("viewer_frame.js", "text/javascript; charset=utf-8"),
    "/viewer_server.js": ("viewer_server.js", "text/javascript; charset=utf-8"),
}
_OPEN = frozenset({*_PAGE, "/healthz", "/openapi.json"})
_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
_SWEEP_SECONDS = 30.0
_GONE = 499  # nginx's number for a client that went away; nobody reads it


def build(state: State) -> ASGIApp:
    """The application around ``state``, which it closes when the server ends."""
    routes = [
        *(Route(path, _page, methods=["GET"]) for path in _PAGE),
        Route("/healthz", _health, methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/openapi.json", _openapi, methods=["GET"]),
        Route("/v1/models", _models, methods=["GET"]),
        Route("/v1/models/{model}", _model, methods=["GET"]),
        Route("/v1/chat/completions", chat.complete, methods=["POST"]),
        Route("/v1/studies", studies.listing, methods=["GET"]),
        Route("/v1/studies", studies.create, methods=["POST"]),
        Route("/v1/studies/{study}", studies.show, methods=["GET"]),
        Route("/v1/studies/{study}", studies.delete, methods=["DELETE"]),
        Route("/v1/studies/{study}/ask", studies.ask, methods=["POST"]),
        Route("/v1/studies/{study}/images/{index}", studies.image, methods=["GET"]),
        Route("/v1/studies/{study}/images/{index}/facts", studies.image_facts, methods=["GET"]),
        Route("/v1/studies/{study}/answers/{answer}", studies.answer, methods=["GET"]),
        Route("/v1/studies/{study}/answers/{answer}/{kind}", studies.result, methods=["GET"]),
    ]
    app = Starlette(routes=routes, lifespan=_lifespan, exception_handlers=_HANDLERS)
    app.router.redirect_slashes = False
    app.state.medmo = state
    state.metrics.describe(
        version=__version__, target=state.session.manifest.target, backend=state.fingerprint
    )
    return _Gate(app, state)


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    state: State = app.state.medmo
    sweeper = asyncio.create_task(_sweep(state))
    yield
    sweeper.cancel()
    await asyncio.to_thread(state.close)


async def _sweep(state: State) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        state.store.expire()


class _Gate:
    """Outermost: token and host, headers, size of bodies, metrics and log, unexpected errors."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id, status = time.monotonic(), secrets.token_hex(8), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers["X-Request-Id"] = request_id
            await send(message)

        try:
            self._check(scope)
            await self._app(
                scope, _bounded(receive, self._state.settings.max_upload_bytes), send_on
            )
        except Problem as problem:
            await _refuse(problem)(scope, receive, send_on)
        except ClientDisconnect:
            status = status or _GONE
        except Exception as error:
            if status == 0:  # else _on_bug has seen it, or the stream had begun
                self._state.metrics.bug(error)
                await _refuse(_bug())(scope, receive, send_on)
        finally:
            route = scope.get("route")
            pattern = route.path if isinstance(route, Route) else "none"
            method = scope["method"] if pattern != "none" else ""
            seconds = time.monotonic() - started
            self._state.metrics.request(f"{method} {pattern}".strip(), status, seconds, request_id)

    def _check(self, scope: Scope) -> None:
        """Errors: Problem 421 for another host name, 401 without the token."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in _HOSTS:  # a web page of another name must not reach us (DNS rebinding)
            raise Problem(421, "this server answers to 127.0.0.1 and localhost only", "wrong_host")
        token = self._state.settings.token
        if token is None or scope["path"] in _OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not _same(given.strip(), token):
            raise Problem(
                401, "wrong or missing token: send Authorization: Bearer", "invalid_api_key"
            )


def _same(given: str, token: str) -> bool:
    """Equality in a time that depends on neither; hashed first, as lengths could be told apart."""
    ours, theirs = (hashlib.sha256(each.encode("latin-1", "replace")) for each in (token, given))
    return hmac.compare_digest(ours.digest(), theirs.digest())


def _bounded(receive: Receive, limit: int) -> Receive:
    """``receive`` that refuses a body above ``limit`` bytes, whatever its header says."""
    total = 0

    async def receive_on() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise too_large("the body", limit)
        return message

    return receive_on


def _refuse(problem: Problem) -> Response:
    return JSONResponse(problem.body(), problem.status, headers=problem.headers())


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _refuse(error)


async def _on_http(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown path, wrong method, broken multipart."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _refuse(not_found("address"))
    if error.status_code == 405:
        response = _refuse(Problem(405, "this address takes another method", "wrong_method"))
        response.headers.update(error.headers or {})
        return response
    return _refuse(Problem(error.status_code, "the body cannot be read", "invalid_body"))


async def _on_bug(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):  # in the middle of its upload or of our answer
        return Response(status_code=_GONE)
    state_of(request).metrics.bug(error)
    return _refuse(_bug())


def _bug() -> Problem:
    return Problem(500, "unexpected error: see the server's log", "internal_error")


_HANDLERS = {Problem: _on_problem, HTTPException: _on_http, Exception: _on_bug}


async def _page(request: Request) -> Response:
    name, media = _PAGE[request.url.path]
    return Response(files("medmo_edge.runtime").joinpath(name).read_bytes(), media_type=media)


async def _health(request: Request) -> Response:
    state = state_of(request)
    changed = state.watch.changed()
    body = {"status": "artifact_changed" if changed else "ok", "version": __version__}
    return JSONResponse(body, 503 if changed else 200)


async def _metrics(request: Request) -> Response:
    state = state_of(request)
    state.metrics.gauge("questions_waiting", state.engine.waiting)
    state.metrics.gauge("answers_running", state.engine.running)
    state.metrics.gauge("studies", len(state.store))
    state.metrics.gauge("study_bytes", state.store.bytes)
    return Response(state.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def _openapi(request: Request) -> Response:
    return JSONResponse(document())


def _model_object(state: State) -> dict[str, object]:
    return {
        "id": state.model,
        "object": "model",
        "created": state.started,
        "owned_by": "medmo-edge",
    }


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_object(state_of(request))]})


async def _model(request: Request) -> Response:
    state = state_of(request)
    if request.path_params["model"] not in state.model_names:
        raise Problem(404, f"this server has one model: {state.model}", "model_not_found", "model")
    return JSONResponse(_model_object(state))
