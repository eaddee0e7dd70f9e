"""Server-sent events, and the end of an answer when its reader has gone."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

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
    watch = asyncio.create_task(_watch(request, job))
    try:
        await job.begun()
    except BaseException:
        job.cancelled.set()
        watch.cancel()
        raise
    return _EventStream(job, watch, events)


class _EventStream(StreamingResponse):
    """Sends events; the task that watches the connection is there already."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, watch: asyncio.Task[None], events: AsyncIterator[bytes]) -> None:
        super().__init__(_with_problem(events), headers={"X-Accel-Buffering": "no"})
        self._job = job
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            self._job.cancelled.set()
            self._watch.cancel()


async def _with_problem(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """``events``; a problem on the way is the last one."""
    try:
        async for data in events:
            yield data
    except Problem as problem:
        yield event(problem.body())


@asynccontextmanager
async def cancelled_with(request: Request, job: Job) -> AsyncIterator[None]:
    """Cancel ``job`` when the client disconnects, or when the block ends."""
    watch = asyncio.create_task(_watch(request, job))
    try:
        yield
    finally:
        job.cancelled.set()
        watch.cancel()


async def _watch(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.leave()
