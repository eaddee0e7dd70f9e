"""``medmo-edge serve``: bind, load, print where and with which token, answer until told to stop.

Only this machine can connect: 127.0.0.1 or a Unix socket. Others reach it through a proxy that
speaks TLS, or not at all. SIGTERM and Ctrl-C finish the running answers; a second one cancels them.
"""

import errno
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import UsageError
from medmo_edge.runtime.quiet import silence_libraries
from medmo_edge.runtime.session import load

if TYPE_CHECKING:
    from medmo_edge.runtime.server_state import State

TOKEN_VARIABLE = "MEDMO_EDGE_TOKEN"
MIN_TOKEN = 16
HOST = "127.0.0.1"
_SWITCH_SECONDS = 0.0005  # how long the model's thread waits while another computes in Python


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to listen: a port of 127.0.0.1 (0: any free one), or a Unix socket."""

    port: int = 8000
    path: Path | None = None


def serve(
    artifact: str,
    address: Address,
    *,
    backend: str = "auto",
    threads: int | None = None,
    max_context: int | None = None,
    certified: bool = False,
    need_token: bool = True,
    say: Callable[[str], None] = print,
    **limits: Any,
) -> None:
    """Serve ``artifact`` until SIGTERM or Ctrl-C; ``limits`` are fields of Settings.

    Errors: UsageError for an address in use, a weak token or a missing library; as ``load``.
    """
    _require_libraries()
    from medmo_edge.runtime.server_app import build
    from medmo_edge.runtime.server_state import Settings, State

    token, generated = _token(need_token)
    listener = bind(address)
    try:
        with load(
            artifact,
            backend,
            threads=threads,
            max_context=max_context,
            require_certificate=certified,
        ) as session:
            settings = Settings(token=token, **limits)
            state = State(session, settings)
            try:
                session.grammars.prepare()
                state.reader.warm()
                say(_greeting(address, listener, state, token if generated else None))
                _run(build(state), listener, state)
            finally:
                state.close()
    finally:
        listener.close()
        if address.path is not None:
            address.path.unlink(missing_ok=True)


def run_serve(
    *,
    artifact: str,
    port: int,
    socket: Path | None,
    no_token: bool,
    fast: bool,
    say: Callable[[str], None],
    **options: Any,
) -> None:
    """The command: its options in the units of people."""
    units = {
        "max_upload_mb": ("max_upload_bytes", 1 << 20),
        "timeout": ("timeout_seconds", 1),
        "keep": ("study_seconds", 60),
    }
    given = {name: value for name, value in options.items() if value is not None}
    for name, (field, factor) in units.items():
        if name in given:
            given[field] = given.pop(name) * factor
    address = Address(port=port, path=socket)
    serve(artifact, address, need_token=not no_token, say=say, exact=not fast, **given)


def _require_libraries() -> None:
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}: pip install 'medmo-edge[serve]'") from error


def _token(needed: bool) -> tuple[str | None, bool]:
    """(token or None, whether it was made up here). Errors: UsageError for a weak one."""
    if not needed:
        return None, False
    given = os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return secrets.token_urlsafe(24), True
    if len(given) < MIN_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
        raise UsageError(
            f"{TOKEN_VARIABLE} needs {MIN_TOKEN} or more printable ASCII characters without spaces"
        )
    return given, False


def bind(address: Address) -> socket.socket:
    """A listening socket. Errors: UsageError when the address is taken or not allowed."""
    if address.path is not None:
        return _bind_path(address.path)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, address.port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(_why(error, f"port {address.port} of {HOST}", "--port")) from error
    return listener


def _bind_path(path: Path) -> socket.socket:
    """A Unix socket that only this user can open; a dead server's is replaced."""
    if not hasattr(socket, "AF_UNIX"):
        raise UsageError("this system has no Unix sockets: use --port")
    if path.is_socket() and not _answers(path):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(_why(error, f"socket {path}", "--socket")) from error
    finally:
        os.umask(before)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _why(error: Exception, place: str, option: str) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"{place} is in use: stop the other program or choose another with {option}"
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"cannot listen on {place} ({reason}): choose another with {option}"


def _greeting(address: Address, listener: socket.socket, state: "State", token: str | None) -> str:
    lines = [f"model: {state.model}  backend: {state.session.backend.device}"]
    if state.parallel > 1:
        lines.append(f"at once: {state.parallel} answers{_together(state)}")
    if address.path is not None:
        lines.append(f"socket: {address.path}")
        fragment = ""
    else:
        base = f"http://{HOST}:{listener.getsockname()[1]}"
        fragment = f"#token={token}" if token else ""
        lines += [f"api: {base}/v1", f"viewer: {base}/{fragment}"]
    if token is not None:
        lines.append(f"token: {token}")
    elif state.settings.token is None:
        lines.append("token: none, every program of this machine may ask")
    else:
        lines.append(f"token: as in {TOKEN_VARIABLE}")
    lines.append("Research use only. Not a medical device. Stop with Ctrl-C.")
    return "\n".join(lines)


def _together(state: "State") -> str:
    """How many tokens of different answers are evaluated together, and with which consequence."""
    rows = state.rows
    if not state.settings.exact:
        return f", {rows} tokens together: their last bits may differ from those of one alone"
    if rows == 1:
        return ", token by token: together their bits would differ here (--fast does it)"
    return f", {rows} tokens together, with the same bits as alone"


def _run(app: Any, listener: socket.socket, state: "State") -> None:
    """Serve on ``listener`` until a signal."""
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn, but a signal also empties the queue, and a stop asked for is no failure."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            kinds = (signal.SIGINT, signal.SIGTERM)
            before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
            try:
                yield
            finally:
                for kind, handler in before.items():
                    signal.signal(kind, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
                state.engine.cancel()
            self.should_exit = True
            state.engine.stop_soon()

    sys.setswitchinterval(_SWITCH_SECONDS)
    _log_to_stderr()
    silence_libraries(state.metrics.lost)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(state.settings.stop_seconds),
    )
    Server(config).run(sockets=[listener])


def _log_to_stderr() -> None:
    """Our lines with their time, and nothing else: libraries quote what they were given."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("medmo_edge.server")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    logging.getLogger().addHandler(logging.NullHandler())
