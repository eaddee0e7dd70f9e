"""llama.cpp's decoder behind the ONNX vision tower: against transformers, and its manners."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.errors import ArtifactError, GenerationError
from medmo_edge.images import Frame
from medmo_edge.manifest import read_manifest
from medmo_edge.runtime import llamacpp
from medmo_edge.runtime.backends import START, Interrupted
from medmo_edge.runtime.combined import Combined
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.prefixes import Cost, Prefix
from medmo_edge.runtime.session import load

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")

Tiny = Callable[..., Path]


def _pixels(height: int, width: int) -> Any:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _open(tiny_artifacts: Tiny) -> Combined:
    decoder = llamacpp.open(read_manifest(tiny_artifacts("gguf-f16")), probe(), threads=1)
    return Combined(decoder, read_manifest(tiny_artifacts("onnx-fp32")), threads=1)


@pytest.fixture(scope="module")
def combined(tiny_artifacts: Tiny) -> Iterator[Combined]:
    """Both artifacts of the tiny checkpoint."""
    opened = _open(tiny_artifacts)
    yield opened
    opened.close()


@pytest.mark.parametrize("size", [(224, 224), (640, 96), (130, 700)])
def test_logits_agree_with_the_whole_model_in_fp32(
    size: tuple[int, int], combined: Combined, tiny_artifacts: Tiny
) -> None:
    """The ONNX artifact in fp32 stands for transformers, which test_runtime_agreement proves."""
    with load(tiny_artifacts("onnx-fp32"), threads=1) as session:
        picture = session._chat.picture(Frame.from_pixels(_pixels(*size)))
        ids, rest = session._chat.prompt("Locate the nodule.", [picture])
        segments = session._chat.segments(ids, [picture])
        session._stage.prefixes.bring(Prefix(ids, segments), Cost())
        expected = session.backend.decode_tokens(rest)
    combined.rewind(START)
    for segment in segments:
        if isinstance(segment, list):
            combined.decode_tokens(segment)
        else:
            combined.append_image(segment.resized_HWC)
    found = combined.decode_tokens(rest)
    assert np.abs(found - expected).max() < 0.02  # the f16 decoder's share
    assert expected.std() > 1


def test_it_behaves_like_one_backend(combined: Combined) -> None:
    combined.rewind(START)
    combined.decode_tokens([1, 2, 3])
    combined.append_image(_pixels(96, 64))
    mark, state = combined.mark(), combined.save()
    expected = combined.decode_tokens([4, 5])
    combined.rewind(mark)
    assert np.array_equal(combined.decode_tokens([4, 5]), expected)
    combined.rewind(START)
    combined.restore(state, mark)
    assert np.array_equal(combined.decode_tokens([4, 5]), expected)
    assert "vision tower of onnx-fp32" in combined.device


@pytest.mark.parametrize("looks", [0, 1])
def test_an_interrupt_stops_the_tower_and_leaves_the_state(looks: int, combined: Combined) -> None:
    combined.rewind(START)
    combined.decode_tokens([1, 2, 3])
    before, asked = combined.mark(), 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > looks

    combined.set_interrupt(stop)
    with pytest.raises(Interrupted):
        combined.append_image(_pixels(448, 320))
    combined.set_interrupt(None)
    assert combined.mark() == before


def test_a_tower_of_another_checkpoint_is_refused(tiny_artifacts: Tiny) -> None:
    decoder = llamacpp.open(read_manifest(tiny_artifacts("gguf-f16")), probe(), threads=1)
    tower = read_manifest(tiny_artifacts("onnx-fp32", "tiny_untied_checkpoint"))
    with pytest.raises(ArtifactError, match="vision tower cannot serve this decoder"):
        Combined(decoder, tower, threads=1)
    decoder.close()


def test_an_image_too_large_is_refused_before_it_is_encoded(
    combined: Combined, monkeypatch: pytest.MonkeyPatch
) -> None:
    combined.rewind(START)
    monkeypatch.setattr(combined._decoder, "max_cells", 10)
    monkeypatch.setattr(combined, "encode_image", lambda _: pytest.fail("it was encoded"))
    with pytest.raises(GenerationError, match="do not fit the context of 10"):
        combined.append_image(_pixels(448, 448))


def test_closed_is_closed(tiny_artifacts: Tiny) -> None:
    opened = _open(tiny_artifacts)
    opened.close()
    opened.close()
    with pytest.raises(GenerationError, match="closed"):
        opened.decode_tokens([1])
    with pytest.raises(GenerationError, match="closed"):
        opened.encode_image(_pixels(64, 64))
