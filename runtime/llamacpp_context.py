"""The context of the llama.cpp backend: conversations in lanes, their KV cache and its growth.

It starts with one lane and little room and is made anew, with what it holds, when more of either
is needed. Nothing is evaluated here.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import BackendUnavailable, GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime import llamacpp_fit as fit
from medmo_edge.runtime import llamacpp_native as native
from medmo_edge.runtime.backends import START, Mark
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.llamacpp_lanes import SequenceIds, into_lane, lane_cells, out_of_lane
from medmo_edge.runtime.spans import Span, end_behind

BATCH = 512  # tokens evaluated at once; more costs memory without being faster on CPUs


class Conversations:
    """What the lanes hold; the base of the backend, which adds the weights and evaluates."""

    def __init__(
        self, manifest: Manifest, device: Device, threads: int, max_context: int | None
    ) -> None:
        self._library = native.load_library()
        self._interrupt = native.Interrupt(self._library)
        self._handles = native.Handles(self._library)
        self._facts = fit.Facts.of(manifest)
        self._threads = threads
        self._ends = [START]  # of every lane
        self._lane = 0
        self._capacity = 0  # cells of every lane
        self.max_cells = fit.max_cells(manifest, device, max_context)
        self._all_cells = max(self.max_cells, fit.affordable_cells(manifest, device))

    def _open_context(self, lanes: int, cells: int) -> None:
        model = self._require(self._handles.model)
        with self._work():
            self._handles.context = native.open_context(
                self._library,
                model,
                cells=lanes * cells,
                lanes=lanes,
                batch=BATCH,
                threads=self._threads,
            )
        if self._handles.context is None:
            raise BackendUnavailable(
                f"llama.cpp cannot hold a context of {lanes * cells} tokens in memory"
                f"{self._library.messages.last()}"
            )
        self._capacity = cells
        self._ends, self._lane = [START] * lanes, 0
        self._sequences = SequenceIds(lanes, BATCH)

    def mark(self) -> Mark:
        """See ``Backend``."""
        return self._end

    @property
    def lanes(self) -> int:
        """See ``Lanes``."""
        return len(self._ends)

    @property
    def _end(self) -> Mark:
        return self._ends[self._lane]

    @_end.setter
    def _end(self, mark: Mark) -> None:
        self._ends[self._lane] = mark

    def select(self, lane: int) -> None:
        """See ``Lanes``."""
        if not 0 <= lane < len(self._ends):
            raise ValueError(f"no lane {lane} of {len(self._ends)}")
        self._lane = lane

    def rewind(self, mark: Mark) -> None:
        """See ``Backend``."""
        memory = self._library.llama.llama_get_memory(self._context())
        if mark == START and len(self._ends) == 1:
            self._library.llama.llama_memory_clear(memory, False)
        else:
            self._library.llama.llama_memory_seq_rm(memory, self._lane, mark.position, -1)
        self._end = mark

    def reserve(self, span: Span) -> Mark:
        """Make room for ``span``, by a larger context if needed; returns the end behind it.

        Errors: GenerationError when there is none.
        """
        end = end_behind(
            self._end, span, max_cells=self.max_cells, max_positions=self._facts.max_positions
        )
        if end.cells > self._capacity:
            self._grow(end.cells)
        return end

    def _grow(self, needed: int) -> None:
        cells = self._cells(len(self._ends), needed, self._capacity)
        if cells is None:
            raise GenerationError(f"{needed} tokens do not fit beside the other answers")
        self._reopen(len(self._ends), cells)

    def _cells(self, lanes: int, needed: int, first: int) -> int | None:
        total = self.max_cells if lanes == 1 else self._all_cells
        return lane_cells(lanes, needed, first, total)

    def fits(self, lanes: int, cells: int) -> bool:
        """See ``Lanes``."""
        return self._cells(lanes, cells, fit.FIRST_CELLS) is not None

    def hold(self, lanes: int) -> None:
        """See ``Lanes``."""
        if lanes == len(self._ends):
            return
        held = max(end.cells for end in self._ends[:lanes])
        cells = self._cells(lanes, held, fit.FIRST_CELLS)
        if cells is None:
            raise GenerationError(f"{lanes} answers at once do not fit into memory")
        self._reopen(lanes, cells)

    def _reopen(self, lanes: int, cells: int) -> None:
        """A new context for what the first ``lanes`` lanes hold.

        Errors: GenerationError when memory does not suffice; then all is as it was, but for what
        was in lanes that should go.
        """
        selected, ends, states = self._lane, self._ends[:lanes], []
        for lane in range(len(ends)):
            self.select(lane)
            states.append(self.save())
        before = len(self._ends), self._capacity
        self._handles.free_context()
        try:
            self._open_context(lanes, cells)
        except BackendUnavailable as error:
            self._open_context(*before)
            raise GenerationError(f"{error}: use smaller or fewer images") from error
        finally:
            for lane, (state, end) in enumerate(zip(states, ends, strict=True)):
                self.select(lane)
                self.restore(state, end)
            self.select(min(selected, len(self._ends) - 1))

    def save(self) -> NDArray[np.uint8]:
        """See ``Backend``."""
        llama, context = self._library.llama, self._context()
        state = np.empty(llama.llama_state_seq_get_size(context, self._lane), dtype=np.uint8)
        written = llama.llama_state_seq_get_data(context, _pointer(state), state.size, self._lane)
        return out_of_lane(state[:written], self._lane, len(self._ends))

    def restore(self, state: NDArray[np.uint8], mark: Mark) -> None:
        """See ``Backend``."""
        self.rewind(START)
        if mark == START:
            return
        if mark.cells > self._capacity:
            self._grow(mark.cells)
        llama, context = self._library.llama, self._context()
        data = into_lane(state, self._lane, len(self._ends))
        if not llama.llama_state_seq_set_data(context, _pointer(data), data.size, self._lane):
            self.rewind(START)
            raise GenerationError(
                f"a kept study could not be restored{self._library.messages.last()}"
            )
        self._end = mark

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
