"""Server-sent events, and the end of an answer when its reader has gone."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from medmo_edge.runtime.server_engine import Job
from medmo_edge.runtime.server_problems import Problem


def event(value: dict[str, Any]) -> bytes:
    """One event. JSON escapes line breaks, so no text can end an event early."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def event_stream(
    request: Request, job: Job, events: AsyncIterator[bytes]
) -> StreamingResponse:
    """A response that sends ``events`` and cancels ``job`` when its reader goes away.

    A problem before the first piece is raised; later it is an event ``{"error": ...}``, which
    OpenAI's clients raise. Errors: Problem.
    """
    async with _watched(request, job):
        await job.begun()

    async def body() -> AsyncIterator[bytes]:
        try:
            async for data in events:
                yield data
        except Problem as problem:
            yield event(problem.body())
        finally:
            job.cancelled.set()

    headers = {"X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


@asynccontextmanager
async def cancelled_with(request: Request, job: Job) -> AsyncIterator[None]:
    """Cancel ``job`` when the client disconnects, or when the block ends."""
    try:
        async with _watched(request, job):
            yield
    finally:
        job.cancelled.set()


@asynccontextmanager
async def _watched(request: Request, job: Job) -> AsyncIterator[None]:
    watch = asyncio.create_task(_watch(request, job))
    try:
        yield
    except BaseException:
        job.cancelled.set()
        raise
    finally:
        watch.cancel()


async def _watch(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancelled.set()
