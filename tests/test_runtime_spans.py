"""Places of text and pictures in a conversation, against positions written out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.errors import GenerationError
from medmo_edge.runtime.backends import START, Mark
from medmo_edge.runtime.spans import Span, end_behind, image_span, text_span


def test_text_advances_all_axes_together() -> None:
    span = text_span(3)
    assert span.offsets.tolist() == [[0, 1, 2]] * 3
    assert (span.cells, span.advance) == (3, 3)


def test_a_picture_takes_a_cell_per_token_and_its_longer_side_of_positions() -> None:
    span = image_span(np.zeros((64, 96, 3), np.uint8), 32)
    time, row, column = span.offsets.tolist()
    assert time == [0, 0, 0, 0, 0, 0]
    assert row == [0, 0, 0, 1, 1, 1]
    assert column == [0, 1, 2, 0, 1, 2]
    assert (span.cells, span.advance) == (6, 3)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([28, 32]))
def test_what_follows_a_picture_lies_behind_all_of_it(height: int, width: int, factor: int) -> None:
    span = image_span(np.broadcast_to(np.uint8(0), (height * factor, width * factor, 3)), factor)
    assert span.cells == height * width
    assert span.offsets.max() == span.advance - 1  # no gap and no overlap


@pytest.mark.parametrize(
    ("span", "last"),
    [(text_span(5), Mark(15, 9)), (image_span(np.zeros((160, 64, 3), np.uint8), 32), Mark(10, 9))],
)
def test_what_just_fits_fits_and_one_more_does_not(span: Span, last: Mark) -> None:
    cells, positions = last.cells + span.cells, last.position + span.advance
    end = end_behind(last, span, max_cells=cells, max_positions=positions)
    assert (end.cells, end.position) == (cells, positions)
    with pytest.raises(GenerationError, match=rf"^{cells} tokens do not .* {cells - 1}: shorter$"):
        end_behind(last, span, max_cells=cells - 1, max_positions=positions, advice="shorter")
    with pytest.raises(GenerationError, match=rf"the model's {positions - 1} positions"):
        end_behind(last, span, max_cells=cells, max_positions=positions - 1)


def test_no_text_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        text_span(0)
    assert end_behind(START, text_span(1), max_cells=1, max_positions=1) == Mark(1, 1)
