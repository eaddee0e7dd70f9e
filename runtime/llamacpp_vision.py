"""Pictures in llama.cpp: pixels to embeddings through mtmd, embeddings to a batch of the decoder.

A row of embeddings holds the main one, then one per deepstack level. The two steps are apart so
that another vision tower can feed the same decoder. mtmd gets pictures that are already resized,
and its result is refused when it resized them again.

Shape suffixes: H W pixels, C channels, N vision tokens, R values of one row.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError
from medmo_edge.runtime.llamacpp_native import Library
from medmo_edge.runtime.spans import Span

_IMAGE_CHUNK = 1  # MTMD_INPUT_CHUNK_TYPE_IMAGE
_SECTIONS = 4  # rope positions of one embedding: time, row, column and one that Qwen leaves zero


@contextmanager
def image_chunk(
    library: Library, vision: int, pixels_HWC: NDArray[np.uint8], num_tokens: int
) -> Iterator[Any]:
    """mtmd's form of the pixels; of the pieces it makes, only the image itself is wanted.

    Errors: GenerationError when it would not give exactly ``num_tokens`` tokens.
    """
    mtmd = library.mtmd
    chunks = mtmd.mtmd_input_chunks_init()
    try:
        code = _tokenize(library, vision, pixels_HWC, chunks)
        pieces = [
            mtmd.mtmd_input_chunks_get(chunks, index)
            for index in range(mtmd.mtmd_input_chunks_size(chunks))
        ]
        images = [p for p in pieces if mtmd.mtmd_input_chunk_get_type(p) == _IMAGE_CHUNK]
        sizes = [mtmd.mtmd_input_chunk_get_n_tokens(image) for image in images]
        if code != 0 or sizes != [num_tokens]:
            height, width = pixels_HWC.shape[:2]
            raise GenerationError(
                f"llama.cpp made {sizes} tokens of an image of {width} x {height} pixels, not "
                f"{num_tokens}: it resized it again{library.messages.last()}"
            )
        yield images[0]
    finally:
        mtmd.mtmd_input_chunks_free(chunks)


def _tokenize(library: Library, vision: int, pixels_HWC: NDArray[np.uint8], chunks: Any) -> int:
    mtmd = library.mtmd
    height, width = pixels_HWC.shape[:2]
    pixels = np.ascontiguousarray(pixels_HWC)
    data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd.mtmd_bitmap_init(width, height, data)
    marker = mtmd.mtmd_default_marker()
    text = mtmd.mtmd_input_text(marker, len(marker), False, True)
    try:
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code: int = mtmd.mtmd_tokenize(vision, chunks, ctypes.byref(text), bitmaps, 1)
    finally:
        mtmd.mtmd_bitmap_free(bitmap)
    return code


def output_rows(library: Library, vision: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A copy [N, R] of what the vision tower computed last; it has one buffer for all images."""
    pointer = library.mtmd.mtmd_get_output_embd(vision)
    rows_NR: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape).copy()
    return rows_NR


def image_positions(span: Span, start: int) -> NDArray[np.int32]:
    """Rope positions [4, N] of an image that takes ``span`` from position ``start`` on."""
    sections = np.zeros((_SECTIONS, span.cells), np.int32)
    sections[: len(span.offsets)] = span.offsets + start
    return sections


def row_batch(library: Library, rows_NR: Any, positions: Any, silent: Any) -> Any:
    """A llama_batch over float32 rows [N, R], int32 positions [4, N] and int8 zeros [N].

    All three must be contiguous and stay alive; zeros ask for no logits.
    """
    batch = library.llama.llama_batch()
    batch.n_tokens = len(rows_NR)
    batch.embd = rows_NR.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    batch.logits = silent.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    return batch
