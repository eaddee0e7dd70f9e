"""Rows and batches: labels only on answers, and questions that cannot see each other."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from medmo_edge.preprocess import Preprocessing
from medmo_edge.prompts import ChatTemplate, user_message
from medmo_edge.train.architecture import build_model
from medmo_edge.train.collator import (
    IGNORE,
    PREFIX,
    Row,
    collate,
    encode,
    encode_row,
    prompt_text,
    question_text,
    see,
    visible,
)
from medmo_edge.train.loop import answer_loss
from medmo_edge.train.questions import Turn
from medmo_edge.train.recipe import load_recipe
from medmo_edge.train.scenes import chest_scene
from medmo_edge.train.vocabulary import special_ids, train_tokenizer
from medmo_edge.train.writer import CHAT_TEMPLATE

QUESTIONS = [
    Turn("Locate the nodule.", "nodule <box>[[123, 456, 789, 1000]]</box>"),
    Turn("Is there a nodule?", "Yes."),
    Turn("How many nodules are there?", "1"),
]
TOKENIZER = train_tokenizer([turn.question + turn.answer for turn in QUESTIONS] * 5, 300)
IDS = special_ids(TOKENIZER)
LIMITS = Preprocessing(min_pixels=9216, max_pixels=9216)
RECIPE = load_recipe("smoke")


def row(*conversations: list[Turn], seed: int = 0, max_tokens: int = 999) -> Row:
    picture = see(chest_scene(seed).pixels, LIMITS)
    return encode_row(TOKENIZER, IDS, picture, conversations, max_tokens, 2)


def texts(found: Row, keep: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> str:
    return TOKENIZER.decode(found.ids[keep].tolist(), skip_special_tokens=False)


def test_a_row_reads_as_the_chat_template_writes_it() -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    turn = QUESTIONS[0]
    found = row([turn])
    one_pad = "<|image_pad|>"
    expected = template.render([user_message(turn.question, 1)]).replace(
        one_pad, one_pad * found.picture.vision_tokens
    )
    assert texts(found, np.ones(len(found.ids), np.bool_)) == expected + turn.answer + "<|im_end|>"


def test_a_conversation_reads_as_the_chat_template_writes_it() -> None:
    first, second = QUESTIONS[:2]
    messages = [
        user_message(first.question, 1),
        {"role": "assistant", "content": first.answer},
        user_message(second.question, 0),
    ]
    expected = ChatTemplate(CHAT_TEMPLATE).render(messages)
    found = row([first, second])
    told = texts(found, np.ones(len(found.ids), np.bool_))
    one_pad = "<|image_pad|>"
    assert told.replace(one_pad * found.picture.vision_tokens, one_pad) == (
        expected + second.answer + "<|im_end|>"
    )


def test_labels_are_the_answers_and_nothing_else() -> None:
    found = row(*[[turn] for turn in QUESTIONS])
    labelled = found.labels != IGNORE
    assert texts(found, labelled) == "".join(f"{turn.answer}<|im_end|>" for turn in QUESTIONS)
    assert (found.labels[labelled] == found.ids[labelled]).all()
    assert ((found.weights > 0) == labelled).all()
    assert not labelled[found.ids == IDS.image].any()


def test_an_answer_weighs_the_square_root_of_its_length() -> None:
    found = row(*[[turn] for turn in QUESTIONS])
    for branch, turn in enumerate(QUESTIONS, start=1):
        length = len(encode(TOKENIZER, turn.answer + "<|im_end|>"))
        assert found.weights[found.branches == branch].sum() == pytest.approx(length**0.5)


def test_what_does_not_fit_is_left_out_whole() -> None:
    length = len(encode(TOKENIZER, question_text(QUESTIONS[1].question) + "Yes.<|im_end|>"))
    found = row([QUESTIONS[0]], [QUESTIONS[1]], max_tokens=length)
    assert set(found.branches) == {PREFIX, 1}
    assert texts(found, found.labels != IGNORE) == "Yes.<|im_end|>"


def test_the_mask_hides_other_questions_padding_and_the_future() -> None:
    mask = visible(np.array([[0, 0, 1, 1, 2, -1]]))[0, 0]
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_questions_in_one_row_answer_as_if_each_were_alone() -> None:
    """The claim of the row form: the logits of one question at a time, transformers' own way."""
    model = build_model(RECIPE, IDS).train(False)
    rows = [row(*[[turn] for turn in QUESTIONS], seed=seed) for seed in (0, 3)]
    batch = collate(rows, IDS)
    with torch.inference_mode():
        together = model(**batch.inputs).logits
        for place, found in enumerate(rows):
            for branch, turn in enumerate(QUESTIONS, start=1):
                alone = _alone(model, found, turn)
                mine = torch.from_numpy(np.flatnonzero(found.branches == branch))
                difference = (together[place, mine] - alone[-len(mine) :]).abs().max()
                assert difference < 2e-4


def _alone(model: torch.nn.Module, found: Row, turn: Turn) -> torch.Tensor:
    text = prompt_text(found.picture.vision_tokens) + question_text(turn.question)
    ids = torch.from_numpy(encode(TOKENIZER, f"{text}{turn.answer}<|im_end|>"))[None]
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IDS.image).int(),
        pixel_values=torch.from_numpy(found.picture.patches),
        image_grid_thw=torch.tensor([found.picture.grid]),
    ).logits
    return logits[0]


def test_the_loss_is_the_weighted_mean_over_labels() -> None:
    """Against a loop over tokens; and padding, prompts and images have no part in it."""
    rows = [row([QUESTIONS[0]]), row([QUESTIONS[1]], [QUESTIONS[2]], seed=1)]
    batch = collate(rows, IDS)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, batch.labels.shape[1], 8, generator=generator)
    head = torch.nn.Linear(8, 400)
    head.requires_grad_(False)
    total = weights = 0.0
    for place, found in enumerate(rows):
        for at in np.flatnonzero(found.labels != IGNORE):
            chances = torch.log_softmax(head(hidden[place, at - 1]), 0)
            total -= float(chances[found.labels[at]]) * float(found.weights[at])
            weights += float(found.weights[at])
    assert answer_loss(hidden, head, batch).item() == pytest.approx(total / weights, rel=1e-5)
