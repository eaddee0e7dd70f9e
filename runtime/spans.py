"""Where the next text or picture of a conversation goes, and whether there is room for it.

Cells and positions are counted apart: an image of n tokens takes n cells of the KV cache but
advances the position only by the longer side of its token grid. Nothing is evaluated or kept here.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError
from medmo_edge.preprocess import mrope_positions
from medmo_edge.runtime.backends import Mark

_ADVICE = "use smaller or fewer images, or a shorter question"


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The places of some text or of one picture: one cell per token, and rope positions.

    ``offsets`` [3, S] (time, row, column) count from where the span begins; the next one begins
    ``advance`` positions later.
    """

    offsets: NDArray[np.int64]
    advance: int

    @property
    def cells(self) -> int:
        """Cells of the KV cache, S."""
        return len(self.offsets[0])


def text_span(length: int) -> Span:
    """The places of ``length`` tokens of text. Errors: ValueError for none."""
    if not length:
        raise ValueError("decode_tokens needs at least one token")
    return Span(np.arange(length, dtype=np.int64)[None].repeat(3, axis=0), length)


def image_span(resized_HWC: NDArray[np.uint8], factor: int) -> Span:
    """The places of a picture's vision tokens, each of ``factor`` x ``factor`` pixels."""
    height, width = (side // factor for side in resized_HWC.shape[:2])
    return grid_span(height, width)


def grid_span(height: int, width: int) -> Span:
    """The places of ``height`` x ``width`` vision tokens of one picture."""
    offsets, _ = mrope_positions(
        [0] * (height * width), [(1, height, width)], image_token_id=0, merge_size=1
    )
    return Span(offsets, max(height, width))


def end_behind(
    start: Mark, span: Span, *, max_cells: int, max_positions: int, advice: str = _ADVICE
) -> Mark:
    """The end of a conversation with ``span`` behind ``start``.

    Errors: GenerationError, with ``advice``, when there is no room for it.
    """
    end = Mark(start.cells + span.cells, start.position + span.advance)
    if end.cells > max_cells:
        raise GenerationError(f"{end.cells} tokens do not fit the context of {max_cells}: {advice}")
    if end.position > max_positions:
        raise GenerationError(
            f"the conversation is longer than the model's {max_positions} positions"
        )
    return end
