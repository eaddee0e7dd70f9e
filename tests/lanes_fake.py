"""A backend with lanes that computes nothing, and a session on it.

What it says depends on everything its lane holds, pictures included, so an answer that sees a
wrong token, a wrong picture or another lane changes.
"""

import threading
import time
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError
from medmo_edge.images import Frame
from medmo_edge.runtime import fake
from medmo_edge.runtime.backends import Interrupted
from medmo_edge.runtime.session import Session

LETTERS = "abcdefgh"


class LanesFake(fake.Fake):
    """See ``medmo_edge.runtime.backends.Lanes``; ``total``: cells of all lanes."""

    def __init__(self, total: int = 1 << 20) -> None:
        self._held: list[list[int]] = [[]]
        self._lane = 0
        super().__init__("x", min(total, 1 << 16))
        tokenizer = _chat().tokenizer
        self._letters = tokenizer.encode(LETTERS)
        self._eos = tokenizer.special_ids["<|im_end|>"]
        self.total = total
        self.rows = 64
        self.batches: list[int] = []  # tokens of each call of decode_lanes
        self.encoded: list[int] = []  # grey of each picture
        self.look_seconds = 0.0
        self._tower = threading.Lock()
        self.broken: Callable[[list[int]], bool] = lambda held: False

    @property
    def _ids(self) -> list[int]:
        return self._held[self._lane]

    @_ids.setter
    def _ids(self, ids: list[int]) -> None:
        self._held[self._lane] = ids

    @property
    def lanes(self) -> int:
        return len(self._held)

    def select(self, lane: int) -> None:
        assert 0 <= lane < len(self._held)
        self._lane = lane

    def fits(self, lanes: int, cells: int) -> bool:
        return cells <= self.max_cells and lanes * cells <= self.total

    def hold(self, lanes: int) -> None:
        self._held = [*self._held[:lanes], *([] for _ in range(lanes - len(self._held)))]
        self._lane = min(self._lane, lanes - 1)

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        self._append(ids)
        if self.broken(self._ids):
            del self._ids[-len(ids) :]
            raise GenerationError("this lane is broken")
        return self._logits()

    def decode_lanes(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        self.batches.append(len(tokens))
        if any(self.broken([*self._held[lane], token]) for lane, token in tokens.items()):
            raise GenerationError("one of the lanes is broken")
        found = {}
        for lane, token in tokens.items():
            self.select(lane)
            self._ids.append(token)
            found[lane] = self._logits()
        return found

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.encode_aside(resized_HWC, self._hook)

    def encode_aside(
        self, resized_HWC: NDArray[np.uint8], stop: Callable[[], bool] | None
    ) -> NDArray[np.float32]:
        assert self._tower.acquire(blocking=False), "two threads in the vision tower"
        try:
            self._look(stop)
        finally:
            self._tower.release()
        grey = int(resized_HWC[0, 0, 0])
        self.encoded.append(grey)
        tokens = resized_HWC.shape[0] // 32 * (resized_HWC.shape[1] // 32)
        return np.full((tokens, 1), -1 - grey, np.float32)

    def _look(self, stop: Callable[[], bool] | None) -> None:
        until = time.monotonic() + self.look_seconds
        while True:
            if stop is not None and stop():
                raise Interrupted
            if time.monotonic() >= until:
                return
            time.sleep(0.002)

    def append_encoded(self, resized_HWC: NDArray[np.uint8], rows_NR: NDArray[np.float32]) -> None:
        self._append(rows_NR[:, 0].astype(int).tolist())

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        self.append_encoded(resized_HWC, self.encode_image(resized_HWC))

    def _logits(self) -> NDArray[np.float32]:
        number = zlib.crc32(np.array(self._ids, np.int32).tobytes())
        logits = np.full(self._length, -np.inf, np.float32)
        logits[self._letters[number % len(LETTERS)]] = 1
        logits[self._eos] = 2 if number % 23 == 0 else 0
        return logits


_chat = cache(fake.chat)


def session_on(backend: LanesFake, budget_bytes: int = 1 << 20) -> Session:
    """A session whose answers come from ``backend``."""
    manifest, chat = fake.artifact("x"), _chat()
    settings: dict[str, Any] = {"budget_bytes": budget_bytes, "load_seconds": 0.0}
    return Session(backend, chat, manifest, **settings)


def grey_frame(grey: int) -> Frame:
    """64 x 64 pixels of one grey."""
    return Frame.from_pixels(np.full((64, 64, 3), grey, np.uint8))
