"""Several conversations in one llama.cpp context: how large, and which token belongs to which.

Every lane is a sequence with a KV cache of its own (``kv_unified`` is off). Its cells lie as if it
were alone, so attention adds up in the same order whoever else is there; in a shared cache it would
not, and answers would change with their company. The price is that a common prefix is copied from
lane to lane, and that only lanes with consecutive numbers are evaluated in one graph.
"""

import ctypes
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError

_STEP = 256  # llama.cpp rounds the cells of a lane up to this

_Ids = ctypes.POINTER(ctypes.c_int32)


def lane_cells(lanes: int, needed: int, first: int, total: int) -> int | None:
    """Cells of each lane when ``needed`` must fit: ``first``, doubled as often as it takes.

    All lanes together have at most ``total``; None when that is not enough.
    """
    cells = first
    while cells < needed:
        cells *= 2
    cells = min(cells, total if lanes == 1 else total // lanes // _STEP * _STEP)
    return cells if cells >= max(1, needed) else None


def runs(lanes: Sequence[int], most: int, fillers: Collection[int] = ()) -> list[range]:
    """Ascending ``lanes`` as ranges of at most ``most``; a single one missing may be filled.

    A lane of ``fillers`` between two others costs one row more, but a run of its own for the rest
    would read all weights again.
    """
    found: list[range] = []
    for lane in lanes:
        last = found[-1] if found else range(-3, -2)
        joined = lane == last.stop or (lane == last.stop + 1 and last.stop in fillers)
        if joined and lane - last.start < most:
            found[-1] = range(last.start, lane + 1)
        else:
            found.append(range(lane, lane + 1))
    return found


# A state is: magic, sequence, number of lanes, and for every lane its number of cells and, unless
# that is 0, the cells; uint32 each. It can be read back only where there are as many lanes.
_HEAD = 2
_WORD = 4


def out_of_lane(state: NDArray[np.uint8], lane: int, lanes: int) -> NDArray[np.uint8]:
    """A state of ``lane`` of ``lanes`` as that of the only lane; overwrites ``state``.

    Errors: GenerationError when this llama.cpp writes another form.
    """
    if lanes == 1:
        return state
    start, end = lane * _WORD, state.size - (lanes - 1 - lane) * _WORD
    words = state[: (_HEAD + 1 + lane) * _WORD].view(np.uint32)
    if words[_HEAD] != lanes or words[_HEAD + 1 :].any() or state[end:].any():
        raise GenerationError("this llama.cpp saves lanes in a form that is not known here")
    head = np.array([*words[:_HEAD], 1], np.uint32).view(np.uint8)
    state[start : start + head.size] = head
    return state[start:end]


def into_lane(state: NDArray[np.uint8], lane: int, lanes: int) -> NDArray[np.uint8]:
    """The reverse of ``out_of_lane``; a copy unless there is one lane only."""
    if lanes == 1:
        return state
    size = _HEAD * _WORD
    words = [np.array([lanes, *[0] * lane], np.uint32), np.zeros(lanes - 1 - lane, np.uint32)]
    before, after = (each.view(np.uint8) for each in words)
    return np.concatenate([state[:size], before, state[size + _WORD :], after])


class SequenceIds:
    """The arrays that tell llama.cpp a token's sequence; they outlive the batches that use them."""

    def __init__(self, lanes: int, batch: int) -> None:
        """For sequences 0 to ``lanes - 1`` and batches of at most ``batch`` tokens."""
        self._ids = np.arange(lanes, dtype=np.int32)
        self._ones = np.ones(max(lanes, batch), np.int32)
        self._wanted = np.ones(lanes, np.int8)
        self._batch = batch
        self._each = (_Ids * lanes)(*map(self._pointer, range(lanes)))
        self._same: dict[int, Any] = {}

    def one(self, batch: Any, lane: int) -> None:
        """All tokens of ``batch`` belong to ``lane``."""
        if lane not in self._same:
            self._same[lane] = (_Ids * self._batch)(*[self._pointer(lane)] * self._batch)
        self._fill(batch, self._same[lane])

    def each(self, batch: Any, first: int) -> None:
        """The tokens of ``batch`` belong to ``first`` and the lanes after it; logits of all."""
        self._fill(batch, ctypes.byref(self._each, first * ctypes.sizeof(_Ids)))
        batch.logits = self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def _fill(self, batch: Any, ids: Any) -> None:
        batch.n_seq_id = self._ones.ctypes.data_as(_Ids)
        batch.seq_id = ctypes.cast(ids, ctypes.POINTER(_Ids))

    def _pointer(self, lane: int) -> Any:
        return ctypes.cast(self._ids.ctypes.data + lane * self._ids.itemsize, _Ids)


def logits_of(library: Any, context: int, row: int, vocabulary: int) -> NDArray[np.float32]:
    """A copy of the logits [V] of token ``row`` of the last batch; -1: of its last token."""
    pointer = library.llama.llama_get_logits_ith(context, row)
    # np.ctypeslib.as_array does the same, several times slower; this is done for every token.
    found: Any = (ctypes.c_float * vocabulary).from_address(ctypes.addressof(pointer.contents))
    copy: NDArray[np.float32] = np.frombuffer(found, np.float32).copy()
    return copy
