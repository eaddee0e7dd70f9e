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
_KEPT_PIXEL_BYTES = 256 << 20  # of the images of recent chats, as the model sees them
_SOON_HASHED = 1 << 20  # characters of data URLs that are hashed sooner than a thread takes over


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
        self._studies: OrderedDict[tuple[bytes, ...], Study] = OrderedDict()
        self._bytes = 0

    async def study(self, images: Sequence[tuple[str, str]]) -> Study:
        """A study of ``images``: (place in the body, data URL). Errors: Problem, MedmoError."""
        limit = self._settings.max_images
        if len(images) > limit:
            raise bad_request(f"{len(images)} images are above this server's {limit}", "messages")
        large = sum(len(url) for _, url in images) > _SOON_HASHED
        key = await asyncio.to_thread(_hashes, images) if large else _hashes(images)
        if key not in self._studies:
            study = await self._reader.work(self._open, images)
            if key not in self._studies:  # else another question about them was faster
                self._studies[key] = study
                self._bytes += _pixel_bytes(study)
        self._studies.move_to_end(key)
        study = self._studies[key]
        while len(self._studies) > self._settings.max_studies or self._bytes > _KEPT_PIXEL_BYTES:
            _, oldest = self._studies.popitem(last=False)
            self._bytes -= _pixel_bytes(oldest)  # it is closed when its last question has ended
        return study

    def _open(self, images: Sequence[tuple[str, str]]) -> Study:
        """A new study; in a thread."""
        files = [decode_data_url(url, place) for place, url in images]
        return self._session.study([self._frame(index, data) for index, data in enumerate(files)])

    def _frame(self, index: int, data: bytes) -> Frame:
        name = f"image {index + 1}"
        path, _ = self._spool.add(io.BytesIO(data), len(data))
        try:
            return replace_path(self._reader.decode(path, name=name), name)
        finally:
            path.unlink(missing_ok=True)


def state_of(request: Request) -> State:
    """The state of the server that received ``request``."""
    state: State = request.app.state.medmo
    return state


def _hashes(images: Sequence[tuple[str, str]]) -> tuple[bytes, ...]:
    """SHA-256 of every data URL."""
    return tuple(hashlib.sha256(url.encode()).digest() for _, url in images)


def _pixel_bytes(study: Study) -> int:
    return sum(picture.resized_HWC.nbytes for picture in study.pictures)


def _model_name(manifest: Manifest) -> str:
    if manifest.backend == "fake":
        return "fake"
    name = str(manifest.checkpoint.get("name") or "model")
    return f"{Path(name).name}-{manifest.target}"
