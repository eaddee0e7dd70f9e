"""The llama.cpp backend: GGUF artifacts on the CPU.

Text tokens and pixels come ready made, so llama.cpp neither tokenises nor resizes here: it would
letterbox pictures, round sizes otherwise and limit their tokens, and boxes would shift. GPUs are
not used, even by a library built for them.

Cells and positions are counted apart: an image of n tokens takes n cells of the KV cache but
advances the position only by the longer side of its token grid. Several conversations can be held
side by side (llamacpp_lanes.py).
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError, GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.runtime import llamacpp_fit as fit
from medmo_edge.runtime import llamacpp_native as native
from medmo_edge.runtime import llamacpp_vision as vision
from medmo_edge.runtime.backends import Interrupted, Mark
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.gguf_header import (
    LANGUAGE_KEYS,
    VISION_KEYS,
    VISION_TENSORS,
    check_header,
)
from medmo_edge.runtime.llamacpp_context import BATCH, Conversations
from medmo_edge.runtime.llamacpp_lanes import logits_of, runs
from medmo_edge.runtime.spans import grid_span, text_span

NAME = "llamacpp"
_MAX_IMAGE_TOKENS = 1 << 20
_ABORTED = 2  # llama_decode
_ONE_TOKEN = text_span(1)


def unavailable() -> str | None:
    """Why llama.cpp cannot be used on this machine, else None."""
    return native.obstacle()


def unsuited(manifest: Manifest, device: Device) -> str | None:
    """Why this artifact does not fit this machine, else None."""
    return fit.memory_obstacle(manifest, device)


def place(manifest: Manifest, device: Device) -> tuple[str, str]:
    """It runs on the CPU, also beside a GPU."""
    return "cpu", "llama.cpp is used without GPUs" if device.cuda else ""


def describe() -> dict[str, Any]:
    """Version of the library, for doctor."""
    return {native.DISTRIBUTION: native.version()}


def open(
    manifest: Manifest,
    device: Device,
    *,
    threads: int | None = None,
    max_context: int | None = None,
) -> "LlamaCpp":
    """Load an artifact.

    ``threads``: default the physical cores, or one for a small model. ``max_context``: most tokens
    of one conversation, default what memory allows up to 32768. Errors: ArtifactError when
    llama.cpp refuses a file, BackendUnavailable when the library is missing or memory does not
    suffice.
    """
    return LlamaCpp(manifest, device, threads or fit.default_threads(manifest, device), max_context)


class LlamaCpp(Conversations):
    """One loaded GGUF pair; see ``Backend`` and ``Lanes`` for the methods."""

    name = NAME

    def __init__(
        self, manifest: Manifest, device: Device, threads: int, max_context: int | None
    ) -> None:
        super().__init__(manifest, device, threads, max_context)
        self._sight = native.Interrupt(self._library)  # of the vision tower, maybe in a thread
        self._free = weakref.finalize(self, self._handles.free)
        self.manifest = manifest
        self._preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        self.rows = 1
        self.device = f"cpu ({device.cpu}, {threads} thread{'s' if threads > 1 else ''})"
        try:
            self._load(device)
        except BaseException:
            self.close()
            raise

    def _load(self, device: Device) -> None:
        language, tower = (self.manifest.path_of(role) for role in ("language", "vision"))
        check_header(language, LANGUAGE_KEYS)
        check_header(tower, VISION_KEYS, VISION_TENSORS)
        mmap = fit.should_map(self.manifest, device)
        with self._work():
            self._handles.model = native.open_model(
                self._library, language, mmap=mmap, interrupt=self._interrupt
            )
        model = self._loaded(self._handles.model, language)
        self._check_language(model, language)
        with self._work():
            self._handles.vision = native.open_vision(
                self._library,
                tower,
                model,
                threads=self._threads,
                max_tokens=_MAX_IMAGE_TOKENS,
                interrupt=self._sight,
            )
        self._loaded(self._handles.vision, tower)
        self._open_context(1, min(fit.FIRST_CELLS, self.max_cells))

    def _loaded(self, handle: int | None, path: Path) -> int:
        if handle is None:
            raise ArtifactError(
                f"{path} is refused by llama.cpp: export again{self._library.messages.last()}"
            )
        return handle

    def _check_language(self, model: int, path: Path) -> None:
        llama, facts = self._library.llama, self._facts
        found = {
            "vocabulary": llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)),
            "hidden size": llama.llama_model_n_embd(model),
            "image embedding size": llama.llama_model_n_embd_inp(model),
        }
        levels = 1 + facts.deepstack_levels  # a row holds the main embedding and one per level
        stated = (facts.vocab_size, facts.hidden_size, facts.hidden_size * levels)
        for (what, value), expected in zip(found.items(), stated, strict=True):
            if value != expected:
                raise ArtifactError(
                    f"{path} has {what} {value}, the manifest says {expected}: export again"
                )

    def set_interrupt(self, hook: Callable[[], bool] | None) -> None:
        """See ``Backend``."""
        self._interrupt.hook = hook

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        """See ``Backend``."""
        self.reserve(text_span(len(ids)))
        start = self._end
        for first in range(0, len(ids), BATCH):
            self._decode_batch(np.array(ids[first : first + BATCH], dtype=np.int32), start)
        return logits_of(self._library, self._context(), -1, self._facts.vocab_size)

    def _decode_batch(self, ids: NDArray[np.int32], start: Mark) -> None:
        positions = np.arange(len(ids), dtype=np.int32) + np.int32(self._end.position)
        batch = native.token_batch(self._library, ids, positions)
        self._sequences.one(batch, self._lane)
        with self._work() if len(ids) > 1 else nullcontext():
            # A single token is soon done: asking for interrupts at every node costs more.
            code = self._library.llama.llama_decode(self._context(), batch)
        self._check(code, start, "text")
        self._end = Mark(self._end.cells + len(ids), self._end.position + len(ids))

    def decode_lanes(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """See ``Lanes``."""
        for lane in tokens:
            self.select(lane)
            self.reserve(_ONE_TOKEN)
        before, found = list(self._ends), dict[int, NDArray[np.float32]]()
        try:
            for run in runs(sorted(tokens), self.rows, self._fillers(tokens)):
                found |= self._decode_run(run, tokens)
        except BaseException:
            for lane in tokens:
                self.select(lane)
                self.rewind(before[lane])
            raise
        return found

    def _fillers(self, tokens: Mapping[int, int]) -> set[int]:
        """Lanes that could take a token beside ``tokens``, and lose it again."""
        room, last = self._capacity, self._facts.max_positions
        return {
            lane
            for lane, end in enumerate(self._ends)
            if lane not in tokens and end.cells < room and end.position < last
        }

    def _decode_run(self, run: range, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """One token for each of several consecutive lanes; any for those that only fill a gap."""
        positions = np.array([self._ends[lane].position for lane in run], np.int32)
        ids = np.array([tokens.get(lane, 0) for lane in run], np.int32)
        batch = native.token_batch(self._library, ids, positions)
        self._sequences.each(batch, run.start)
        self._library.messages.clear()
        code = self._library.llama.llama_decode(self._context(), batch)
        for lane in run:
            if lane not in tokens:
                self.select(lane)
                self.rewind(self._end)
        if code != 0:
            raise self._failure(f"tokens of {len(run)} answers", code)
        found = {}
        for row, lane in enumerate(run):
            if lane in tokens:
                end = self._ends[lane]
                self._ends[lane] = Mark(end.cells + 1, end.position + 1)
                found[lane] = logits_of(self._library, self._context(), row, self._facts.vocab_size)
        return found

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        """See ``Backend``."""
        height, width = self._token_grid(resized_HWC)
        self.reserve(grid_span(height, width))  # before the tower works in vain
        self.append_rows(self.encode_image(resized_HWC), height, width)

    def append_encoded(self, resized_HWC: NDArray[np.uint8], rows_NR: NDArray[np.float32]) -> None:
        """See ``Lanes``."""
        self.append_rows(rows_NR, *self._token_grid(resized_HWC))

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See ``Backend``."""
        return self.encode_aside(resized_HWC, self._interrupt.hook)

    def encode_aside(
        self, resized_HWC: NDArray[np.uint8], stop: Callable[[], bool] | None
    ) -> NDArray[np.float32]:
        """See ``Lanes``."""
        height, width = self._token_grid(resized_HWC)
        tower = self._require(self._handles.vision)
        self._sight.hook = stop
        with vision.image_chunk(self._library, tower, resized_HWC, height * width) as chunk:
            with self._sight.native_work():
                code = self._library.mtmd.mtmd_encode_chunk(tower, chunk)
                stopped = self._sight.wanted()  # a stopped graph still reports success
        if stopped:
            raise Interrupted
        if code != 0:
            raise self._failure("image", code)
        row = self._facts.hidden_size * (1 + self._facts.deepstack_levels)
        return vision.output_rows(self._library, tower, (height * width, row))

    def append_rows(self, rows_NR: NDArray[np.float32], height: int, width: int) -> None:
        """Append an image of ``height`` x ``width`` tokens as rows from an ``encode_image``.

        The rows may come from another backend of the same checkpoint. Errors: as ``append_image``.
        """
        span = grid_span(height, width)
        end, start = self.reserve(span), self._end
        positions = vision.image_positions(span, start.position)
        for first in range(0, span.cells, BATCH):
            rows = np.ascontiguousarray(rows_NR[first : first + BATCH], np.float32)
            places = np.ascontiguousarray(positions[:, first : first + BATCH])
            silent = np.zeros(len(rows), np.int8)
            batch = vision.row_batch(self._library, rows, places, silent)
            self._sequences.one(batch, self._lane)
            with self._work():
                code = self._library.llama.llama_decode(self._context(), batch)
            self._check(code, start, "image")
        self._end = end

    def _token_grid(self, resized_HWC: NDArray[np.uint8]) -> tuple[int, int]:
        factor = self._preprocessing.factor
        return resized_HWC.shape[0] // factor, resized_HWC.shape[1] // factor

    def _check(self, code: int, start: Mark, what: str) -> None:
        """Turn a native result into our errors, with the state rolled back to ``start``."""
        if code == 0:
            return
        self.rewind(start)
        if code == _ABORTED:
            raise Interrupted
        raise self._failure(what, code)

    def _failure(self, what: str, code: int) -> GenerationError:
        return GenerationError(
            f"llama.cpp could not evaluate the {what} (code {code}){self._library.messages.last()}"
        )

    def close(self) -> None:
        """See ``Backend``."""
        self._free()
