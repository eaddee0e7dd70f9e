"""Groups of answers against the plain forward pass and transformers' own generation."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from rl_samples import rl_mixture, tiny_rl_stage, write_rl_samples

from medmo_edge.errors import UsageError
from medmo_edge.samples import Sample
from medmo_edge.train.attention import use_library, use_products
from medmo_edge.train.base_model import Base, load_base
from medmo_edge.train.branches import branch_row, collate_branches, split_rows
from medmo_edge.train.packing import Chat, Encoded, encode_sample
from medmo_edge.train.rollouts import (
    Answer,
    Decoding,
    choose,
    entropy_of,
    sample_groups,
    scaled_log_probs,
    uniforms,
)


@pytest.fixture(scope="module")
def base(tiny_untied_checkpoint: Path) -> Base:
    """Three deepstack levels and an untied head."""
    return load_base(tiny_untied_checkpoint, precision="float32")


@pytest.fixture(scope="module")
def prompts(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Encoded]:
    """Six prompts of three lengths."""
    folder = tmp_path_factory.mktemp("rl")
    write_rl_samples(folder)
    mixture = rl_mixture(base, tiny_rl_stage(), folder)
    chat = Chat(tokenizer=base.tokenizer, template=base.template)
    samples = [sample for step in range(3) for sample in mixture.samples(step, 0, 1)]
    return [
        encode_sample(sample, chat, mixture.limits, base.coords, answered=False)
        for sample in samples
    ]


def decoding(base: Base, **changes: Any) -> Decoding:
    """Four answers of up to ten tokens; a few common tokens end them, so that lengths differ."""
    ends = tuple(range(60, 110))
    values = Decoding(
        num_generations=4,
        max_new_tokens=10,
        temperature=1.0,
        ends=ends,
        suppressed=(base.config.image_token_id, base.config.video_token_id),
    )
    return dataclasses.replace(values, **changes)


def answers(
    base: Base, prompts: Sequence[Encoded], how: Decoding, chunk: int = 16, step: int = 0
) -> list[list[Answer]]:
    random = uniforms(1, step, 0, len(prompts), how)
    return sample_groups(base.model, prompts, how, random, chunk=chunk, precision=nullcontext)


def plain_logits(base: Base, prompt: Encoded, ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] that predict ``ids`` after the prompt, by one plain call for one sequence."""
    row = torch.tensor([[*prompt.ids.tolist(), *ids]])
    with torch.no_grad():
        output = base.model(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            mm_token_type_ids=(row == base.config.image_token_id).int(),
            pixel_values=torch.from_numpy(prompt.patches),
            image_grid_thw=torch.tensor(prompt.grids),
        )
    logits: torch.Tensor = output.logits[0, prompt.tokens - 1 : -1]
    return logits


def picked(log_probs: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    return log_probs.gather(-1, torch.tensor(ids)[:, None])[:, 0]


def test_log_probabilities_are_those_of_the_whole_forward_pass(
    base: Base, prompts: list[Encoded]
) -> None:
    how = decoding(base, temperature=0.7)
    groups = answers(base, prompts, how)
    lengths = {len(answer.ids) for group in groups for answer in group}
    assert len(lengths) > 2  # some ended early, some were cut
    for prompt, group in zip(prompts, groups, strict=True):
        for answer in group:
            logits = plain_logits(base, prompt, answer.ids)
            known = scaled_log_probs(logits, 0.7, how.suppressed)
            expected = picked(known, answer.ids)
            np.testing.assert_allclose(answer.log_probs, expected, atol=2e-5)
            assert answer.entropy == pytest.approx(float(entropy_of(known).mean()), abs=1e-5)


def test_an_answer_ends_with_its_end_or_is_truncated(base: Base, prompts: list[Encoded]) -> None:
    how = decoding(base)
    for group in answers(base, prompts, how):
        for answer in group:
            assert not set(answer.ids[:-1]) & set(how.ends)
            assert answer.truncated == (answer.ids[-1] not in how.ends)
            assert not answer.truncated or len(answer.ids) == how.max_new_tokens
            assert not set(answer.ids) & set(how.suppressed)


def test_the_numbers_decide_not_the_batch(base: Base, prompts: list[Encoded]) -> None:
    """Drawn again, in other company, and as the first half of a larger step: the same answers."""
    how = decoding(base)
    whole = [[answer.ids for answer in group] for group in answers(base, prompts, how)]
    single = [[answer.ids for answer in group] for group in answers(base, prompts, how, chunk=1)]
    part = [[answer.ids for answer in group] for group in answers(base, prompts[:3], how)]
    other = [[answer.ids for answer in group] for group in answers(base, prompts, how, step=1)]
    assert whole == single
    assert whole[:3] == part
    assert whole != other
    assert len(set(whole[0])) > 1  # the answers of a group are drawn apart


def test_greedy_answers_are_those_of_generate(base: Base, prompts: list[Encoded]) -> None:
    """Without ends among the common tokens, transformers' generate says the same."""
    ends = tuple(base.config.eos_token_ids)
    how = decoding(base, num_generations=1, temperature=0.0, ends=ends)
    for prompt, (answer,) in zip(prompts, answers(base, prompts, how), strict=True):
        row = torch.from_numpy(prompt.ids)[None]
        model: Any = base.model
        tokens = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            mm_token_type_ids=(row == base.config.image_token_id).int(),
            pixel_values=torch.from_numpy(prompt.patches),
            image_grid_thw=torch.tensor(prompt.grids),
            max_new_tokens=10,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            suppress_tokens=list(how.suppressed),
        )
        assert answer.ids == tuple(tokens[0, prompt.tokens :].tolist())


def test_both_attentions_give_the_same(base: Base, prompts: list[Encoded]) -> None:
    how = decoding(base)
    expected = answers(base, prompts[:2], how)
    use_products(base.model)
    try:
        found = answers(base, prompts[:2], how)
    finally:
        use_library(base.model)
    for group, other in zip(expected, found, strict=True):
        for answer, same in zip(group, other, strict=True):
            assert answer.ids == same.ids
            np.testing.assert_allclose(answer.log_probs, same.log_probs, atol=1e-4)


def test_prompts_without_pictures_are_asked_alike(base: Base) -> None:
    """The picture that keeps the vision tower running is seen by nothing."""
    chat = Chat(tokenizer=base.tokenizer, template=base.template)
    words = ["Is there a nodule?", "Describe the lung, left and right."]
    asked = [
        encode_sample(
            Sample(id=text, task="text_qa", messages=[{"role": "user", "content": text}]),
            chat,
            base.limits,
            base.coords,
            answered=False,
        )
        for text in words
    ]
    for prompt, group in zip(asked, answers(base, asked, decoding(base)), strict=True):
        for answer in group:
            row = torch.tensor([[*prompt.ids.tolist(), *answer.ids]])
            with torch.no_grad():
                logits = base.model(input_ids=row).logits[0, prompt.tokens - 1 : -1]
            known = scaled_log_probs(logits, 1.0, decoding(base).suppressed)
            np.testing.assert_allclose(answer.log_probs, picked(known, answer.ids), atol=2e-5)


def test_an_attention_without_masks_is_refused(base: Base, prompts: list[Encoded]) -> None:
    text: Any = base.model.model.language_model.config
    text._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(UsageError, match="flash_attention_2.*load the model with sdpa"):
            collate_branches([branch_row(prompts[0])], base.model)
    finally:
        text._attn_implementation = "sdpa"


def test_a_row_of_branches_is_its_answers_alone(base: Base, prompts: list[Encoded]) -> None:
    """Several answers to several prompts in one padded batch predict what each does alone."""
    told = [[[5, 9, 7], [8], [200, 100, 3, 4]], [[11, 12]], [[13], [14, 15, 16]]]
    owners = [[0, 1, 2], [3], [4, 5]]
    rows = [branch_row(*row) for row in zip(prompts, told, owners, strict=False)]
    batch = collate_branches(rows, base.model)
    with torch.no_grad():
        output = base.model(**batch.inputs, logits_to_keep=batch.columns, use_cache=False)
    logits = output.logits[batch.rows, batch.picks]
    at = 0
    for prompt, group in zip(prompts, told, strict=False):
        for answer in group:
            mine = logits[at : at + len(answer)]
            np.testing.assert_allclose(mine, plain_logits(base, prompt, answer), atol=2e-4)
            at += len(answer)
    assert batch.owners.tolist() == [0] * 3 + [1] + [2] * 4 + [3] * 2 + [4] + [5] * 3
    assert batch.targets.tolist() == [id for group in told for answer in group for id in answer]


def test_rows_are_split_where_they_would_be_too_long(prompts: list[Encoded]) -> None:
    prompt = prompts[0]
    told = [[1, 2, 3], [4, 5, 6], [7], list(range(100))]
    rows = split_rows(prompt, told, [0, 1, 2, 3], prompt.tokens + 4)
    assert [row.owners.tolist() for row in rows] == [[0] * 3 + [1] * 3 + [2], [3] * 100]
    assert [len(row.ids) - prompt.tokens for row in rows] == [4, 99]


def test_numbers_choose_by_quantiles() -> None:
    """Probabilities 0.5, 0 (suppressed), 0.25, 0.25: 0.49 is token 0, 0.5 token 2, 0.76 token 3."""
    logits = torch.log(torch.tensor([0.4, 0.2, 0.2, 0.2]))
    how = Decoding(num_generations=1, max_new_tokens=1, temperature=1.0, ends=(9,), suppressed=(1,))
    random = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 1e-12], dtype=torch.float64)
    chosen, log_probs, entropy = choose(logits.expand(6, -1), random, how)
    assert chosen.tolist() == [0, 0, 2, 2, 3, 3]
    np.testing.assert_allclose(log_probs.exp(), [0.5, 0.5, 0.25, 0.25, 0.25, 0.25], atol=1e-6)
    assert float(entropy[0]) == pytest.approx(1.5 * np.log(2), abs=1e-6)
