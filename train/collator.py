"""From scenes to tensors: one picture per row, several questions that do not see each other.

A row is the picture's prompt once, followed by branches. Every branch attends to the picture and to
itself only and starts at the same position, so each question is learned as if asked alone while the
picture is paid for once. Labels are on answers and their <|im_end|>, nothing else.

Suffixes: B rows, L tokens of a row, N patches of all pictures, P values of one patch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Geometry
from medmo_edge.preprocess import (
    Preprocessing,
    grid_thw,
    mrope_positions,
    num_vision_tokens,
    patchify,
    resize,
)
from medmo_edge.train.questions import Turn
from medmo_edge.train.vocabulary import (
    IMAGE,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    SpecialIds,
)

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

IGNORE = -100
PREFIX = 0  # branch number of the picture's prompt; questions count from 1, padding is -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """What the model sees of one scene: patches [N, P], their grid, and the sizes for its boxes."""

    patches: NDArray[np.float32]
    grid: tuple[int, int, int]
    geometry: Geometry
    vision_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """Token ids, labels, branch numbers and weights [L], positions [3, L], with their picture."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    branches: NDArray[np.int64]
    weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    picture: Picture


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Tensors of ``rows``; ``inputs`` are the model's arguments, labels and weights are [B, L]."""

    inputs: dict[str, Any]
    labels: "torch.Tensor"
    weights: "torch.Tensor"


def see(pixels: NDArray[np.uint8], limits: Preprocessing) -> Picture:
    """Resize and cut ``pixels`` [H, W, 3] as the checkpoint's processor will."""
    height, width = pixels.shape[:2]
    resized = resize(np.ascontiguousarray(pixels), limits)
    grid = grid_thw(resized.shape[0], resized.shape[1], limits)
    geometry = Geometry(
        width=width,
        height=height,
        frame_width=width,
        frame_height=height,
        resized_width=resized.shape[1],
        resized_height=resized.shape[0],
    )
    return Picture(
        patches=patchify(resized, limits),
        grid=grid,
        geometry=geometry,
        vision_tokens=num_vision_tokens(grid, limits),
    )


def prompt_text(vision_tokens: int) -> str:
    """The start of a user turn up to the question."""
    return f"{TURN_START}user\n{VISION_START}{IMAGE * vision_tokens}{VISION_END}"


def question_text(question: str) -> str:
    """The rest of the user turn and the start of the answer."""
    return f"{question}{TURN_END}\n{TURN_START}assistant\n"


def follow_up_text(question: str) -> str:
    """A second question in the same conversation."""
    return f"\n{TURN_START}user\n{question_text(question)}"


def encode_row(
    tokenizer: "Tokenizer",
    ids: SpecialIds,
    picture: Picture,
    conversations: Iterable[Sequence[Turn]],
    max_tokens: int,
    merge_size: int,
) -> Row:
    """A row with the ``conversations`` that fit ``max_tokens`` tokens; others are left out."""
    prefix = encode(tokenizer, prompt_text(picture.vision_tokens))
    positions, _ = mrope_positions(prefix.tolist(), [picture.grid], ids.image, merge_size)
    start = int(positions.max()) + 1
    pieces = [_Piece.silent(prefix, PREFIX, positions)]
    left = max_tokens
    for turns in conversations:
        tokens, labels, weights = encode_conversation(tokenizer, turns)
        if len(tokens) > left:
            continue
        left -= len(tokens)
        steps = np.tile(np.arange(start, start + len(tokens)), (3, 1))
        pieces.append(_Piece(tokens, labels, weights, len(pieces), steps))
    return Row(
        ids=np.concatenate([piece.ids for piece in pieces]),
        labels=np.concatenate([piece.labels for piece in pieces]),
        weights=np.concatenate([piece.weights for piece in pieces]),
        branches=np.concatenate([np.full(len(piece.ids), piece.branch) for piece in pieces]),
        positions=np.concatenate([piece.positions for piece in pieces], axis=1),
        picture=picture,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    branch: int
    positions: NDArray[np.int64]

    @classmethod
    def silent(cls, ids: NDArray[np.int64], branch: int, positions: NDArray[np.int64]) -> "_Piece":
        """A piece that nothing is learned from."""
        nothing = np.full(len(ids), IGNORE, np.int64)
        return cls(ids, nothing, np.zeros(len(ids), np.float32), branch, positions)


def encode(tokenizer: "Tokenizer", text: str) -> NDArray[np.int64]:
    """Token ids of ``text``, special tokens recognised."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


def encode_conversation(
    tokenizer: "Tokenizer", turns: Sequence[Turn]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Ids, labels and weights of the turns after the picture.

    An answer of n tokens weighs sqrt(n) in all: neither boxes nor a "Yes." drown the other.
    """
    ids, labels, weights = [], [], []
    for index, turn in enumerate(turns):
        asked = encode(tokenizer, (follow_up_text if index else question_text)(turn.question))
        told = encode(tokenizer, turn.answer + TURN_END)
        ids += [asked, told]
        labels += [np.full(len(asked), IGNORE), told]
        weights += [np.zeros(len(asked)), np.full(len(told), len(told) ** -0.5)]
    return (
        np.concatenate(ids),
        np.concatenate(labels).astype(np.int64),
        np.concatenate(weights).astype(np.float32),
    )


def visible(branches_BL: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Attention mask [B, 1, L, L]: oneself, and earlier tokens of the prefix and the own branch."""
    length = branches_BL.shape[1]
    query, key = branches_BL[:, :, None], branches_BL[:, None, :]
    causal = np.tril(np.ones((length, length), np.bool_))
    allowed = causal & ((key == PREFIX) | (key == query)) & (query >= 0)
    seen: NDArray[np.bool_] = (allowed | np.eye(length, dtype=np.bool_))[:, None]
    return seen


def collate(rows: Sequence[Row], ids: SpecialIds) -> Batch:
    """Rows of one batch, padded on the right."""
    import torch

    length = max(len(row.ids) for row in rows)
    tokens = np.stack([pad(row.ids, length, ids.end_of_text) for row in rows])
    branches = np.stack([pad(row.branches, length, -1) for row in rows])
    labels = np.stack([pad(row.labels, length, IGNORE) for row in rows])
    weights = np.stack([pad(row.weights, length, 0) for row in rows])
    positions = np.stack([pad(row.positions, length, 0) for row in rows], axis=1)
    inputs = {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": torch.from_numpy(visible(branches)),
        "position_ids": torch.from_numpy(np.concatenate([positions[:1], positions])),
        "pixel_values": torch.from_numpy(np.concatenate([row.picture.patches for row in rows])),
        "image_grid_thw": torch.tensor([row.picture.grid for row in rows]),
    }
    return Batch(inputs=inputs, labels=torch.from_numpy(labels), weights=torch.from_numpy(weights))


def pad(values: NDArray[Any], length: int, filler: int) -> NDArray[Any]:
    """``values`` [..., L] with ``filler`` behind them, [..., length]."""
    missing = length - values.shape[-1]
    edges = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
    return np.pad(values, edges, constant_values=filler)
