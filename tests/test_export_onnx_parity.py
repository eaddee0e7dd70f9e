"""The float32 graphs against transformers: logits of prefill and cached decode, greedy tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_host import CAPACITY, Conversation, Floats, Host, Prompt, Reference, make_prompt

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.export.onnx_decoder import DecoderPlan, Form
from medmo_edge.export.onnx_vision import VisionPlan

FORMS: tuple[Form, ...] = ("gqa", "scatter")
NEW_TOKENS = 5
# Logits spread over a few units; the difference is summation order.
TOLERANCE = 1e-4
Layout = Sequence[int | tuple[int, int]]
LAYOUTS: dict[str, Layout] = {
    "text alone": (7,),
    "one vision token": (3, (32, 32), 4),
    "square": (2, (96, 96), 5),
    "wide": (4, (32, 320), 3),
    "tall": (4, (256, 64), 3),
    "picture first": ((64, 128), 6),
    "picture last": (5, (160, 96)),
    "two sizes": (2, (64, 96), 3, (128, 32), 4),
    "three in a row": (1, (64, 64), (32, 96), (96, 32), 2),
    "not square in patches": (2, (96, 224), 2),
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def reference(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_untied_checkpoint: Path
) -> Reference:
    return Reference(tiny_checkpoint if request.param == "tied" else tiny_untied_checkpoint)


@pytest.fixture(scope="module", params=FORMS)
def host(
    request: pytest.FixtureRequest,
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> Host:
    plan = DecoderPlan(form=request.param, capacity=CAPACITY)
    return Host(reference.checkpoint, tmp_path_factory.mktemp("graphs"), plan)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_prefill_and_decode_are_those_of_transformers(
    layout: str, host: Host, reference: Reference
) -> None:
    prompt = make_prompt(reference.checkpoint, LAYOUTS[layout])
    talk, logits = host.prefill(prompt)
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        expected = reference.logits(prompt, tokens)[-1]
        np.testing.assert_allclose(logits[0, 0], expected, rtol=0, atol=TOLERANCE)
        tokens.append(int(expected.argmax()))
        assert int(logits[0, 0].argmax()) == tokens[-1]
        logits = host.decode(talk, tokens[-1])


def test_logits_of_every_row_and_prefill_in_chunks(
    host: Host, reference: Reference, tmp_path: Path
) -> None:
    """Chunks of 7 cut through a picture: deepstack and unequal rope rows in the middle of it."""
    prompt = make_prompt(reference.checkpoint, LAYOUTS["two sizes"])
    expected = reference.logits(prompt)
    plan = DecoderPlan(form=host.plan.form, capacity=CAPACITY, all_logits=True)
    every_row = Host(reference.checkpoint, tmp_path, plan)
    _, logits = every_row.prefill(prompt)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=TOLERANCE)
    _, logits = host.prefill(prompt, chunk=7)
    np.testing.assert_allclose(logits[0, 0], expected[-1], rtol=0, atol=TOLERANCE)


def test_a_padded_batch_of_unequal_lengths(host: Host, reference: Reference) -> None:
    """Right padding, then one decode step at different cache positions."""
    prompts = [make_prompt(reference.checkpoint, LAYOUTS[name]) for name in ("square", "wide")]
    logits, talk, deltas = prefill_batch(host, prompts)
    for prompt, row in zip(prompts, logits, strict=True):
        np.testing.assert_allclose(row[0], reference.logits(prompt)[-1], rtol=0, atol=TOLERANCE)
    tokens = [int(row[0].argmax()) for row in logits]
    lengths = [len(prompt.ids) for prompt in prompts]
    embeddings = host.embeddings[tokens][:, None]
    positions = np.add(lengths, deltas)[None, :, None].repeat(3, axis=0)
    levels = len(reference.checkpoint.config.vision.deepstack_indexes)
    nothing = np.zeros((levels, *embeddings.shape), np.float32)
    logits = host.step(talk, embeddings, nothing, positions, lengths, [0, 0])
    for prompt, token, row in zip(prompts, tokens, logits, strict=True):
        expected = reference.logits(prompt, [token])[-1]
        np.testing.assert_allclose(row[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_a_tower_of_the_8b_kind(form: Form, make_checkpoint: Any, tmp_path: Path) -> None:
    """Heads of 72 and an inner size that is no multiple of 32, as in the 8B tower."""
    vision = {"hidden_size": 144, "num_heads": 2, "intermediate_size": 304}
    reference = Reference(make_checkpoint(tmp_path / "c", vision=vision))
    host = Host(reference.checkpoint, tmp_path, DecoderPlan(form=form, capacity=CAPACITY))
    prompt = make_prompt(reference.checkpoint, LAYOUTS["wide"])
    _, logits = host.prefill(prompt)
    expected = reference.logits(prompt)[-1]
    np.testing.assert_allclose(logits[0, 0], expected, rtol=0, atol=TOLERANCE)


def prefill_batch(host: Host, prompts: list[Prompt]) -> tuple[Floats, Conversation, list[int]]:
    """One call with rows padded to the longest prompt: logits, cache, rope deltas."""
    parts = [host.embed(prompt) for prompt in prompts]
    longest = max(len(prompt.ids) for prompt in prompts)

    def pad(values: NDArray[Any], axis: int) -> NDArray[Any]:
        widths = [(0, 0)] * values.ndim
        widths[axis] = (0, longest - values.shape[axis])
        return np.pad(values, widths)

    talk = host.start(batch=len(prompts))
    logits = host.step(
        talk,
        np.stack([pad(part[0], 0) for part in parts]),
        np.stack([pad(part[1], 1) for part in parts], axis=1),
        np.stack([pad(part[2], 1) for part in parts], axis=1),
        [0] * len(prompts),
        [len(prompt.ids) - 1 for prompt in prompts],
    )
    return logits, talk, [part[3] for part in parts]


@pytest.mark.parametrize("form", FORMS)
def test_frames_of_one_grid_in_one_call_are_the_frames_alone(
    form: Form, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    plan = DecoderPlan(form=form, capacity=CAPACITY)
    host = Host(checkpoint, tmp_path, plan, VisionPlan(form=form))
    pictures = make_prompt(checkpoint, ((64, 96), (64, 96))).pictures
    alone = [host.encode(picture) for picture in pictures]
    features, levels = host.encode_many(pictures)
    for index, (one, deep) in enumerate(alone):
        np.testing.assert_allclose(features[index], one, rtol=0, atol=1e-5)
        np.testing.assert_allclose(levels[:, index], deep, rtol=0, atol=1e-5)
