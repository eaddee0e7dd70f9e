"""What one running server holds: the session, its queue, the files, and its limits."""

import asyncio
import hashlib
import io
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from medmo_edge.images import Frame, replace_path
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.artifact_watch import CHANGED, ArtifactWatch
from medmo_edge.runtime.server_engine import Engine
from medmo_edge.runtime.server_files import Reader, Spool, decode_data_url
from medmo_edge.runtime.server_metrics import LOG, Metrics
from medmo_edge.runtime.server_problems import Problem, bad_request
from medmo_edge.runtime.server_store import Store
from medmo_edge.runtime.session import Session, Study

ALIAS = "medmo-edge"
_KEPT_CHATS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits of a server. Bytes, seconds, counts."""

    token: str | None
    max_body_bytes: int = 64 << 20
    max_upload_bytes: int = 1 << 30
    max_kept_bytes: int = 4 << 30
    max_images: int = 16
    max_studies: int = 64
    max_tokens: int = 4096
    max_waiting: int = 32
    parallel: int = 4
    exact: bool = True
    timeout_seconds: float = 300.0
    study_seconds: float = 3600.0
    stop_seconds: float = 60.0


class State:
    """Made when the server starts, closed when it ends."""

    def __init__(self, session: Session, settings: Settings) -> None:
        manifest = session.manifest
        self.session = session
        self.settings = settings
        self.watch = ArtifactWatch.of(session)
        self._told = False
        self.parallel, self.rows = session.prepare(settings.parallel, exact=settings.exact)
        self.metrics = Metrics()
        self.spool = Spool()
        self.reader = Reader()
        self.engine = Engine(
            self.metrics,
            max_waiting=settings.max_waiting,
            check=self.require_unchanged,
            parallel=self.parallel,
        )
        self.store = Store(
            self.spool,
            self.reader,
            max_studies=settings.max_studies,
            max_bytes=settings.max_kept_bytes,
            seconds=settings.study_seconds,
        )
        self.chats = Chats(session, self.spool, self.reader, settings)
        self.model = _model_name(manifest)
        self.model_names = frozenset({self.model, ALIAS})
        self.fingerprint = f"{session.backend.name}-{manifest.sha256[:16] or 'none'}"
        self.special_ids = frozenset(session.tokenizer.special_ids.values())
        self.started = int(time.time())

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of a token."""
        return self.session.tokenizer.token_bytes(id)

    def require_unchanged(self) -> None:
        """Errors: Problem 503: the answers' provenance would name another artifact."""
        if self.watch.changed():
            message = CHANGED.format("server")
            if not self._told:
                self._told = True
                LOG.error(message)
            raise Problem(503, message, "artifact_changed")

    def close(self) -> None:
        """End the running answers within the limit, then delete all files."""
        self.engine.close(self.settings.stop_seconds)
        self.reader.close()
        self.spool.close()


class Chats:
    """The images of recent chats, so that the same ones are neither decoded nor evaluated again."""

    def __init__(self, session: Session, spool: Spool, reader: Reader, settings: Settings) -> None:
        self._session = session
        self._spool = spool
        self._reader = reader
        self._settings = settings
        self._studies: OrderedDict[tuple[str, ...], Study] = OrderedDict()

    async def study(self, images: Sequence[tuple[str, str]]) -> Study:
        """A study of ``images``: (place in the body, data URL). Errors: Problem, MedmoError."""
        limit = self._settings.max_images
        if len(images) > limit:
            raise bad_request(f"{len(images)} images are above this server's {limit}", "messages")
        files = await asyncio.to_thread(_decode, images)
        key = tuple(digest for digest, _ in files)
        if key not in self._studies:
            frames = [await self._frame(index, data) for index, (_, data) in enumerate(files)]
            self._studies[key] = await asyncio.to_thread(self._session.study, frames)
        self._studies.move_to_end(key)
        while len(self._studies) > _KEPT_CHATS:
            self._studies.popitem(last=False)  # closed when the last question on it has ended
        return self._studies[key]

    async def _frame(self, index: int, data: bytes) -> Frame:
        path, _ = await asyncio.to_thread(self._spool.add, io.BytesIO(data), len(data))
        try:
            frame = await self._reader.read(path, name=f"image {index + 1}")
        finally:
            self._reader.forget(path)
            path.unlink(missing_ok=True)
        return replace_path(frame, f"image {index + 1}")


def state_of(request: Request) -> State:
    """The state of the server that received ``request``."""
    state: State = request.app.state.medmo
    return state


def _decode(images: Sequence[tuple[str, str]]) -> list[tuple[str, bytes]]:
    """(sha256, bytes) of every data URL."""
    files = [decode_data_url(url, place) for place, url in images]
    return [(hashlib.sha256(data).hexdigest(), data) for data in files]


def _model_name(manifest: Manifest) -> str:
    if manifest.backend == "fake":
        return "fake"
    name = str(manifest.checkpoint.get("name") or "model")
    return f"{Path(name).name}-{manifest.target}"
