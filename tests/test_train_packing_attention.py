"""Attention within samples: the library's numbers, for packed rows and for everything else."""

from collections.abc import Iterator
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

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.prompts import user_message
from medmo_edge.samples import Sample
from medmo_edge.train import packed_attention
from medmo_edge.train.packed_attention import NAME, use_packed
from medmo_edge.train.packing import Chat, PackedRow, encode_sample, model_inputs, pack, row_loss


@pytest.fixture(scope="module")
def row(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedRow:
    checkpoint = open_checkpoint(tiny_checkpoint)
    limits = replace(checkpoint.preprocessing, min_pixels=1024)
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.fromarray(np.arange(96 * 64 * 3).reshape(96, 64, 3).astype(np.uint8)).save(path)
    encoded = []
    for number, images in enumerate([(path,), (), (path, path), ()]):
        told = {"role": "assistant", "content": "no nodule " * (number + 1)}
        messages = [user_message("Is there a nodule?", len(images)), told]
        sample = Sample(id=str(number), task="vqa", images=images, messages=messages)
        encoded.append(encode_sample(sample, Chat.of(checkpoint), limits, checkpoint.coords))
    return pack(encoded)


@pytest.fixture()
def model(tiny_checkpoint: Path) -> Any:
    loader: Any = transformers.Qwen3VLForConditionalGeneration
    return loader.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of stretches of every call."""
    found: list[int] = []
    real = packed_attention._spans

    def spans(position_ids: torch.Tensor) -> list[int]:
        found.append(len(real(position_ids)))
        return real(position_ids)

    monkeypatch.setattr(packed_attention, "_spans", spans)
    yield found


def test_loss_and_gradient_are_the_librarys(model: Any, row: PackedRow, calls: list[int]) -> None:
    weights = [model.model.visual.pos_embed.weight, model.model.language_model.norm.weight]
    expected = row_loss(model, row)
    gradients = torch.autograd.grad(expected, weights)
    use_packed(model)
    found = row_loss(model, row)
    assert calls == [4] * model.config.text_config.num_hidden_layers
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for one, other in zip(torch.autograd.grad(found, weights), gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_samples_do_not_see_each_other(model: Any, row: PackedRow) -> None:
    """Other tokens in the last sample change nothing before it."""
    use_packed(model)
    inputs = model_inputs(row)
    text = row.inputs["position_ids"][0, 0]
    last = int((text == 0).nonzero()[-1])
    changed = inputs["input_ids"].clone()
    changed[0, last + 3 : last + 9] = 65
    with torch.no_grad():
        before = model(**inputs).logits[0]
        after = model(**(inputs | {"input_ids": changed})).logits[0]
    assert torch.equal(before[:last], after[:last])
    assert not torch.allclose(before[last + 4 :], after[last + 4 :])


def test_padded_batches_are_the_librarys(model: Any, row: PackedRow, calls: list[int]) -> None:
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=seen).logits
        use_packed(model)
        found = model(input_ids=ids, attention_mask=seen).logits
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1, 4:], expected[1, 4:])
    assert calls == []


def test_generation_is_the_librarys(model: Any) -> None:
    ids = torch.randint(0, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(input_ids=ids, **options)
    use_packed(model)
    assert model.model.language_model.config._attn_implementation == NAME
    assert torch.equal(model.generate(input_ids=ids, **options), expected)


def test_another_attention_stays(model: Any) -> None:
    config = model.model.language_model.config
    config._attn_implementation = "eager"
    use_packed(model)
    assert config._attn_implementation == "eager"
