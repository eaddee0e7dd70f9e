"""VQA-RAD as scenes: no picture on both sides, questions and answers as published."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch")
pytest.importorskip("transformers")

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.benchmarks import BENCHMARKS
from medmo_edge.evaluation.cases import JUDGE_TAIL, OPEN_TAIL
from medmo_edge.evaluation.items import refuse
from medmo_edge.train.collator import see
from medmo_edge.train.questions import sample_turns
from medmo_edge.train.radiology import LONGEST_SIDE, read_radiology
from medmo_edge.train.recipe import load_recipe
from medmo_edge.train.scenes import Scene, augment
from medmo_edge.train.writer import COORDS, processing


@pytest.fixture(scope="module")
def held_out_scenes(data_dir: Path) -> list[Scene]:
    return read_radiology(data_dir, "val")


def test_the_benchmark_asks_about_no_picture_that_is_learned_from(
    data_dir: Path, held_out_scenes: list[Scene]
) -> None:
    asked = {turn for scene in held_out_scenes for turn in scene.turns}
    benchmark = BENCHMARKS["vqa-rad"]
    items = list(benchmark.read(data_dir / "vqa-rad", refuse))
    closed = [item for item in items if item.answer in ("yes", "no")]
    assert len({item.images[0].name for item in items}) == len(held_out_scenes)
    assert {(item.question, f"{item.answer}.".capitalize()) for item in closed} <= asked


def test_a_view_keeps_the_questions_and_is_never_mirrored(held_out_scenes: list[Scene]) -> None:
    scene = held_out_scenes[0]
    assert max(scene.pixels.shape) <= LONGEST_SIDE
    limits = processing(load_recipe("nano").phases[-1])
    for seed in range(8):
        rng = np.random.default_rng(seed)
        view = augment(scene, rng)
        # a mirrored crop would resemble the mirrored picture more
        straight, mirrored = _likeness(scene, view), _likeness(scene, view, mirror=True)
        assert straight > mirrored
        turns = list(sample_turns(view, see(view.pixels, limits).geometry, COORDS, rng))
        plain = {(_plain(turn.question), turn.answer) for turn in turns}
        assert plain == set(scene.turns)


def _plain(question: str) -> str:
    return question.removesuffix(f"\n{JUDGE_TAIL}").removesuffix(f"\n{OPEN_TAIL}")


def _likeness(scene: Scene, view: Scene, mirror: bool = False) -> float:
    """The best correlation of a coarse view with a coarse picture, over the crops it may be."""
    from PIL import Image

    def coarse(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.asarray(Image.fromarray(pixels).resize((24, 24)).convert("L"), np.float64)

    whole = scene.pixels[:, ::-1] if mirror else scene.pixels
    return float(
        np.corrcoef(coarse(np.ascontiguousarray(whole)).ravel(), coarse(view.pixels).ravel())[0, 1]
    )


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="vqa-rad does not exist: set MEDMO_EDGE_DATA"):
        read_radiology(tmp_path, "train")
