"""A checkpoint asked through transformers: the reference that artifacts are compared with.

Tokenizer, chat template, resize, patches and box parsing are ours, the same as in the runtime; the
network and its positions are transformers' own. Requests of equal prompt length and picture sizes
share a batch, so nothing is ever padded. It knows no sampling, no streaming and no timeout.
"""

import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Parsed, parse_boxes
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import UsageError
from medmo_edge.evaluation.models import BATCH, MAX_NEW_TOKENS, ModelAnswer, Request
from medmo_edge.images import Frame
from medmo_edge.preprocess import grid_thw, patchify
from medmo_edge.prompts import ChatTemplate
from medmo_edge.runtime.chat import Chat, Picture
from medmo_edge.runtime.device import probe

IMAGE_TOKEN = "<|image_pad|>"
_BYTES = {"float32": 4, "bfloat16": 2}


def chat_of(checkpoint: Checkpoint) -> Chat:
    """The same prompts and parsing as an artifact of ``checkpoint`` has."""
    return Chat(
        tokenizer=checkpoint.load_tokenizer(),
        template=ChatTemplate(checkpoint.chat_template),
        preprocessing=checkpoint.preprocessing,
        coords=checkpoint.coords,
        image_token=IMAGE_TOKEN,
        image_token_id=checkpoint.config.image_token_id,
        vision_end_token_id=checkpoint.config.vision_end_token_id,
        eos_token_ids=checkpoint.config.eos_token_ids,
    )


class TransformersModel:
    """One loaded checkpoint; see ``Model`` for the methods."""

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Errors: CheckpointError; UsageError without transformers, for dtype, or little memory."""
        if dtype not in _BYTES:
            raise UsageError(f"dtype {dtype!r} is unknown: use {' or '.join(_BYTES)}")
        torch, transformers = _libraries()
        _check_device(torch, device)
        with open_checkpoint(checkpoint) as opened:
            _check_memory(opened, dtype, device)
            self._identity = {
                "kind": "checkpoint",
                **opened.identity(),
                "coords": opened.coords,
                "dtype": dtype,
                "device": device,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            }
            self.chat = chat_of(opened)
            folder, self.name = opened.path, opened.name
        self.coords, self.preprocessing = self.chat.coords, self.chat.preprocessing
        self._device = device
        if threads is not None:
            torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()  # ours counts questions
        loader = transformers.Qwen3VLForConditionalGeneration
        self.network: Any = loader.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.network = self.network.train(False).to(device)

    def answer(
        self, frames: Sequence[Frame], question: str, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> ModelAnswer:
        """See ``Model``."""
        request = Request(frames=tuple(frames), question=question, max_new_tokens=max_new_tokens)
        ((_, answer),) = self.answer_all([request])
        return answer

    def answer_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, ModelAnswer]]:
        """See ``Model``; like requests share a batch."""
        seen: dict[int, list[Picture]] = {}
        groups: dict[tuple[Any, ...], list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            pictures = [self.chat.picture(frame) for frame in request.frames]
            ids, rest = self.chat.prompt(
                request.question, pictures, image_texts=request.image_texts
            )
            shapes = tuple(picture.resized_HWC.shape for picture in pictures)
            key = (len(ids) + len(rest), shapes, request.max_new_tokens)
            groups.setdefault(key, []).append((index, ids + rest))
            seen[index] = pictures
        for (_, _, max_new_tokens), members in groups.items():
            for start in range(0, len(members), BATCH):
                chunk = members[start : start + BATCH]
                pictures_of = [seen[index] for index, _ in chunk]
                answers = self._generate([ids for _, ids in chunk], pictures_of, max_new_tokens)
                yield from zip((index for index, _ in chunk), answers, strict=True)

    def inputs(
        self, ids: Sequence[Sequence[int]], pictures: Sequence[Sequence[Picture]]
    ) -> dict[str, Any]:
        """The network's arguments for prompts of one length: [B, L] ids with their pictures."""
        torch, _ = _libraries()
        prompt = torch.tensor([list(row) for row in ids])
        values: dict[str, Any] = {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "mm_token_type_ids": (prompt == self.chat.image_token_id).int(),
        }
        shown = [picture for row in pictures for picture in row]
        if shown:
            patches = np.concatenate([self._patches(picture) for picture in shown])
            values["pixel_values"] = torch.from_numpy(patches).to(self.network.dtype)
            values["image_grid_thw"] = torch.tensor([self._grid(picture) for picture in shown])
        return {name: value.to(self._device) for name, value in values.items()}

    def _generate(
        self,
        ids: Sequence[Sequence[int]],
        pictures: Sequence[Sequence[Picture]],
        max_new_tokens: int,
    ) -> list[ModelAnswer]:
        torch, transformers = _libraries()
        chat, start = self.chat, time.perf_counter()
        unused = range(chat.tokenizer.length, self.network.config.text_config.vocab_size)
        settings = transformers.GenerationConfig(
            do_sample=False,  # nothing of the checkpoint's own sampling settings
            max_new_tokens=max_new_tokens,
            eos_token_id=list(chat.eos_token_ids),
            pad_token_id=chat.eos_token_ids[0],
            suppress_tokens=list(unused) or None,
        )
        with torch.inference_mode():
            tokens = self.network.generate(**self.inputs(ids, pictures), generation_config=settings)
        rows = tokens[:, len(ids[0]) :].tolist()
        share = (time.perf_counter() - start) / len(rows)
        return [
            self._read(row, pictures[index], share, max_new_tokens, len(ids[0]))
            for index, row in enumerate(rows)
        ]

    def _read(
        self,
        row: Sequence[int],
        pictures: Sequence[Picture],
        seconds: float,
        max_new_tokens: int,
        prompt_tokens: int,
    ) -> ModelAnswer:
        ends = [at for at, token in enumerate(row) if token in self.chat.eos_token_ids]
        said = list(row[: ends[0]] if ends else row)
        text = self.chat.tokenizer.decode(said)
        geometries = [picture.geometry for picture in pictures]
        parsed = parse_boxes(text, geometries, self.coords) if geometries else Parsed((), ())
        return ModelAnswer(
            text=text,
            boxes=parsed.boxes,
            rejected_boxes=parsed.rejected,
            seconds=seconds,
            decode_seconds=0.0,
            new_tokens=len(said),
            prompt_tokens=prompt_tokens,
            finish_reason="stop" if ends or len(said) < max_new_tokens else "length",
        )

    def _patches(self, picture: Picture) -> NDArray[np.float32]:
        return patchify(picture.resized_HWC, self.preprocessing)

    def _grid(self, picture: Picture) -> tuple[int, int, int]:
        height, width = picture.resized_HWC.shape[:2]
        return grid_thw(height, width, self.preprocessing)

    def identity(self) -> dict[str, Any]:
        """See ``Model``."""
        return dict(self._identity)

    def close(self) -> None:
        """See ``Model``."""
        self.network = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _libraries() -> tuple[Any, Any]:
    """torch and transformers, untyped: their own annotations stop at half of what is called."""
    try:
        return import_module("torch"), import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "asking a checkpoint needs torch and transformers: install medmo-edge[train], or "
            "export the checkpoint and give the artifact"
        ) from error


def _check_device(torch: Any, device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is unknown: use cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch finds no CUDA GPU here: use --device cpu")


def _check_memory(checkpoint: Checkpoint, dtype: str, device: str) -> None:
    needed = checkpoint.num_parameters * _BYTES[dtype]
    available = probe().ram_available_bytes
    if device == "cpu" and needed > available:
        raise UsageError(
            f"{checkpoint.name} needs {needed / 1e9:.1f} GB in {dtype}, {available / 1e9:.1f} GB "
            "are free: try --dtype bfloat16, or export it and give the artifact"
        )
