"""Samples to rows: several samples of any length share one row and do not see each other.

Exact: a row's loss is the one its samples would have had alone, summed over answer tokens. That
takes position ids of shape [4, 1, L] (row 0 counts from 0 in every sample, rows 1 to 3 are M-RoPE),
no attention mask and no key-value cache; with any of these wrong samples leak into each other
without an error. It chooses no samples (``mixture``) and runs no model.

Suffixes: L tokens, N patches of all pictures, P values of one patch, I pictures, T vision tokens,
D feature sets (main and deepstack), W the language model's width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Coords, Geometry
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ImageError, PromptError, SampleError
from medmo_edge.evaluation.models import geometry_of
from medmo_edge.images import Frame, Source, read_image
from medmo_edge.preprocess import (
    Preprocessing,
    grid_thw,
    mrope_positions,
    num_vision_tokens,
    patchify,
    resize,
)
from medmo_edge.prompts import ChatTemplate
from medmo_edge.samples import Sample, target_text
from medmo_edge.tokenizer import Tokenizer
from medmo_edge.train.vocabulary import IMAGE, TURN_END

if TYPE_CHECKING:
    import torch

IGNORE = -100  # the label of tokens that nothing is learned from


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """How a checkpoint writes conversations: its tokenizer and its template."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Chat":
        """The chat of an opened checkpoint. Errors: CheckpointError."""
        template = ChatTemplate(checkpoint.chat_template)
        return cls(tokenizer=checkpoint.load_tokenizer(), template=template)

    @property
    def image_token(self) -> int:
        """Id of the token that stands for a vision token."""
        return self.tokenizer.special_ids[IMAGE]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """One sample as numbers: ids and labels [L], positions [3, L], patches [N, P], grids of I.

    ``tokens`` is L. Labels are those of ``ids``, not shifted; the model shifts them. ``features``
    [D, T, W] are the pictures' vision features from a ``vision_cache``, instead of patches.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    patches: NDArray[np.float32]
    grids: tuple[tuple[int, int, int], ...]
    geometries: tuple[Geometry, ...]
    sample_id: str
    task: str
    tokens: int
    image_token: int
    merge_size: int
    features: "torch.Tensor | None" = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRow:
    """One row for the model: see ``model_inputs`` for its arguments.

    ``inputs``: input_ids [1, L], position_ids [4, 1, L], and pixel_values [N, P] with
    image_grid_thw [I, 3], or vision_features [D, T, W]. ``labels`` are [1, L]. ``tokens`` counts
    those of samples (a dummy picture's is none), ``answer_tokens`` those that are learned: the sum
    to divide a token-mean loss by.
    """

    inputs: dict[str, "torch.Tensor"]
    labels: "torch.Tensor"
    sample_ids: tuple[str, ...]
    tokens: int
    answer_tokens: int


def encode_sample(
    sample: Sample,
    chat: Chat,
    limits: Preprocessing,
    coords: Coords,
    *,
    row_tokens: int | None = None,
    source: Path | None = None,
    frames: Sequence[Frame] | None = None,
    answered: bool = True,
) -> Encoded:
    """A sample as numbers; labels are on assistant texts and their ``<|im_end|>`` only.

    ``answered`` False ends with the prompt of the last question, for rollouts. ``frames`` are the
    pictures where they are read already, boxes being in their pixels. Errors: SampleError with
    ``source``:line for a picture that is missing, a box outside it, text with control tokens, no
    answer, or more than ``row_tokens`` tokens.
    """
    with named(sample, source):
        shown = [read_image(path) for path in sample.images] if frames is None else frames
        geometries = [geometry_of(frame, limits) for frame in shown]
    outline = outline_sample(
        sample,
        geometries,
        chat,
        limits,
        coords,
        row_tokens=row_tokens,
        source=source,
        answered=answered,
    )
    return replace(outline, patches=see(shown, limits))


def outline_sample(
    sample: Sample,
    geometries: Sequence[Geometry],
    chat: Chat,
    limits: Preprocessing,
    coords: Coords,
    *,
    row_tokens: int | None = None,
    source: Path | None = None,
    answered: bool = True,
) -> Encoded:
    """``encode_sample`` without pixels, from the sizes of the pictures alone: no patches yet.

    Errors: SampleError as there.
    """
    with named(sample, source):
        check_boxes(sample, geometries)
        grids = tuple(grid_thw(g.resized_height, g.resized_width, limits) for g in geometries)
        counts = [num_vision_tokens(grid, limits) for grid in grids]
        answer = _wanted(sample, geometries, coords) if answered else None
        ids, labels = _tokens(conversation(sample, answer), chat, counts)
        _check_length(len(ids), sum(counts), row_tokens)
    positions, _ = mrope_positions(ids.tolist(), grids, chat.image_token, limits.merge_size)
    return Encoded(
        ids=ids,
        labels=labels if answered else np.full_like(ids, IGNORE),
        positions=positions,
        patches=see((), limits),
        grids=grids,
        geometries=tuple(geometries),
        sample_id=sample.id,
        task=sample.task,
        tokens=len(ids),
        image_token=chat.image_token,
        merge_size=limits.merge_size,
    )


def _wanted(sample: Sample, geometries: Sequence[Geometry], coords: Coords) -> str:
    answer = target_text(sample, geometries, coords)
    if not answer.strip():
        raise SampleError("its answer is empty: write what is wanted")
    return answer


@contextmanager
def named(sample: Sample, source: Path | None) -> Iterator[None]:
    """Whatever is wrong inside becomes a SampleError that says where the sample stands."""
    where = f"{source}:{sample.line}" if source else f"sample {sample.id!r}"
    try:
        yield
    except (ImageError, PromptError, SampleError) as error:
        raise SampleError(f"{where}: {error}") from error


def check_boxes(sample: Sample, sizes: Sequence[Geometry | Source]) -> None:
    """Errors: SampleError when a box is not inside its picture; ``sizes`` has one per picture."""
    for box in sample.boxes:
        size = sizes[box.image]
        if box.x2 > size.width or box.y2 > size.height:
            raise SampleError(
                f"box {list(box.xyxy)} reaches outside its image of {size.width} x {size.height} "
                "pixels: correct it or cut it at the edge"
            )


def _check_length(tokens: int, vision: int, row_tokens: int | None) -> None:
    if row_tokens is not None and tokens > row_tokens:
        raise SampleError(
            f"the sample needs {tokens} tokens ({vision} of its images) and a row holds "
            f"{row_tokens}: raise row_tokens or lower max_pixels in the recipe"
        )


def conversation(sample: Sample, answer: str | None) -> list[dict[str, Any]]:
    """The messages with ``answer`` as the last one; images that no message shows come first.

    Without an answer they end with the last question.
    """
    last = len(sample.messages) - (sample.messages[-1]["role"] == "assistant")
    messages = list(sample.messages[:last])
    if sample.images and not any(map(_shows_image, messages)):
        content = messages[0]["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content
        images = [{"type": "image"} for _ in sample.images]
        messages[0] = {**messages[0], "content": [*images, *text]}
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def _shows_image(message: dict[str, Any]) -> bool:
    content = message["content"]
    return not isinstance(content, str) and any(part["type"] == "image" for part in content)


def _tokens(
    messages: Sequence[dict[str, Any]], chat: Chat, counts: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and labels. Texts are cut where an answer begins and ends, as they are when one is given.

    Errors: PromptError, SampleError.
    """
    for message in messages:
        _check_texts(message, chat.tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    left = list(counts)
    for text, is_answer in _pieces(messages, chat.template):
        new = chat.tokenizer.encode(_with_vision(text, left))
        ids += new
        labels += new if is_answer else [IGNORE] * len(new)
    if left:
        raise PromptError(f"conversation shows {len(counts) - len(left)} of {len(counts)} images")
    return np.asarray(ids, np.int64), np.asarray(labels, np.int64)


def _check_texts(message: dict[str, Any], tokenizer: Tokenizer) -> None:
    """A label that spells a control token would end the turn or stand for a picture."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] == "text" and (found := tokenizer.control_tokens_in(part["text"])):
            raise SampleError(f"its text contains the control token {found[0]}: remove it")


def _pieces(messages: Sequence[dict[str, Any]], template: ChatTemplate) -> list[tuple[str, bool]]:
    """The conversation's text, cut into what is given and what is learned, in turns."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = template.render(messages[:index])
        told = template.render(messages[: index + 1], add_generation_prompt=False)
        end = told.find(TURN_END, len(asked)) + len(TURN_END)
        if not (asked.startswith(done) and told.startswith(asked) and end > len(asked)):
            raise PromptError(
                "chat template does not continue a prompt with the answer and its <|im_end|>: "
                "training needs one that does"
            )
        pieces += [(asked[len(done) :], False), (told[len(asked) : end], True)]
        done = told[:end]
    if messages[-1]["role"] != "assistant":
        pieces.append((template.render(messages)[len(done) :], False))
    return pieces


def _with_vision(text: str, counts: list[int]) -> str:
    """``text`` with every image token repeated; takes what it uses from the front of ``counts``."""
    first, *others = text.split(IMAGE)
    if len(others) > len(counts):
        raise PromptError(f"conversation shows {len(others)} images where {len(counts)} are left")
    for piece in others:
        first += IMAGE * counts.pop(0) + piece
    return first


def see(frames: Sequence[Frame], limits: Preprocessing) -> NDArray[np.float32]:
    """Patches [N, P] of all frames in order; [0, P] without any."""
    if frames:
        return np.concatenate([patchify(resize(frame.pixels, limits), limits) for frame in frames])
    return np.zeros((0, 3 * limits.temporal_patch_size * limits.patch_size**2), np.float32)


def pack(encoded: Sequence[Encoded], dummy_image: bool = True) -> PackedRow:
    """One row of at least one sample, in their order.

    ``dummy_image``: a row without pictures gets one of a single vision token, which nothing sees
    and nothing is learned from, so that the vision tower runs on every device in every step.
    """
    import torch

    parts = list(encoded)
    if dummy_image and not any(one.grids for one in parts):
        first = parts[0]
        parts.append(_dummy(first.image_token, first.merge_size, first.patches.shape[1]))
    labels = np.concatenate([_first_ignored(one.labels) for one in parts])
    counted = np.concatenate([np.arange(one.tokens) for one in parts])
    positions = np.concatenate([one.positions for one in parts], axis=1)
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate([one.ids for one in parts])[None]),
        "position_ids": torch.from_numpy(np.concatenate([counted[None], positions])[:, None]),
    }
    grids = [grid for one in parts for grid in one.grids]
    features = [one.features for one in parts if one.features is not None]
    if features:
        inputs["vision_features"] = torch.cat(features, dim=1)
    elif grids:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([one.patches for one in parts]))
        inputs["image_grid_thw"] = torch.tensor(grids)
    return PackedRow(
        inputs=inputs,
        labels=torch.from_numpy(labels[None]),
        sample_ids=tuple(one.sample_id for one in encoded),
        tokens=sum(one.tokens for one in encoded),
        answer_tokens=int((labels != IGNORE).sum()),
    )


def idle_row(chat: Chat, limits: Preprocessing, dummy_image: bool = True) -> PackedRow:
    """A row without any sample, for a device that has none left: its summed loss is 0."""
    dummy = _dummy(chat.image_token, limits.merge_size, see((), limits).shape[1])
    if not dummy_image:
        dummy = replace(dummy, grids=())
    return replace(pack([dummy], dummy_image=False), sample_ids=(), tokens=0)


def _first_ignored(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The shift would have a sample's first token predicted from the sample before it."""
    return np.concatenate([[IGNORE], labels[1:]]).astype(np.int64)


def _dummy(image_token: int, merge: int, width: int) -> Encoded:
    """A grey picture of one vision token that is a sample of its own; ``width`` is P."""
    return Encoded(
        ids=np.array([image_token]),
        labels=np.array([IGNORE]),
        positions=np.zeros((3, 1), np.int64),
        patches=np.zeros((merge**2, width), np.float32),
        grids=((1, merge, merge),),
        geometries=(),
        sample_id="",
        task="",
        tokens=1,
        image_token=image_token,
        merge_size=merge,
    )


def model_inputs(row: PackedRow, device: "torch.device | str | None" = None) -> dict[str, Any]:
    """The model's keyword arguments, on ``device``; labels are not among them.

    ``use_cache`` is False: with a cache the samples of a row would see each other.
    """
    inputs: dict[str, Any] = {
        name: value.to(device) if device is not None else value
        for name, value in row.inputs.items()
    }
    if (features := inputs.pop("vision_features", None)) is not None:
        image = SimpleNamespace(
            pooler_output=(features[0],), deepstack_features=[(level,) for level in features[1:]]
        )
        inputs["mm_encoder_outputs"] = {"image": image}
    return inputs | {"use_cache": False}


def row_loss(
    model: Any, row: PackedRow, device: "torch.device | str | None" = None
) -> "torch.Tensor":
    """Cross entropy summed over the row's answer tokens, in float32; 0 for an ``idle_row``.

    Logits are made where an answer token is wanted and nowhere else. Divide by the answer tokens
    of the whole step, over all rows and devices, for the mean per token.
    """
    import torch

    labels = row.labels[0].to(device) if device is not None else row.labels[0]
    places = torch.nonzero(labels[1:] != IGNORE)[:, 0]
    logits = model(**model_inputs(row, device), logits_to_keep=places).logits[0]
    wanted = labels[1:][places]
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
