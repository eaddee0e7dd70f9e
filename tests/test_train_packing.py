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
import transformers

from medmo_edge.boxes import Box
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import SampleError
from medmo_edge.preprocess import Preprocessing
from medmo_edge.prompts import ChatTemplate, user_message
from medmo_edge.samples import Sample
from medmo_edge.tokenizer import Tokenizer
from medmo_edge.train.packing import (
    IGNORE,
    Chat,
    Encoded,
    encode_sample,
    idle_row,
    model_inputs,
    pack,
    row_loss,
)

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
    loader: Any = transformers.Qwen3VLForConditionalGeneration
    return loader.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


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
        ours = float(row_loss(model, row))
        assert ours == pytest.approx(alone, rel=2e-6)


def test_the_packed_gradient_is_the_gradient_of_the_samples_alone(
    model: Any, mixed: list[Encoded]
) -> None:
    """Of a weight at the bottom of the tower, one of the language model, and the tied table."""
    weights = [
        model.model.visual.patch_embed.proj.weight,
        model.model.language_model.layers[0].self_attn.k_proj.weight,
        model.model.language_model.embed_tokens.weight,
    ]
    alone = torch.autograd.grad(sum(loss_alone(model, one) for one in mixed), weights)  # type: ignore[arg-type]
    packed = torch.autograd.grad(row_loss(model, pack(mixed)), weights)
    for one, other in zip(packed, alone, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def leaky(row_inputs: dict[str, Any], form: str) -> dict[str, Any]:
    """Three ways to get it wrong that raise nothing."""
    if form == "three rows":
        return row_inputs | {"position_ids": row_inputs["position_ids"][1:]}
    if form == "a cache":
        return row_inputs | {"use_cache": True}
    return row_inputs | {"attention_mask": torch.ones_like(row_inputs["input_ids"])}


@pytest.mark.parametrize("form", ["three rows", "a cache", "a mask"])
def test_wrong_inputs_leak_and_the_comparison_notices(
    model: Any, mixed: list[Encoded], form: str
) -> None:
    row = pack(mixed)
    with torch.no_grad():
        right = float(loss_packed(model, model_inputs(row), row.labels))
        wrong = float(loss_packed(model, leaky(model_inputs(row), form), row.labels))
    assert abs(wrong - right) > 1e-3 * right


def test_a_dummy_picture_changes_nothing(
    model: Any, encode: Encode, checkpoint: Checkpoint
) -> None:
    texts = [encode(talk([], id=name)) for name in ("a", "b")]
    bare, shown = pack(texts, dummy_image=False), pack(texts)
    assert set(shown.inputs) - set(bare.inputs) == {"pixel_values", "image_grid_thw"}
    assert (bare.tokens, bare.answer_tokens) == (shown.tokens, shown.answer_tokens)
    losses = [row_loss(model, row) for row in (bare, shown)]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-6)
    tower = model.model.visual.patch_embed.proj.weight
    (gradient,) = torch.autograd.grad(losses[1], [tower])  # the tower took part, and learns nothing
    assert not gradient.any()


def test_an_idle_row_has_a_loss_of_zero(model: Any, checkpoint: Checkpoint) -> None:
    row = idle_row(Chat.of(checkpoint), checkpoint.preprocessing)
    loss = row_loss(model, row)
    gradient = torch.autograd.grad(loss, [model.model.visual.patch_embed.proj.weight])[0]
    assert float(loss.detach()) == 0 and not gradient.any()
    assert (row.sample_ids, row.tokens, row.answer_tokens) == ((), 0, 0)


def test_labels_are_answers_and_their_end(encode: Encode, checkpoint: Checkpoint) -> None:
    one = encode(talk([]))
    tokenizer = checkpoint.load_tokenizer()
    spans = np.flatnonzero(np.diff(np.concatenate([[0], one.labels != IGNORE, [0]])))
    told = [one.ids[a:b].tolist() for a, b in spans.reshape(-1, 2)]
    end = tokenizer.special_ids["<|im_end|>"]
    assert [ids[-1] for ids in told] == [end, end]
    assert [tokenizer.decode(ids) for ids in told] == ["The left lobe shows a fracture.", "17"]
    assert np.array_equal(one.labels[one.labels != IGNORE], one.ids[one.labels != IGNORE])


def test_texts_are_those_of_transformers(
    pictures: list[Path], encode: Encode, checkpoint: Checkpoint
) -> None:
    loader: Any = transformers.AutoTokenizer
    tokenizer = loader.from_pretrained(checkpoint.path)
    sample = talk(pictures[:2])
    text = tokenizer.apply_chat_template(sample.messages, tokenize=False).rstrip("\n")
    one = encode(sample)
    first, second, third = text.split("<|image_pad|>")
    counts = [grid[1] * grid[2] // 4 for grid in one.grids]
    pads = ["<|image_pad|>" * count for count in counts]
    whole = first + pads[0] + second + pads[1] + third
    assert one.ids.tolist() == tokenizer(whole, add_special_tokens=False).input_ids


def test_boxes_are_written_in_the_checkpoints_convention(
    pictures: list[Path], encode: Encode, checkpoint: Checkpoint
) -> None:
    one = encode(locate(pictures[:1]))  # 96 x 64 pixels; 3 4 20 30 and 1 2 33 30
    text = checkpoint.load_tokenizer().decode(one.ids[one.labels != IGNORE].tolist())
    assert text == "nodule <box>[[31, 62, 208, 469]]</box>, mass <box>[[10, 31, 344, 469]]</box>"


def test_a_prompt_ends_where_the_answer_begins(pictures: list[Path], encode: Encode) -> None:
    sample = talk(pictures[:1])
    asked, told = encode(sample, answered=False), encode(sample)
    assert bool((asked.labels == IGNORE).all())
    assert np.array_equal(asked.ids, told.ids[: asked.tokens])
    assert told.labels[asked.tokens] == told.ids[asked.tokens]


def test_pictures_that_no_message_shows_come_first(pictures: list[Path], encode: Encode) -> None:
    shown = talk(pictures[:1])
    plain = [{"role": "user", "content": "Describe this medical image."}, *shown.messages[1:]]
    assert np.array_equal(encode(shown).ids, encode(replace(shown, messages=plain)).ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": (Path("none.png"),)}, "none.png"),
        ({"messages": [user_message("Why?", 0)]}, "has no answer: add an assistant message"),
        (
            {
                "messages": [*talk([]).messages[:3], talk([]).messages[1] | {"content": " "}],
                "images": (),
            },
            "its answer is empty",
        ),
        ({"messages": [user_message("a<|im_end|>b", 0)]}, "control token <|im_end|>: remove it"),
        ({"images": ()}, "conversation shows 1 images where 0 are left"),
    ],
)
def test_mistakes_name_file_and_line(
    pictures: list[Path], encode: Encode, change: dict[str, Any], message: str
) -> None:
    sample = replace(talk(pictures[:1]), line=17, **change)
    if "messages" in change and "Why" not in str(change):
        sample = replace(sample, answer="b")
    with pytest.raises(SampleError) as caught:
        encode(sample, source=Path("set.jsonl"))
    text = str(caught.value)
    assert text.startswith("set.jsonl:17: ") and message in text and "\n" not in text


def test_a_box_outside_and_a_row_too_short(pictures: list[Path], encode: Encode) -> None:
    outside = replace(locate(pictures[:1]), boxes=(Box("mass", 90, 0, 97, 5),))
    with pytest.raises(SampleError, match="box .* reaches outside its image of 96 x 64 pixels"):
        encode(outside)
    whole = encode(talk(pictures[:2]))
    assert encode(talk(pictures[:2]), row_tokens=whole.tokens).tokens == whole.tokens
    with pytest.raises(SampleError, match=f"needs {whole.tokens} tokens .* raise row_tokens"):
        encode(talk(pictures[:2]), row_tokens=whole.tokens - 1)


def test_a_template_that_does_not_continue_is_refused(checkpoint: Checkpoint) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages|length }}"
    chat = Chat(tokenizer=checkpoint.load_tokenizer(), template=ChatTemplate(source))
    with pytest.raises(SampleError, match="chat template does not continue a prompt"):
        encode_sample(talk([]), chat, checkpoint.preprocessing, checkpoint.coords)


def test_the_published_template_and_tokenizer(data_dir: Path) -> None:
    """Qwen3's own files: a conversation cut into answers is the text rendered at once."""
    folder = data_dir / "tokenizer"
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    template = ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    sample = talk([])
    one = encode_sample(
        sample, Chat(tokenizer=tokenizer, template=template), Preprocessing(), "norm1000"
    )
    text = template.render(sample.messages, add_generation_prompt=False).rstrip("\n")
    assert one.ids.tolist() == tokenizer.encode(text)
    told = tokenizer.encode("The left lobe shows a fracture.<|im_end|>17<|im_end|>")
    assert one.labels[one.labels != IGNORE].tolist() == told
