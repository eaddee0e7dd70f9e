"""Packed rows: the loss of samples alone, labels on answers only, and mistakes with their line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from medmo_edge.boxes import Box
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.prompts import user_message
from medmo_edge.samples import Sample
from medmo_edge.train.packing import IGNORE, Chat, Encoded, encode_sample, model_inputs, pack

SIZES = [(64, 96), (128, 64), (96, 96), (32, 160)]  # height, width: four different grids


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(7)
    paths = [folder / f"{index}.png" for index in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_untied_checkpoint"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Any:
    from transformers import Qwen3VLForConditionalGeneration as Model

    return Model.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


Encode = Callable[..., Encoded]


@pytest.fixture(scope="module")
def encode(checkpoint: Checkpoint) -> Encode:
    chat = Chat.of(checkpoint)
    limits = replace(checkpoint.preprocessing, min_pixels=1024)

    def call(sample: Sample, **options: Any) -> Encoded:
        return encode_sample(sample, chat, limits, checkpoint.coords, **options)

    return call


def locate(images: list[Path]) -> Sample:
    boxes = (Box("nodule", 3, 4, 20, 30), Box("mass", 1, 2, 33, 30, len(images) - 1))
    asked = user_message("Locate the nodule.", len(images))
    return Sample(id="l", task="locate", images=tuple(images), messages=[asked], boxes=boxes)


def talk(images: list[Path], id: str = "t") -> Sample:
    messages = [
        user_message("Describe this medical image.", len(images)),
        {"role": "assistant", "content": "The left lobe shows a fracture."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "17"},
    ]
    return Sample(id=id, task="vqa", images=tuple(images), messages=messages)


@pytest.fixture(scope="module")
def mixed(pictures: list[Path], encode: Encode) -> list[Encoded]:
    """One picture, several of them, none; short and long, one turn and two."""
    samples = [
        talk(pictures[:1]),
        locate(pictures[1:]),
        talk([]),
        locate(pictures[2:3]),
        talk([pictures[3], pictures[0]]),
    ]
    return [encode(sample) for sample in samples]


def loss_alone(model: Any, one: Encoded) -> torch.Tensor:
    """The summed loss of transformers itself, with the positions it computes itself."""
    ids, labels = torch.from_numpy(one.ids[None]), torch.from_numpy(one.labels[None])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if one.grids:
        inputs["mm_token_type_ids"] = (ids == one.image_token).int()
        inputs["pixel_values"] = torch.from_numpy(one.patches)
        inputs["image_grid_thw"] = torch.tensor(one.grids)
    loss = model(**inputs, labels=labels).loss
    summed: torch.Tensor = loss * (labels[:, 1:] != IGNORE).sum()
    return summed


def loss_packed(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits
    shifted = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return shifted


def test_the_packed_loss_is_the_loss_of_the_samples_alone(model: Any, mixed: list[Encoded]) -> None:
    with torch.no_grad():
        alone = sum(float(loss_alone(model, one)) for one in mixed)
        row = pack(mixed)
        packed = float(loss_packed(model, model_inputs(row), row.labels))
        assert packed == pytest.approx(alone, rel=2e-6)
        mean = float(model(**model_inputs(row), labels=row.labels).loss)
        assert mean == pytest.approx(alone / row.answer_tokens, rel=2e-6)
