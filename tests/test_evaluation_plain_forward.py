"""The plain forward pass against transformers in float32, on random and trained weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.evaluation.plain_forward import Outputs, Prompt, forward
from medmo_edge.phantoms import draw
from medmo_edge.preprocess import grid_thw, num_vision_tokens, patchify, resize
from medmo_edge.prompts import ChatTemplate, encode_prompt, user_message

torch = pytest.importorskip("torch", reason="needs the train extra")
transformers = pytest.importorskip("transformers", reason="needs the train extra")

Pixels = NDArray[np.uint8]


def prompt_of(checkpoint: Checkpoint, images: list[Pixels]) -> Prompt:
    """A question about the images, as the runtime would put it."""
    settings = checkpoint.preprocessing
    resized = [resize(image, settings) for image in images]
    grids = [grid_thw(r.shape[0], r.shape[1], settings) for r in resized]
    counts = [num_vision_tokens(grid, settings) for grid in grids]
    template = ChatTemplate(checkpoint.chat_template)
    messages = [user_message("Locate the nodule.", len(images))]
    ids = encode_prompt(checkpoint.load_tokenizer(), template, messages, counts, "<|image_pad|>")
    return Prompt(ids=ids, images=resized)


def reference(checkpoint: Checkpoint, prompts: list[Prompt]) -> list[Outputs]:
    """The same with transformers; logits at every position."""
    model: Any = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        checkpoint.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt.ids)])
        inputs = {"input_ids": ids}
        rows: tuple[NDArray[np.float32], ...] = ()
        if prompt.images:
            settings = checkpoint.preprocessing
            sizes = [image.shape[:2] for image in prompt.images]
            grids = torch.tensor([grid_thw(height, width, settings) for height, width in sizes])
            patches = torch.tensor(np.concatenate([patchify(i, settings) for i in prompt.images]))
            kinds = (ids == model.config.image_token_id).int()
            inputs |= {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": kinds}
            with torch.no_grad():
                seen = model.model.visual(patches, grid_thw=grids)
            joined = torch.cat([seen.pooler_output, *seen.deepstack_features], dim=1)
            counts = [num_vision_tokens(grid, settings) for grid in grids.tolist()]
            rows = tuple(part.numpy() for part in joined.split(counts))
        with torch.no_grad():
            logits = model(**inputs).logits[0].numpy()
        found.append(Outputs(vision=rows, logits=logits))
    return found


def test_the_pass_equals_transformers_for_several_prompts_at_once(
    tiny_untied_checkpoint: Path,
) -> None:
    """Untied head, three deepstack levels, three shards; two images, one image, none."""
    wide, tall = draw(1, size=(300, 90)).pixels, draw(2, size=(70, 200)).pixels
    colour = [np.repeat(pixels[:, :, None], 3, axis=2) for pixels in (wide, tall)]
    with open_checkpoint(tiny_untied_checkpoint) as checkpoint:
        prompts = [prompt_of(checkpoint, images) for images in (colour, colour[1:], [])]
        ours = forward(checkpoint, prompts, [4, 1, 2])
        theirs = reference(checkpoint, prompts)
    for one, other, count in zip(ours, theirs, (4, 1, 2), strict=True):
        assert one.logits.shape[0] == count
        np.testing.assert_allclose(one.logits, other.logits[-count:], atol=2e-4)
        assert len(one.vision) == len(other.vision)
        for features, expected in zip(one.vision, other.vision, strict=True):
            np.testing.assert_allclose(features, expected, atol=2e-4)


def test_the_pass_equals_transformers_on_trained_weights() -> None:
    pixels = np.repeat(draw(3, size=(256, 320)).pixels[:, :, None], 3, axis=2)
    done: list[tuple[int, int]] = []
    with open_checkpoint("nano") as checkpoint:
        prompts = [prompt_of(checkpoint, [pixels])]
        (ours,) = forward(checkpoint, prompts, [1], lambda *state: done.append(state))
        (theirs,) = reference(checkpoint, prompts)
    np.testing.assert_allclose(ours.logits, theirs.logits[-1:], atol=1e-4)
    np.testing.assert_allclose(ours.vision[0], theirs.vision[0], atol=2e-4)
    assert done[-1] == (8, 8)
