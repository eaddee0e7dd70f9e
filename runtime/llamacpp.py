"""The llama.cpp backend: GGUF artifacts on the CPU.

Text tokens and pixels come ready made, so llama.cpp neither tokenises nor resizes here: it would
letterbox pictures, round sizes otherwise and limit their tokens, and boxes would shift. GPUs are
not used, even by a library built for them.

Cells and positions are counted apart: an image of n tokens takes n cells of the KV cache but
advances the position only by the longer side of its token grid.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError, BackendUnavailable, GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.runtime import llamacpp_fit as fit
from medmo_edge.runtime import llamacpp_native as native
from medmo_edge.runtime import llamacpp_vision as vision
from medmo_edge.runtime.backends import START, Interrupted, Mark
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.gguf_header import (
    LANGUAGE_KEYS,
    VISION_KEYS,
    VISION_TENSORS,
    check_header,
)

NAME = "llamacpp"
_BATCH = 512  # tokens evaluated at once; more costs memory without being faster on CPUs
_MAX_IMAGE_TOKENS = 1 << 20
_SEQUENCE = 0
_ABORTED = 2  # llama_decode


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


class LlamaCpp:
    """One loaded GGUF pair; see ``Backend`` for the methods."""

    name = NAME

    def __init__(
        self, manifest: Manifest, device: Device, threads: int, max_context: int | None
    ) -> None:
        self._library = native.load_library()
        self._interrupt = native.Interrupt(self._library)
        self._handles = native.Handles(self._library)
        self._free = weakref.finalize(self, self._handles.free)
        self.manifest = manifest
        self._facts = fit.Facts.of(manifest)
        self._threads = threads
        self._preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        self._end = START
        self._capacity = 0
        self.device = f"cpu ({device.cpu}, {threads} thread{'s' if threads > 1 else ''})"
        self.max_cells = fit.max_cells(manifest, device, max_context)
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
                interrupt=self._interrupt,
            )
        self._loaded(self._handles.vision, tower)
        self._open_context(min(fit.FIRST_CELLS, self.max_cells))

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

    def _open_context(self, cells: int) -> None:
        model = self._require(self._handles.model)
        with self._work():
            self._handles.context = native.open_context(
                self._library,
                model,
                cells=cells,
                batch=_BATCH,
                threads=self._threads,
            )
        if self._handles.context is None:
            raise BackendUnavailable(
                f"llama.cpp cannot hold a context of {cells} tokens in memory"
                f"{self._library.messages.last()}"
            )
        self._capacity = cells

    def set_interrupt(self, hook: Callable[[], bool] | None) -> None:
        """See ``Backend``."""
        self._interrupt.hook = hook

    def mark(self) -> Mark:
        """See ``Backend``."""
        return self._end

    def rewind(self, mark: Mark) -> None:
        """See ``Backend``."""
        memory = self._library.llama.llama_get_memory(self._context())
        if mark == START:
            self._library.llama.llama_memory_clear(memory, False)
        else:
            self._library.llama.llama_memory_seq_rm(memory, _SEQUENCE, mark.position, -1)
        self._end = mark

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        """See ``Backend``."""
        if not ids:
            raise ValueError("decode_tokens needs at least one token")
        self.reserve(len(ids), len(ids))
        start = self._end
        for first in range(0, len(ids), _BATCH):
            self._decode_batch(np.array(ids[first : first + _BATCH], dtype=np.int32), start)
        logits = self._library.llama.llama_get_logits_ith(self._context(), -1)
        shape = (self._facts.vocab_size,)
        copy: NDArray[np.float32] = np.ctypeslib.as_array(logits, shape).copy()
        return copy

    def _decode_batch(self, ids: NDArray[np.int32], start: Mark) -> None:
        positions = np.arange(len(ids), dtype=np.int32) + np.int32(self._end.position)
        batch = native.token_batch(self._library, ids, positions)
        with self._work() if len(ids) > 1 else nullcontext():
            # A single token is soon done: asking for interrupts at every node costs more.
            code = self._library.llama.llama_decode(self._context(), batch)
        self._check(code, start, "text")
        self._end = Mark(self._end.cells + len(ids), self._end.position + len(ids))

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        """See ``Backend``."""
        height, width = self._token_grid(resized_HWC)
        self.reserve(height * width, max(height, width))
        self.append_rows(self.encode_image(resized_HWC), height, width)

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See ``Backend``."""
        height, width = self._token_grid(resized_HWC)
        tower = self._require(self._handles.vision)
        with vision.image_chunk(self._library, tower, resized_HWC, height * width) as chunk:
            with self._work():
                code = self._library.mtmd.mtmd_encode_chunk(tower, chunk)
                stopped = self._interrupt.wanted()  # a stopped graph still reports success
        self._check(_ABORTED if stopped else code, self._end, "image")
        row = self._facts.hidden_size * (1 + self._facts.deepstack_levels)
        return vision.output_rows(self._library, tower, (height * width, row))

    def append_rows(self, rows_NR: NDArray[np.float32], height: int, width: int) -> None:
        """Append an image of ``height`` x ``width`` tokens as rows from an ``encode_image``.

        The rows may come from another backend of the same checkpoint. Errors: as ``append_image``.
        """
        self.reserve(height * width, max(height, width))
        start = self._end
        positions = vision.image_positions(height, width, start.position)
        for first in range(0, height * width, _BATCH):
            rows = np.ascontiguousarray(rows_NR[first : first + _BATCH], np.float32)
            places = np.ascontiguousarray(positions[:, first : first + _BATCH])
            silent = np.zeros(len(rows), np.int8)
            batch = vision.row_batch(self._library, rows, places, silent)
            with self._work():
                code = self._library.llama.llama_decode(self._context(), batch)
            self._check(code, start, "image")
        self._end = Mark(start.cells + height * width, start.position + max(height, width))

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
        raise GenerationError(
            f"llama.cpp could not evaluate the {what} (code {code}){self._library.messages.last()}"
        )

    def reserve(self, cells: int, positions: int) -> None:
        """Make room, by a larger context if needed. Errors: GenerationError when there is none."""
        needed = self._end.cells + cells
        if needed > self.max_cells:
            raise GenerationError(
                f"{needed} tokens do not fit the context of {self.max_cells}: use smaller or "
                "fewer images, or a shorter question"
            )
        if self._end.position + positions > self._facts.max_positions:
            raise GenerationError(
                f"the conversation is longer than the model's {self._facts.max_positions} positions"
            )
        if needed > self._capacity:
            self._grow(needed)

    def _grow(self, needed: int) -> None:
        cells = self._capacity
        while cells < needed:
            cells *= 2
        end, state, before = self._end, self.save(), self._capacity
        self._handles.free_context()
        try:
            self._open_context(min(cells, self.max_cells))
        except BackendUnavailable as error:
            self._open_context(before)
            raise GenerationError(f"{error}: use smaller or fewer images") from error
        finally:
            self.restore(state, end)

    def save(self) -> NDArray[np.uint8]:
        """See ``Backend``."""
        llama, context = self._library.llama, self._context()
        state = np.empty(llama.llama_state_seq_get_size(context, _SEQUENCE), dtype=np.uint8)
        written = llama.llama_state_seq_get_data(context, _pointer(state), state.size, _SEQUENCE)
        return state[:written]

    def restore(self, state: NDArray[np.uint8], mark: Mark) -> None:
        """See ``Backend``."""
        self.rewind(START)
        if mark == START:
            return
        if mark.cells > self._capacity:
            self._grow(mark.cells)
        llama, context = self._library.llama, self._context()
        if not llama.llama_state_seq_set_data(context, _pointer(state), state.size, _SEQUENCE):
            self.rewind(START)
            raise GenerationError(
                f"a kept study could not be restored{self._library.messages.last()}"
            )
        self._end = mark

    def close(self) -> None:
        """See ``Backend``."""
        self._free()

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Native work that ``set_interrupt`` and signals can stop."""
        self._library.messages.clear()
        context = self._handles.context
        with self._interrupt.native_work(), self._interrupt.of_text(self._library, context):
            yield

    def _context(self) -> int:
        return self._require(self._handles.context)

    def _require(self, handle: int | None) -> int:
        if handle is None:
            raise GenerationError("the backend is closed: load the artifact again")
        return handle


def _pointer(state: NDArray[np.uint8]) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
