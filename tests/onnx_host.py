"""Feeds the ONNX graphs in tests: the least a host must do, and transformers as the reference.

Independent of our runtime on purpose: cache arrays travel from outputs to inputs by value, nothing
is shared or kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.export.onnx_decoder import DecoderPlan, build_decoder
from medmo_edge.export.onnx_graph import save_graph
from medmo_edge.export.onnx_vision import VisionPlan, build_vision
from medmo_edge.preprocess import mrope_positions, patchify
from medmo_edge.vision_inputs import VisionGeometry, rope_cos_sin, vision_inputs

CAPACITY = 160
Floats = NDArray[np.float32]


def open_session(path: Path, *, optimise: bool = True, **config: str) -> Any:
    """One thread, CPU. ``optimise`` False runs the nodes as written."""
    ort = pytest.importorskip("onnxruntime", reason="graphs need the cpu extra")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def save(weights: Any, path: Path) -> Path:
    """Write a built graph."""
    save_graph(weights.graph, path, lambda size: None)
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids with one run of image tokens per picture, and the pictures [H, W, 3]."""

    ids: list[int]
    pictures: tuple[NDArray[np.uint8], ...] = ()

    def grids(self) -> list[tuple[int, int, int]]:
        """Patch grid of every picture, for patches of 16."""
        return [(1, each.shape[0] // 16, each.shape[1] // 16) for each in self.pictures]


def make_prompt(checkpoint: Checkpoint, layout: Sequence[int | tuple[int, int]]) -> Prompt:
    """A prompt of ``layout``: a number is that many text tokens, a pair a picture (h, w)."""
    random = np.random.default_rng(len(layout))
    config = checkpoint.config
    ids: list[int] = []
    pictures = []
    for part in layout:
        if isinstance(part, int):
            ids += [int(each) for each in random.integers(10, 256, part)]
            continue
        pictures.append(random.integers(0, 256, (*part, 3), dtype=np.uint8))
        tokens = part[0] * part[1] // 32**2
        start, end = config.vision_start_token_id, config.vision_end_token_id
        ids += [start, *[config.image_token_id] * tokens, end]
    return Prompt(ids=ids, pictures=tuple(pictures))


@dataclass(slots=True)
class Conversation:
    """What one sequence has put into the cache so far."""

    cache: dict[str, Floats]
    cells: int = 0
    delta: int = 0


class Host:
    """Both graphs of one checkpoint, opened on the CPU."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        decoder: DecoderPlan,
        vision: VisionPlan | None = None,
        **options: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.plan = checkpoint, decoder
        vision = vision or VisionPlan(form=decoder.form, dtype=decoder.dtype)
        paths = [
            save(build_vision(checkpoint, vision), folder / "vision.onnx"),
            save(build_decoder(checkpoint, decoder), folder / "decoder.onnx"),
        ]
        self.vision, self.decoder = (open_session(path, **options) for path in paths)
        self.dtype = {"float32": np.float32, "float16": np.float16}[decoder.dtype]
        self.embeddings = checkpoint.read("model.language_model.embed_tokens.weight")

    def encode(self, picture: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Features [M, D] and deepstack features [levels, M, D] of one picture."""
        features, levels = self.encode_many([picture])
        return features[0], levels[:, 0]

    def encode_many(self, pictures: Sequence[NDArray[np.uint8]]) -> tuple[Floats, Floats]:
        """Features [B, M, D] and deepstack features [levels, B, M, D] of pictures of one size."""
        vision = self.checkpoint.config.vision
        geometry = VisionGeometry(
            head_dim=vision.hidden_size // vision.num_heads,
            num_position_embeddings=vision.num_position_embeddings,
            merge_size=vision.merge_size,
        )
        height, width, _ = pictures[0].shape
        given = vision_inputs((1, height // 16, width // 16), geometry)
        pixels = [patchify(picture, self.checkpoint.preprocessing) for picture in pictures]
        feeds = {
            "pixel_values": np.stack(pixels).astype(self.dtype),
            "pos_idx": given.pos_idx,
            "pos_weight": given.pos_weight,
            "cos": given.cos,
            "sin": given.sin,
        }
        features, levels = self.vision.run(None, feeds)
        return features.astype(np.float32), levels.astype(np.float32)

    def start(self, batch: int = 1) -> Conversation:
        """An empty cache."""
        text = self.checkpoint.config.text
        shape = (batch, text.num_kv_heads, CAPACITY, text.head_dim)
        names = [each.name for each in self.decoder.get_inputs() if each.name.startswith("past")]
        return Conversation(cache={name: np.zeros(shape, self.dtype) for name in names})

    def embed(self, prompt: Prompt) -> tuple[Floats, Floats, NDArray[np.int64], int]:
        """Embeddings [S, D], deepstack [levels, S, D], positions [3, S] and the rope delta."""
        config = self.checkpoint.config
        embeddings = self.embeddings[prompt.ids]
        deepstack = np.zeros((len(config.vision.deepstack_indexes), *embeddings.shape), np.float32)
        rows = np.flatnonzero(np.asarray(prompt.ids) == config.image_token_id)
        first = 0
        for picture in prompt.pictures:
            features, levels = self.encode(picture)
            here = rows[first : first + len(features)]
            embeddings[here], deepstack[:, here] = features, levels
            first += len(features)
        positions, delta = mrope_positions(prompt.ids, prompt.grids(), config.image_token_id, 2)
        return embeddings, deepstack, positions, delta

    def step(
        self,
        talk: Conversation,
        embeddings: Floats,
        deepstack: Floats,
        positions: NDArray[np.int64],
        cells: Sequence[int],
        last: Sequence[int],
    ) -> Floats:
        """Logits [B, rows, V]; embeddings [B, S, D], deepstack [levels, B, S, D], positions
        [3, B, S], ``cells`` tokens already cached and ``last`` row wanted of each sequence."""
        text = self.checkpoint.config.text
        cos, sin = rope_cos_sin(
            positions,
            head_dim=text.head_dim,
            rope_theta=text.rope_theta,
            mrope_section=text.mrope_section,
        )
        feeds: dict[str, Any] = {
            "inputs_embeds": embeddings.astype(self.dtype),
            "rope_cos": cos.astype(self.dtype),
            "rope_sin": sin.astype(self.dtype),
        }
        if not self.plan.all_logits:
            feeds["last_index"] = np.asarray(last, np.int64)[:, None]
        for level, values in enumerate(deepstack):
            feeds[f"deepstack_{level}"] = values.astype(self.dtype)
        feeds |= self._cache_inputs(cells, [row + 1 for row in last]) | talk.cache
        names = [each.name for each in self.decoder.get_outputs()]
        logits, *presents = self.decoder.run(names, feeds)
        talk.cache = dict(zip(talk.cache, presents, strict=True))
        found: Floats = logits
        return found

    def _cache_inputs(self, cells: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        if self.plan.form == "scatter":
            return {"write_indices": np.asarray(cells, np.int64)}
        totals = np.asarray(cells) + np.asarray(counts)
        return {
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.asarray(totals.max(), np.int32),
        }

    def prefill(self, prompt: Prompt, chunk: int = CAPACITY) -> tuple[Conversation, Floats]:
        """The whole prompt in chunks; logits [1, rows, V] of the last chunk."""
        embeddings, deepstack, positions, delta = self.embed(prompt)
        talk = self.start()
        for first in range(0, len(prompt.ids), chunk):
            part = slice(first, first + chunk)
            rows = len(prompt.ids[part])
            logits = self.step(
                talk,
                embeddings[None, part],
                deepstack[:, None, part],
                positions[:, None, part],
                [first],
                [rows - 1],
            )
        talk.cells, talk.delta = len(prompt.ids), delta
        return talk, logits

    def decode(self, talk: Conversation, token: int) -> Floats:
        """Logits [1, 1, V] after one more token."""
        levels = len(self.checkpoint.config.vision.deepstack_indexes)
        embedding = self.embeddings[[token]][None]
        positions = np.full((3, 1, 1), talk.cells + talk.delta)
        deepstack = np.zeros((levels, *embedding.shape), np.float32)
        logits = self.step(talk, embedding, deepstack, positions, [talk.cells], [0])
        talk.cells += 1
        return logits


class Reference:
    """transformers in float32, evaluated anew on the whole sequence at every step."""

    def __init__(self, folder: Path) -> None:
        torch = pytest.importorskip("torch", reason="the reference needs the train extra")
        transformers = pytest.importorskip("transformers")
        self.torch = torch
        self.checkpoint = open_checkpoint(folder)
        model = transformers.Qwen3VLForConditionalGeneration
        self.model = model.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(self, prompt: Prompt, more: Sequence[int] = ()) -> Floats:
        """Logits [S, V] of the prompt followed by the tokens ``more``."""
        torch, ids = self.torch, [*prompt.ids, *more]
        image = self.checkpoint.config.image_token_id
        options: dict[str, Any] = {
            "mm_token_type_ids": torch.tensor([[int(each == image) for each in ids]])
        }
        if prompt.pictures:
            pixels = [patchify(each, self.checkpoint.preprocessing) for each in prompt.pictures]
            options["pixel_values"] = torch.from_numpy(np.concatenate(pixels))
            options["image_grid_thw"] = torch.tensor(prompt.grids())
        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([ids]), use_cache=False, **options)
        found: Floats = out.logits[0].numpy()
        return found
