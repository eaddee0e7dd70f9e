"""Prompts of a forward pass, and where in them images, positions and wanted logits are.

Only sizes and indexes: no weights, no torch. Building prompts from samples is in rendering.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medmo_edge.calibration.rows import Shapes
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import CalibrationError
from medmo_edge.preprocess import grid_thw, mrope_positions, num_vision_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One prompt: token ids with one image token per vision token, and its resized images.

    ``images`` are uint8 [H, W, 3] as ``preprocess.resize`` gives them. ``positions`` are the
    indexes whose next-token logits are wanted; None means the last one.
    """

    ids: Sequence[int]
    images: Sequence[NDArray[np.uint8]] = ()
    positions: Sequence[int] | None = None

    @property
    def wanted(self) -> list[int]:
        """``positions`` with the default filled in."""
        return [len(self.ids) - 1] if self.positions is None else list(self.positions)


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Image ``number`` of prompt ``prompt``: its patch grid (1, rows, columns) and its tokens."""

    prompt: int
    number: int
    grid: tuple[int, int, int]
    tokens: int


@dataclass(frozen=True)
class Layout:
    """The prompts of one pass over ``checkpoint``.

    Errors: CalibrationError without any prompt or token; PromptError when the image tokens of a
    prompt do not fit its images.
    """

    checkpoint: Checkpoint
    prompts: Sequence[Prompt]

    def __post_init__(self) -> None:
        if not self.prompts or not all(len(prompt.ids) for prompt in self.prompts):
            raise CalibrationError("nothing to run: there is no prompt, or one without tokens")
        for index in range(len(self.prompts)):
            self.rope_positions(index)

    @cached_property
    def images(self) -> tuple[ImagePlace, ...]:
        """Every image, in the order of prompts."""
        places = []
        for index, prompt in enumerate(self.prompts):
            for number, pixels in enumerate(prompt.images):
                grid = grid_thw(pixels.shape[0], pixels.shape[1], self.checkpoint.preprocessing)
                tokens = num_vision_tokens(grid, self.checkpoint.preprocessing)
                places.append(ImagePlace(index, number, grid, tokens))
        return tuple(places)

    @cached_property
    def of_prompt(self) -> tuple[tuple[int, ...], ...]:
        """Per prompt, the indexes of its images in ``images``."""
        own: list[list[int]] = [[] for _ in self.prompts]
        for index, image in enumerate(self.images):
            own[image.prompt].append(index)
        return tuple(tuple(indexes) for indexes in own)

    @cached_property
    def text_shapes(self) -> Shapes:
        """Hidden states of the language model, per prompt."""
        rows = [len(prompt.ids) for prompt in self.prompts]
        return Shapes(rows, self.checkpoint.config.text.hidden_size)

    @cached_property
    def vision_shapes(self) -> Shapes:
        """Hidden states of the vision tower, per image."""
        rows = [image.grid[1] * image.grid[2] for image in self.images]
        return Shapes(rows, self.checkpoint.config.vision.hidden_size)

    @cached_property
    def feature_shapes(self) -> Shapes:
        """One level of vision features, per image."""
        rows = [image.tokens for image in self.images]
        return Shapes(rows, self.checkpoint.config.vision.out_hidden_size)

    def is_image(self, prompt: int) -> NDArray[np.bool_]:
        """[L]: which tokens of a prompt stand for an image."""
        ids = np.asarray(self.prompts[prompt].ids, np.int64)
        return np.equal(ids, self.checkpoint.config.image_token_id)

    def rope_positions(self, prompt: int) -> NDArray[np.int64]:
        """M-RoPE positions [3, L] of a prompt."""
        config = self.checkpoint.config
        grids = [self.images[index].grid for index in self.of_prompt[prompt]]
        ids = self.prompts[prompt].ids
        return mrope_positions(ids, grids, config.image_token_id, config.vision.merge_size)[0]
