"""How many lanes can be evaluated together without changing a bit of any answer; measured.

Kernels for one row and for several may add up in different orders, and which kernel serves how many
rows depends on the number format, the processor and how the library was compiled. So it is tried,
on the machine and the weights at hand. Nothing is assumed from names.
"""

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.backends import START, Lanes

_PROMPT_TOKENS = 4


def exact_rows(lanes: Lanes, most: int, vocabulary: int) -> int:
    """The largest number of rows, up to ``most``, up to which all logits equal those of one row.

    Whatever the lanes hold is lost. Errors: as the backend's.
    """
    _clear(lanes)
    random = np.random.default_rng(0)
    prompts = random.integers(0, vocabulary, (most, _PROMPT_TOKENS)).tolist()
    # One token each: what kernels do with it they do with the next, and on 4B each takes a while.
    said = random.integers(0, vocabulary, most).tolist()
    try:
        lanes.hold(most)
        alone = [_alone(lanes, lane, prompts[lane], said[lane]) for lane in range(most)]
        for rows in range(2, most + 1):
            lanes.rows = rows
            if not _agrees(lanes, rows, said, alone):
                return rows - 1
        return most
    finally:
        lanes.rows = 1
        _clear(lanes)
        lanes.hold(1)


def _clear(lanes: Lanes) -> None:
    for lane in range(lanes.lanes - 1, -1, -1):
        lanes.select(lane)
        lanes.rewind(START)


def _alone(lanes: Lanes, lane: int, prompt: list[int], token: int) -> NDArray[np.float32]:
    """Logits [V] after ``token``; the lane then holds the prompt."""
    lanes.select(lane)
    lanes.decode_tokens(prompt)
    end = lanes.mark()
    found = lanes.decode_tokens([token])
    lanes.rewind(end)
    return found


def _agrees(lanes: Lanes, rows: int, said: list[int], alone: list[NDArray[np.float32]]) -> bool:
    """Whether ``rows`` lanes together give the logits of each alone; they end as they were."""
    ends = []
    for lane in range(rows):
        lanes.select(lane)
        ends.append(lanes.mark())
    found = lanes.decode_lanes({lane: said[lane] for lane in range(rows)})
    for lane in range(rows):
        lanes.select(lane)
        lanes.rewind(ends[lane])
    return all(np.array_equal(found[lane], alone[lane]) for lane in found)
