"""Every kind of model through one door, against transformers called in its own way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.errors import ArtifactError, PromptError, UsageError
from medmo_edge.evaluation.models import Model, Request, geometry_of, is_checkpoint, open_model
from medmo_edge.images import Frame

QUESTION = "Locate the nodule."


def _frame(height: int = 96, width: int = 128, seed: int = 0) -> Frame:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Frame.from_pixels(pixels)


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint: Path) -> Iterator[Model]:
    pytest.importorskip("transformers", reason="asking a checkpoint needs the train extra")
    with open_model(tiny_checkpoint) as model:
        yield model


def test_fake_answers_everything_and_reads_its_boxes() -> None:
    with open_model("fake:nodule <box>[[0, 0, 500, 1000]]</box>") as model:
        answer = model.answer([_frame()], QUESTION)
        assert [box.xyxy for box in answer.boxes] == [(0, 0, 64, 96)]
        assert model.identity()["kind"] == "fake"
        assert answer.finish_reason == "stop" and answer.new_tokens == len(answer.text)


def test_text_alone_is_a_question_too(tiny_model: Model) -> None:
    answer = tiny_model.answer([], "Is there a nodule?", 5)
    assert answer.boxes == () and 0 < answer.new_tokens <= 5
    with open_model("fake:yes") as fake:
        assert fake.answer([], "Is there?").text == "yes"


def test_a_checkpoint_answers_as_transformers_own_processor_would(
    tiny_model: Model, tiny_checkpoint: Path
) -> None:
    """The reference renders, tokenises and resizes by itself."""
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    network = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32
    ).eval()
    images = transformers.AutoImageProcessor.from_pretrained(tiny_checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    frame = _frame(200, 333)
    seen = images(images=[frame.pixels], return_tensors="pt")
    tokens = int(seen["image_grid_thw"].prod()) // 4
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    ).replace("<|image_pad|>", "<|image_pad|>" * tokens)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        said = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == network.config.image_token_id).int(),
            **seen,
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=list(range(len(tokenizer), network.config.text_config.vocab_size))
            or None,
        )[0, ids.shape[1] :]
    answer = tiny_model.answer([frame], QUESTION, 12)
    assert answer.text == tokenizer.decode(said, skip_special_tokens=True)
    assert answer.prompt_tokens == ids.shape[1]


def test_a_batch_answers_like_one_at_a_time(tiny_model: Model) -> None:
    frames = [_frame(seed=0), _frame(seed=1), _frame(64, 200, seed=2), _frame(seed=3)]
    questions = [QUESTION, QUESTION, QUESTION, "Is there a nodule in the left lung?"]
    requests = [
        Request(frames=(frame,), question=question, max_new_tokens=6)
        for frame, question in zip(frames, questions, strict=True)
    ]
    together = dict(tiny_model.answer_all(requests))
    assert sorted(together) == [0, 1, 2, 3]
    for index, request in enumerate(requests):
        alone = tiny_model.answer(request.frames, request.question, 6)
        assert together[index].text == alone.text


def test_texts_before_images_reach_the_prompt(tiny_model: Model) -> None:
    frames = (_frame(), _frame(seed=1))
    plain = Request(frames=frames, question="Compare.", max_new_tokens=1)
    named = Request(
        frames=frames,
        question="Compare.",
        max_new_tokens=1,
        image_texts=("<image_1>: ", "<image_2>: "),
    )
    without, with_texts = (
        next(iter(tiny_model.answer_all([request])))[1].prompt_tokens for request in (plain, named)
    )
    assert with_texts > without + 4
    with open_model("fake:yes") as fake:
        ((_, answer),) = fake.answer_all([named])
        ((_, bare),) = fake.answer_all([plain])
        assert answer.prompt_tokens == bare.prompt_tokens + 2 * len("<image_1>: ")
        with pytest.raises(PromptError, match="1 image texts for 2 images"):
            list(fake.answer_all([Request(frames=frames, question="a", image_texts=("x",))]))


def test_identity_names_weights_and_what_computes(tiny_model: Model) -> None:
    identity = tiny_model.identity()
    assert identity["kind"] == "checkpoint" and len(identity["sha256"]) == 64
    assert identity["dtype"] == "float32" and identity["transformers"]


def test_what_is_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert is_checkpoint("nano") and is_checkpoint(tiny_checkpoint)
    assert not is_checkpoint("fake:nano") and not is_checkpoint(tmp_path)


def test_refusals(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        open_model(tmp_path)
    with pytest.raises(UsageError, match="dtype 'int3' is unknown"):
        open_model(tiny_checkpoint, dtype="int3")
    with pytest.raises(UsageError, match="device 'toaster' is unknown"):
        open_model(tiny_checkpoint, device="toaster")


def test_geometry_is_the_resized_one(tiny_model: Model) -> None:
    geometry = geometry_of(_frame(200, 333), tiny_model.preprocessing)
    assert (geometry.width, geometry.height) == (333, 200)
    assert geometry.resized_width % 32 == 0 and geometry.resized_height % 32 == 0
