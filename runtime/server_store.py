"""Studies kept by a server: uploaded files, what was asked about them, and when they are forgotten.

Everything is in this process and in the spool folder: a restart forgets all studies. Not here:
HTTP, and what an answer is made into.
"""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from medmo_edge.images import Frame, WindowRequest
from medmo_edge.runtime.server_files import Reader, Spool
from medmo_edge.runtime.server_problems import Problem, not_found
from medmo_edge.runtime.session import Answer, Session, Study

_KEPT_VIEWS = 4  # sets of frames of one study whose evaluated images are kept
_KEPT_ANSWERS = 64


@dataclass(frozen=True, slots=True)
class View:
    """One frame of one file of a study, with its window."""

    index: int
    frame: int
    window: WindowRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A finished answer, when it was made, and the frames that it is about."""

    id: str
    made: datetime
    answer: Answer
    frames: tuple[Frame, ...]
    views: tuple[View, ...]
    question: str
    seed: int


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """One study: its files in order, the first frame of each, and its answers."""

    id: str
    created: float
    used: float
    paths: list[Path]
    firsts: list[Frame]
    views: list[View]  # what is asked about when a question does not say
    bytes: int
    studies: OrderedDict[tuple[View, ...], Study] = field(default_factory=OrderedDict)
    answers: OrderedDict[str, Kept] = field(default_factory=OrderedDict)

    def keep(self, answer: Kept) -> None:
        """Remember an answer."""
        self.answers[answer.id] = answer
        while len(self.answers) > _KEPT_ANSWERS:
            self.answers.popitem(last=False)

    def answer(self, id: str) -> Kept:
        """Errors: Problem 404."""
        if id not in self.answers:
            raise not_found("answer")
        return self.answers[id]


class Store:
    """All studies of one server; used by its event loop only."""

    def __init__(
        self, spool: Spool, reader: Reader, *, max_studies: int, max_bytes: int, seconds: float
    ) -> None:
        self._spool = spool
        self._reader = reader
        self._max_studies = max_studies
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of all files kept."""
        return sum(entry.bytes for entry in self._entries.values())

    def entries(self) -> list[Entry]:
        """All studies, oldest first."""
        return list(self._entries.values())

    def get(self, id: str) -> Entry:
        """Errors: Problem 404."""
        entry = self._entries.get(id)
        if entry is None:
            raise not_found("study")
        entry.used = time.time()
        return entry

    def expires(self, entry: Entry) -> int:
        """Unix time at which ``entry`` is deleted unless it is used before."""
        return int(entry.used + self._seconds)

    async def add(self, files: Sequence[BinaryIO], frame: int, window: WindowRequest) -> Entry:
        """A new study of ``files``; every one is decoded once. Errors: Problem 400, 413, 507."""
        if len(self._entries) >= self._max_studies:
            message = f"{self._max_studies} studies are kept already: delete one"
            raise Problem(429, message, "too_many_studies", retry_after=30)
        paths: list[Path] = []
        total = 0
        try:
            for source in files:
                left = self._max_bytes - self.bytes - total
                path, size = await asyncio.to_thread(self._spool.add, source, left)
                paths.append(path)
                total += size
            firsts = [
                await self._reader.read(path, frame, window, name=f"file {at + 1}")
                for at, path in enumerate(paths)
            ]
        except BaseException:
            self._delete(paths)
            raise
        now = time.time()
        entry = Entry(
            id=f"study-{secrets.token_hex(12)}",
            created=now,
            used=now,
            paths=paths,
            firsts=firsts,
            views=[View(index, frame, window) for index in range(len(paths))],
            bytes=total,
        )
        self._entries[entry.id] = entry
        return entry

    async def frames(self, entry: Entry, views: Sequence[View]) -> tuple[Frame, ...]:
        """The frames of ``views``. Errors: Problem."""
        for view in views:
            if not 0 <= view.index < len(entry.paths):
                raise not_found("image")
        found = []
        for view in views:
            path, name = entry.paths[view.index], f"image {view.index + 1}"
            found.append(await self._reader.read(path, view.frame, view.window, name=name))
        return tuple(found)

    async def study(
        self, entry: Entry, session: Session, views: Sequence[View], frames: Sequence[Frame]
    ) -> Study:
        """The runtime's study of ``views``: the same one each time, so images are evaluated once.

        Errors: ImageError.
        """
        key = tuple(views)
        if key not in entry.studies:
            entry.studies[key] = await asyncio.to_thread(session.study, frames)
        entry.studies.move_to_end(key)
        while len(entry.studies) > _KEPT_VIEWS:
            entry.studies.popitem(last=False)
        return entry.studies[key]

    def delete(self, id: str) -> None:
        """Forget a study and delete its files. Errors: Problem 404."""
        entry = self._entries.pop(id, None)
        if entry is None:
            raise not_found("study")
        for study in entry.studies.values():
            study.close()
        self._delete(entry.paths)

    def expire(self) -> None:
        """Delete the studies that nobody used for long."""
        now = time.time()
        for entry in self.entries():
            if entry.used + self._seconds < now:
                self.delete(entry.id)

    def _delete(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._reader.forget(path)
            path.unlink(missing_ok=True)
