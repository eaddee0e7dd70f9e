"""The llama.cpp backend where it differs from others: a context that must be made anew to grow.

What it shares with the other backends is in test_runtime_agreement.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.errors import GenerationError
from medmo_edge.images import Frame
from medmo_edge.runtime import llamacpp_fit, llamacpp_native
from medmo_edge.runtime.session import load

pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")


def _frame(width: int, height: int, seed: int = 0) -> Frame:
    random = np.random.default_rng(seed)
    return Frame.from_pixels(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_growing_context_changes_nothing(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [_frame(200, 200), _frame(300, 100, 1)]
    with load(tiny_artifact, threads=1) as session:
        expected = session.ask(frames, "Describe this medical image.", max_new_tokens=120)
    monkeypatch.setattr(
        llamacpp_fit, "FIRST_CELLS", 16
    )  # grows in images, in text and in the answer
    with load(tiny_artifact, threads=1) as grown:
        found = grown.ask(frames, "Describe this medical image.", max_new_tokens=120)
        assert grown.backend._capacity >= expected.timings.prompt_tokens + 119  # type: ignore[attr-defined]
    assert found.text == expected.text


def test_a_context_that_cannot_grow_leaves_the_study_usable(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp_fit, "FIRST_CELLS", 128)
    with load(tiny_artifact, threads=1) as opened:
        study = opened.study(_frame(96, 96))
        expected = study.ask("Is it?", max_new_tokens=8).text
        open_context = llamacpp_native.open_context

        def refuse_more(*args: Any, cells: int, **options: Any) -> int | None:
            return None if cells > 128 else open_context(*args, cells=cells, **options)

        monkeypatch.setattr(llamacpp_native, "open_context", refuse_more)
        with pytest.raises(GenerationError, match="cannot hold a context of 256"):
            study.ask("Is it?", max_new_tokens=300)
        assert study.ask("Is it?", max_new_tokens=8).text == expected
