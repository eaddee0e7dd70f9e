"""Kept vision features: the loss of computed ones, found by content, and never the wrong ones."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import ImageError, RecipeError, SampleError, UsageError
from medmo_edge.samples import Sample, write_samples
from medmo_edge.train import vision_cache
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.packing import Chat, row_loss
from medmo_edge.train.parallel import Group
from medmo_edge.train.stages import DataSource, Stage, load_stages
from medmo_edge.train.vision_cache import (
    VisionCache,
    keep_features,
    reason_against,
    tower_sha256,
)

SIZES = [(64, 96), (128, 64), (96, 96)]


@pytest.fixture(scope="module")
def checkpoint(tiny_untied_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_untied_checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Any:
    loader: Any = transformers.Qwen3VLForConditionalGeneration
    return loader.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


@pytest.fixture()
def pictures(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(7)
    paths = [tmp_path / f"{index}.png" for index in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return paths


@pytest.fixture()
def stage(pictures: list[Path]) -> Stage:
    told = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "no nodule"}]
    shown = [pictures[:1], pictures[1:], [], pictures[2:]]
    samples = [
        Sample(id=str(number), task="vqa", images=tuple(images), messages=told)
        for number, images in enumerate(shown)
    ]
    write_samples(pictures[0].parent / "set.jsonl", samples)
    source = DataSource(path="set.jsonl", weight=1.0, tasks=(), augment="none")
    return replace(
        load_stages("medmo-8b").stages[2],
        data=(source,),
        mixture={"vqa": 1.0},
        rows=4,
        accumulation=1,
        row_tokens=256,
        min_pixels=1024,
        max_pixels=16384,
        trainable=("language",),
    )


def mixture(
    stage: Stage,
    checkpoint: Checkpoint,
    folder: Path,
    cache: VisionCache | None = None,
    skip_broken: bool = False,
) -> Mixture:
    chat, limits = Chat.of(checkpoint), checkpoint.preprocessing
    options: dict[str, Any] = {"folder": folder, "devices": 1, "skip_broken": skip_broken}
    made = Mixture(stage, 1, chat, limits, checkpoint.coords, **options)
    if cache is not None:
        made.use(cache)
    return made


def test_the_loss_is_that_of_computed_features(
    stage: Stage, checkpoint: Checkpoint, model: Any, tmp_path: Path
) -> None:
    computed = mixture(stage, checkpoint, tmp_path)
    cache = VisionCache.open(tmp_path / "cache", model, computed.limits)
    assert cache.fill(model, computed.pictures()) == len(cache) == 3
    kept = mixture(stage, checkpoint, tmp_path, cache=cache)
    (row,), (other,) = computed.rows(0, 0, 1), kept.rows(0, 0, 1)
    assert row.sample_ids == other.sample_ids
    assert "pixel_values" not in other.inputs and "vision_features" in other.inputs
    idle = min((kept.rows(0, rank, 5)[0] for rank in range(5)), key=lambda one: one.tokens)
    assert idle.tokens == 0 and "pixel_values" not in idle.inputs  # nobody runs the tower
    assert float(row_loss(model, idle).detach()) == 0
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    losses = [row_loss(model, one) for one in (row, other)]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-6)
    first, second = (torch.autograd.grad(loss, [weight])[0] for loss in losses)
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)
    other.inputs["vision_features"][1:] = 0  # the deepstack sets matter: the comparison would see
    assert abs(float(row_loss(model, other).detach()) / float(losses[0].detach()) - 1) > 1e-3


def test_features_are_those_of_one_pass(
    pictures: list[Path], checkpoint: Checkpoint, model: Any, tmp_path: Path
) -> None:
    limits = replace(checkpoint.preprocessing, min_pixels=1024)
    cache = VisionCache.open(tmp_path / "cache", model, limits)
    cache.fill(model, pictures)
    again = VisionCache.open(tmp_path / "cache", model, limits)  # as the next run finds it
    assert len(again) == 3 and again.fill(model, pictures) == 0
    found = again.read([pictures[2], pictures[0]])
    tokens = [96 * 96 // 1024, 64 * 96 // 1024]
    assert found.shape == (4, sum(tokens), model.config.text_config.hidden_size)
    assert torch.equal(found[:, : tokens[0]], cache.read(pictures[2:]))


def test_content_is_the_key_not_the_name(
    pictures: list[Path], checkpoint: Checkpoint, model: Any, tmp_path: Path
) -> None:
    cache = VisionCache.open(tmp_path / "cache", model, checkpoint.preprocessing)
    copy = tmp_path / "copy.png"
    shutil.copy(pictures[0], copy)
    assert cache.fill(model, [*pictures[:1], copy]) == 1
    assert torch.equal(cache.read([copy]), cache.read(pictures[:1]))
    with pytest.raises(ImageError, match="1.png is not in the vision cache .*: fill it first"):
        cache.read(pictures[1:2])


def test_other_weights_or_preprocessing_have_their_own_folder(
    checkpoint: Checkpoint, model: Any, tmp_path: Path
) -> None:
    def folder(min_pixels: int = 1024) -> Path:
        limits = replace(checkpoint.preprocessing, min_pixels=min_pixels)
        return VisionCache.open(tmp_path, model, limits).folder

    first = folder()
    assert folder() == first and folder(4096) != first
    bias = model.model.visual.merger.linear_fc2.bias.data
    kept, whole = float(bias[0]), tower_sha256(model.model.visual)
    bias[0] += 1e-3
    assert folder() != first and tower_sha256(model.model.visual) != whole
    bias[0] = kept
    assert folder() == first


def test_a_killed_fill_leaves_a_usable_cache(
    pictures: list[Path],
    checkpoint: Checkpoint,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = replace(checkpoint.preprocessing, min_pixels=1024)
    cache = VisionCache.open(tmp_path / "cache", model, limits)
    cache.fill(model, pictures)
    whole = cache.read(pictures)
    index, values = cache.folder / "index.jsonl", cache.folder / "features.bin"
    monkeypatch.setattr(vision_cache, "PATCHES", 1)  # one picture at a time from here on
    for cut in (1, 7, 100):
        index.write_text(index.read_text()[:-5])  # the last entry half written
        values.write_bytes(values.read_bytes()[:-cut])  # and its features, too
        damaged = VisionCache.open(tmp_path / "cache", model, limits)
        assert len(damaged) == 2 and damaged.fill(model, pictures) == 1
        healed = VisionCache.open(tmp_path / "cache", model, limits)
        assert torch.allclose(healed.read(pictures), whole, rtol=1e-4, atol=1e-5)


def test_broken_pictures_are_left_to_the_mixture(
    stage: Stage, checkpoint: Checkpoint, model: Any, pictures: list[Path], tmp_path: Path
) -> None:
    data = pictures[0].read_bytes()
    pictures[0].write_bytes(data[: len(data) // 2])
    cache = VisionCache.open(tmp_path / "cache", model, mixture(stage, checkpoint, tmp_path).limits)
    assert cache.fill(model, [*pictures, tmp_path / "none.png"]) == 2
    strict = mixture(stage, checkpoint, tmp_path, cache=cache)
    with pytest.raises(SampleError, match=r"set.jsonl:1: picture 0.png cannot be read"):
        strict.rows(0, 0, 1)
    lenient = mixture(stage, checkpoint, tmp_path, cache=cache, skip_broken=True)
    assert sorted(lenient.rows(0, 0, 1)[0].sample_ids) == ["1", "2", "3"]


def test_a_disk_that_is_too_small(
    pictures: list[Path],
    checkpoint: Checkpoint,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = VisionCache.open(tmp_path / "cache", model, checkpoint.preprocessing)
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UsageError, match="needs .* GB and 0.0 GB are free: choose another folder"):
        cache.fill(model, pictures)


def test_who_may_use_it(stage: Stage, checkpoint: Checkpoint, model: Any, tmp_path: Path) -> None:
    assert reason_against(stage) is None
    learns = replace(stage, trainable=("merger", "language"))
    assert "trains the merger" in str(reason_against(learns))
    turning = replace(stage, data=(replace(stage.data[0], augment="geometric"),))
    assert "augments pictures" in str(reason_against(turning))
    cache = VisionCache.open(tmp_path / "cache", model, checkpoint.preprocessing)
    with pytest.raises(RecipeError, match='set augment = "none" for set.jsonl'):
        mixture(turning, checkpoint, tmp_path, cache=cache)


@pytest.mark.parametrize(
    ("changes", "free", "kept"),
    [
        ({"samples": 6}, 10**9, True),
        ({"samples": 5}, 10**9, False),  # three pictures, not shown twice
        ({"samples": 5, "epochs": 1.2}, 10**9, True),
        ({"samples": 6}, 10**5, False),
        ({"samples": 6, "trainable": ("language", "merger")}, 10**9, False),
    ],
)
def test_features_are_kept_where_it_pays(
    stage: Stage,
    checkpoint: Checkpoint,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    free: int,
    kept: bool,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free))
    wanted = replace(stage, **changes)
    one = mixture(wanted, checkpoint, tmp_path)
    cache = keep_features(one, wanted, model, tmp_path / "kept", Group(), "float32")
    assert (cache is not None) == kept
    assert ("vision_features" in one.rows(0, 0, 1)[0].inputs) == kept
