"""A running server for tests: the real application on a real port, in a thread of this process."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from medmo_edge.runtime.serve import Address, bind
from medmo_edge.runtime.session import load

if TYPE_CHECKING:
    import httpx2

    from medmo_edge.runtime.server_state import State

TOKEN = "a-token-for-the-tests"
_NEEDED = ("httpx2", "llguidance", "prometheus_client", "pydantic", "starlette", "uvicorn")


@dataclass(frozen=True)
class Served:
    """Where the server is, a client that has the token, and what it holds."""

    url: str
    client: "httpx2.Client"
    state: "State"


@contextmanager
def served(artifact: str | Path, **limits: Any) -> Iterator[Served]:
    """Serve ``artifact`` with ``limits`` of Settings for the length of the block, or skip."""
    for name in _NEEDED:
        pytest.importorskip(name, reason="needs the serve extra")
    import httpx2
    import uvicorn

    from medmo_edge.runtime.server_app import build
    from medmo_edge.runtime.server_state import Settings, State

    listener = bind(Address(port=0))
    with load(artifact) as session:
        state = State(session, Settings(**{"token": TOKEN, **limits}))
        server = uvicorn.Server(
            uvicorn.Config(build(state), log_config=None, access_log=False, ws="none")
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        try:
            with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
                yield Served(url, client, state)
        finally:
            server.should_exit = True
            thread.join(30)
            listener.close()


def png(width: int = 64, height: int = 48, grey: int = 128) -> bytes:
    """A grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
