"""The shipped MedMO-nano, exported and asked as a user would: it must find what was drawn."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from medmo_edge.boxes import iou
from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.evaluation.scores import match_image
from medmo_edge.export.export import export_checkpoint
from medmo_edge.images import Frame
from medmo_edge.phantoms import draw
from medmo_edge.runtime.session import Session, load
from medmo_edge.train.blood import read_names, read_scene

SEEDS = range(3_000_000, 3_000_016)  # neither training nor its model card's figures draw these
TARGETS = ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m")


@pytest.fixture(scope="module", params=TARGETS)
def session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("nano") / "artifact"
    export_checkpoint("nano", request.param, folder, golden=False)
    with load(folder) as opened:
        yield opened


def test_nodules_are_found_where_they_were_drawn(session: Session) -> None:
    overlaps = []
    for seed in SEEDS:
        phantom = draw(seed, nodule=True, effusion=False)
        answer = session.locate(Frame.from_pixels(phantom.pixels), "nodule")
        assert answer.finish_reason == "stop" and answer.rejected_boxes == ()
        assert {box.label for box in answer.boxes} <= {"nodule"}
        (truth,) = (box for box in phantom.boxes if box.label == "nodule")
        overlaps.append(max((iou(truth.xyxy, box.xyxy) for box in answer.boxes), default=0.0))
    assert np.mean(overlaps) > 0.4


def test_presence_follows_the_drawing(session: Session) -> None:
    right = 0
    for index, seed in enumerate(SEEDS):
        phantom = draw(seed, nodule=index % 2 == 0, effusion=index % 3 == 0)
        with session.study(Frame.from_pixels(phantom.pixels)) as study:
            right += study.ask("Is there a nodule?").text == ("Yes.", "No.")[index % 2]
            right += study.ask("Is there a pleural effusion?").text == (
                "Yes." if index % 3 == 0 else "No."
            )
    assert right / (2 * len(SEEDS)) > 0.8


def test_white_cells_of_real_smears_are_found(session: Session, data_dir: Path) -> None:
    folder = data_dir / "bccd"
    overlaps: list[float] = []
    for name in read_names(folder, "val")[:16]:
        scene = read_scene(folder, name)
        answer = session.locate(Frame.from_pixels(scene.pixels), "white blood cell")
        truth = [box.xyxy for box in scene.labelled("WBC")]
        overlaps += match_image(truth, [box.xyxy for box in answer.boxes]).ious
    assert np.mean(overlaps) > 0.5


def test_the_card_and_the_files_are_complete_and_small() -> None:
    folder = Path(str(resources.files("medmo_edge"))) / "medmo-nano"
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    assert "not a medical device" in (folder / "README.md").read_text().lower()
    assert json.loads((folder / "medmo_edge.json").read_text())["coords"] == "norm1000"
    with open_checkpoint("nano") as nano:
        assert 2_000_000 <= nano.num_parameters <= 8_000_000
