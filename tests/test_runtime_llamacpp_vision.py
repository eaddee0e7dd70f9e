"""Pictures in llama.cpp: embeddings against transformers, and embeddings fed from outside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.images import Frame
from medmo_edge.runtime import llamacpp_vision
from medmo_edge.runtime.backends import START
from medmo_edge.runtime.chat import Picture
from medmo_edge.runtime.llamacpp import LlamaCpp
from medmo_edge.runtime.session import Session, load
from medmo_edge.runtime.spans import grid_span

LAYOUTS = [(224, 224), (448, 96), (130, 700)]


def _picture(session: Session, width: int, height: int) -> Picture:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return session._chat.picture(Frame.from_pixels(pixels))


def _reference(checkpoint: Path, picture: Picture) -> Any:
    """Rows [N, (1 + levels) * hidden] of transformers in fp32, by its own image processor."""
    torch = pytest.importorskip("torch", reason="the reference is transformers")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
    seen = processor(images=[picture.resized_HWC], return_tensors="pt")
    with torch.no_grad():
        found = model.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"])
    return torch.cat([found.pooler_output, *found.deepstack_features], dim=1).numpy()


@pytest.mark.parametrize("size", LAYOUTS)
def test_embeddings_equal_those_of_transformers(
    size: tuple[int, int], tiny_untied_checkpoint: Path, tiny_untied_artifact: Path
) -> None:
    with load(tiny_untied_artifact, threads=1) as session:
        picture = _picture(session, *size)
        found = session.backend.encode_image(picture.resized_HWC)
        assert session.backend.mark() == START
    expected = _reference(tiny_untied_checkpoint, picture)
    assert found.shape == expected.shape == (picture.num_tokens, 4 * 256)
    # f16 weights; measured 0.0027
    assert np.abs(found - expected).max() < 0.01 * expected.std()


@pytest.mark.parametrize("size", LAYOUTS)
def test_embeddings_from_outside_give_the_same_logits(
    size: tuple[int, int], tiny_artifact: Path
) -> None:
    with load(tiny_artifact, threads=1) as session:
        backend = session.backend
        assert isinstance(backend, LlamaCpp)
        pixels = _picture(session, *size).resized_HWC
        backend.decode_tokens([1, 2, 3])
        backend.append_image(pixels)
        expected, end = backend.decode_tokens([4, 5]), backend.mark()
        rows = backend.encode_image(pixels)
        backend.rewind(START)
        backend.decode_tokens([1, 2, 3])
        backend.append_rows(rows, pixels.shape[0] // 32, pixels.shape[1] // 32)
        assert np.array_equal(backend.decode_tokens([4, 5]), expected)
        assert backend.mark() == end


def test_positions_of_an_image_start_where_the_text_ended() -> None:
    found = llamacpp_vision.image_positions(grid_span(2, 3), 7)
    assert found.tolist() == [[7] * 6, [7, 7, 7, 8, 8, 8], [7, 8, 9, 7, 8, 9], [0] * 6]
