"""Qwen3-VL's forward pass in plain numpy, float32, one layer's weights at a time.

What export computes the expected values of the on-site self-test with: it needs neither torch nor
a backend, and shares nothing with either but the preprocessing, so an error of an exporter or a
runtime cannot hide in it. It is as slow as one pass must be: no KV cache, no batching, no
generation. Source of the arithmetic: transformers, models/qwen3_vl/modeling_qwen3_vl.py; the tests
hold it against that.

Shape suffixes: N patches, M merged patches (vision tokens), L prompt tokens, D hidden size, A
heads, K size of one head, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.preprocess import grid_thw, mrope_positions, patchify

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]

_TEXT, _VISION = "model.language_model.", "model.visual."
_VISION_EPS = 1e-6  # a constant of the reference's code, in no config
_VISION_THETA = 10000.0
_HEAD_BLOCK_BYTES = 64 << 20
_erf = np.vectorize(math.erf, otypes=[np.float32])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """Token ids with one image token per vision token, and the resized uint8 images [H, W, 3]."""

    ids: Sequence[int]
    images: Sequence[NDArray[np.uint8]] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """Per image the vision features [M, (1 + levels) * D]: main, then each deepstack level; and the
    logits [T, V] at the last T positions of the prompt.
    """

    vision: tuple[Array, ...]
    logits: Array


@dataclass(slots=True, eq=False)
class _Running:
    """One prompt on its way through the layers."""

    hidden_LD: Array
    cos_LK: Array
    sin_LK: Array
    image_rows: NDArray[np.intp]
    deepstack: list[Array]


def forward(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    num_last: Sequence[int],
    progress: Progress | None = None,
) -> list[Outputs]:
    """Features and logits of every prompt; ``num_last`` says at how many last positions.

    Each weight is read once for all prompts; the largest piece held is one matrix of one layer, of
    the head 64 MB. ``progress`` receives (layers done, layers in all). Errors: CheckpointError.
    """
    config = checkpoint.config
    total = config.vision.depth + config.text.num_layers
    report = progress or (lambda done, total: None)
    features = _vision(checkpoint, [image for p in prompts for image in p.images], report, total)
    held = iter(features)
    own = [tuple(next(held) for _ in prompt.images) for prompt in prompts]
    running = [_start(checkpoint, prompt, rows) for prompt, rows in zip(prompts, own, strict=True)]
    for layer in range(config.text.num_layers):
        _text_layer(checkpoint, layer, running)
        report(config.vision.depth + layer + 1, total)
    norm = checkpoint.read(f"{_TEXT}norm.weight")
    ends = [
        _rms(each.hidden_LD[-count:], norm, config.text.rms_norm_eps)
        for each, count in zip(running, num_last, strict=True)
    ]
    logits = np.split(_head(checkpoint, np.concatenate(ends)), np.cumsum(num_last)[:-1])
    return [Outputs(vision=rows, logits=scores) for rows, scores in zip(own, logits, strict=True)]


def encode(checkpoint: Checkpoint, image: NDArray[np.uint8]) -> Array:
    """The vision tower alone: features [M, (1 + levels) * D] of one resized image."""
    return _vision(checkpoint, [image], lambda done, total: None, 0)[0]


def _grids(
    checkpoint: Checkpoint, images: Sequence[NDArray[np.uint8]]
) -> list[tuple[int, int, int]]:
    settings = checkpoint.preprocessing
    return [grid_thw(image.shape[0], image.shape[1], settings) for image in images]


def _head(checkpoint: Checkpoint, hidden_TD: Array) -> Array:
    name = "lm_head.weight"
    if checkpoint.config.text.tie_word_embeddings:
        name = f"{_TEXT}embed_tokens.weight"
    blocks = checkpoint.row_blocks(name, _HEAD_BLOCK_BYTES)
    return np.concatenate([hidden_TD @ block.T for block in blocks], axis=1)


def _start(checkpoint: Checkpoint, prompt: Prompt, features: tuple[Array, ...]) -> _Running:
    """Embedded tokens with the image features in their places, and the rope of every position."""
    config, text = checkpoint.config, checkpoint.config.text
    ids = np.asarray(prompt.ids)
    hidden = _embed(checkpoint, ids)
    image_rows = np.flatnonzero(ids == config.image_token_id)
    width = text.hidden_size
    levels = [
        np.concatenate([rows[:, at : at + width] for rows in features] or [hidden[:0]])
        for at in range(0, width * (1 + len(config.vision.deepstack_indexes)), width)
    ]
    hidden[image_rows] = levels[0]
    grids = _grids(checkpoint, prompt.images)
    positions, _ = mrope_positions(
        prompt.ids, grids, config.image_token_id, config.vision.merge_size
    )
    cos, sin = _text_rope(positions, text.head_dim, text.rope_theta, text.mrope_section)
    return _Running(hidden, cos, sin, image_rows, levels[1:])


def _embed(checkpoint: Checkpoint, ids: NDArray[np.integer]) -> Array:
    """Rows of the embedding table, read from the file where it lies."""
    name = f"{_TEXT}embed_tokens.weight"
    rows = checkpoint.raw(name)[ids]
    if rows.dtype == np.uint16:  # bfloat16: the upper half of a float32
        rows = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.array(rows, np.float32)


def _text_rope(
    positions: NDArray[np.int64], head_dim: int, theta: float, sections: tuple[int, int, int]
) -> tuple[Array, Array]:
    """cos and sin [L, K]: frequencies take turns between time, row and column."""
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles_3LF = positions[:, :, None].astype(np.float32) * inverse.astype(np.float32)
    angles = angles_3LF[0].copy()
    for axis in (1, 2):
        turns = slice(axis, 3 * sections[axis], 3)
        angles[:, turns] = angles_3LF[axis][:, turns]
    both = np.concatenate([angles, angles], axis=1)
    return np.cos(both), np.sin(both)


def _text_layer(checkpoint: Checkpoint, layer: int, running: Sequence[_Running]) -> None:
    """One decoder layer over all prompts, in place; then its deepstack level joins the images."""
    text, prefix = checkpoint.config.text, f"{_TEXT}layers.{layer}."

    def weight(name: str) -> Array:
        return checkpoint.read(f"{prefix}{name}.weight")

    before = weight("input_layernorm")
    normal = [_rms(each.hidden_LD, before, text.rms_norm_eps) for each in running]
    parts = [_linear(normal, weight(f"self_attn.{name}_proj")) for name in ("q", "k", "v")]
    norms = weight("self_attn.q_norm"), weight("self_attn.k_norm")
    mixed = []
    for each, query, key, value in zip(running, *parts, strict=True):
        heads = [part.reshape(len(part), -1, text.head_dim) for part in (query, key, value)]
        for index in (0, 1):
            heads[index] = _rotate(
                _rms(heads[index], norms[index], text.rms_norm_eps), each.cos_LK, each.sin_LK
            )
        mixed.append(_attend(*heads, causal=True))
    _add(running, _linear(mixed, weight("self_attn.o_proj")))
    after = weight("post_attention_layernorm")
    normal = [_rms(each.hidden_LD, after, text.rms_norm_eps) for each in running]
    gates = _linear(normal, weight("mlp.gate_proj"))
    ups = _linear(normal, weight("mlp.up_proj"))
    inner = [_silu(gate) * up for gate, up in zip(gates, ups, strict=True)]
    _add(running, _linear(inner, weight("mlp.down_proj")))
    for each in running:
        if layer < len(each.deepstack):
            each.hidden_LD[each.image_rows] += each.deepstack[layer]


def _add(running: Sequence[_Running], changes: Sequence[Array]) -> None:
    for each, change in zip(running, changes, strict=True):
        each.hidden_LD += change


def _vision(
    checkpoint: Checkpoint, images: Sequence[NDArray[np.uint8]], report: Progress, total: int
) -> list[Array]:
    """Features [M, (1 + levels) * D] of every image."""
    vision = checkpoint.config.vision
    grids = _grids(checkpoint, images)
    states = [
        _patch_embedding(checkpoint, image, grid) for image, grid in zip(images, grids, strict=True)
    ]
    ropes = [_vision_rope(grid, vision.hidden_size // vision.num_heads) for grid in grids]
    levels: list[list[Array]] = []
    for layer in range(vision.depth if images else 0):
        _vision_layer(checkpoint, layer, states, ropes)
        if layer in vision.deepstack_indexes:
            name = f"deepstack_merger_list.{vision.deepstack_indexes.index(layer)}"
            levels.append(_merge(checkpoint, name, states, normalise_merged=True))
        report(layer + 1, total)
    main = _merge(checkpoint, "merger", states, normalise_merged=False)
    return [np.concatenate(parts, axis=1) for parts in zip(main, *levels, strict=True)]


def _patch_embedding(
    checkpoint: Checkpoint, image: NDArray[np.uint8], grid: tuple[int, int, int]
) -> Array:
    weight = checkpoint.read(f"{_VISION}patch_embed.proj.weight")
    patches = patchify(image, checkpoint.preprocessing)
    embedded = patches @ weight.reshape(len(weight), -1).T
    embedded += checkpoint.read(f"{_VISION}patch_embed.proj.bias")
    return embedded + _position_embedding(checkpoint, grid)


def _position_embedding(checkpoint: Checkpoint, grid: tuple[int, int, int]) -> Array:
    """The square position table [S * S, D] stretched bilinearly onto the grid, corner on corner."""
    table = checkpoint.read(f"{_VISION}pos_embed.weight")
    side = math.isqrt(len(table))
    square = table.reshape(side, side, -1)
    rows, columns = (_stretch(side, count) for count in grid[1:])
    full = np.einsum("ha,abd,wb->hwd", rows, square, columns, optimize=True)
    order = _merge_order(grid, checkpoint.config.vision.merge_size)
    return np.ascontiguousarray(full.reshape(-1, full.shape[-1])[order], np.float32)


def _stretch(side: int, count: int) -> Array:
    """Weights [count, side] of linear interpolation at ``count`` points from first to last."""
    at = np.linspace(0, side - 1, count, dtype=np.float32)
    away = np.abs(at[:, None] - np.arange(side, dtype=np.float32))
    return np.asarray(np.maximum(0, 1 - away), np.float32)


def _merge_order(grid: tuple[int, int, int], merge: int) -> NDArray[np.intp]:
    """Row-major patch numbers in the order in which patches of one vision token are adjacent."""
    _, rows, columns = grid
    numbers = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return np.ascontiguousarray(numbers.transpose(0, 2, 1, 3)).reshape(-1)


def _vision_rope(grid: tuple[int, int, int], head_dim: int) -> tuple[Array, Array]:
    """cos and sin [N, K]: the first half of the frequencies turns with the row, then the column."""
    # The merge size is 2 in the whole family and part of the patch order of ``patchify``.
    rows, columns = np.divmod(_merge_order(grid, 2), grid[2])
    half = head_dim // 2
    inverse = 1.0 / _VISION_THETA ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = np.concatenate([rows[:, None] * inverse, columns[:, None] * inverse], axis=1)
    both = np.concatenate([angles, angles], axis=1).astype(np.float32)
    return np.cos(both), np.sin(both)


def _vision_layer(
    checkpoint: Checkpoint, layer: int, states: list[Array], ropes: Sequence[tuple[Array, Array]]
) -> None:
    heads = checkpoint.config.vision.num_heads
    prefix = f"{_VISION}blocks.{layer}."
    normal = _layer_norms(checkpoint, f"{prefix}norm1", states)
    mixed = []
    for joined, (cos, sin) in zip(
        _affine(checkpoint, f"{prefix}attn.qkv", normal), ropes, strict=True
    ):
        query, key, value = joined.reshape(len(joined), 3, heads, -1).transpose(1, 0, 2, 3)
        mixed.append(_attend(_rotate(query, cos, sin), _rotate(key, cos, sin), value, causal=False))
    changes = _affine(checkpoint, f"{prefix}attn.proj", mixed)
    states[:] = [state + change for state, change in zip(states, changes, strict=True)]
    normal = _layer_norms(checkpoint, f"{prefix}norm2", states)
    inner = [_gelu_tanh(each) for each in _affine(checkpoint, f"{prefix}mlp.linear_fc1", normal)]
    changes = _affine(checkpoint, f"{prefix}mlp.linear_fc2", inner)
    states[:] = [state + change for state, change in zip(states, changes, strict=True)]


def _merge(
    checkpoint: Checkpoint, name: str, states: Sequence[Array], *, normalise_merged: bool
) -> list[Array]:
    """Four adjacent patches become one vision token; deepstack normalises after joining them."""
    prefix = f"{_VISION}{name}."
    wide = checkpoint.config.vision.hidden_size * checkpoint.config.vision.merge_size**2
    if normalise_merged:
        states = [state.reshape(-1, wide) for state in states]
    normal = [s.reshape(-1, wide) for s in _layer_norms(checkpoint, f"{prefix}norm", states)]
    inner = [_gelu(each) for each in _affine(checkpoint, f"{prefix}linear_fc1", normal)]
    return _affine(checkpoint, f"{prefix}linear_fc2", inner)


def _linear(inputs: Sequence[Array], weight: Array) -> list[Array]:
    """``weight`` [out, in] applied to all inputs as one matrix product."""
    joined = np.concatenate(inputs) @ weight.T
    return np.split(joined, np.cumsum([len(each) for each in inputs])[:-1])


def _affine(checkpoint: Checkpoint, name: str, inputs: Sequence[Array]) -> list[Array]:
    if not inputs:
        return []
    bias = checkpoint.read(f"{name}.bias")
    return [each + bias for each in _linear(inputs, checkpoint.read(f"{name}.weight"))]


def _layer_norms(checkpoint: Checkpoint, name: str, inputs: Sequence[Array]) -> list[Array]:
    weight, bias = (checkpoint.read(f"{name}.{part}") for part in ("weight", "bias"))
    return [_layer_norm(each) * weight + bias for each in inputs]


def _layer_norm(values: Array) -> Array:
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(_VISION_EPS))
    return np.asarray(centred / spread, np.float32)


def _rms(values: Array, weight: Array, eps: float) -> Array:
    size = np.sqrt(np.square(values).mean(axis=-1, keepdims=True) + np.float32(eps))
    return np.asarray(values / size * weight, np.float32)


def _rotate(heads_LAK: Array, cos_LK: Array, sin_LK: Array) -> Array:
    half = heads_LAK.shape[-1] // 2
    turned = np.concatenate([-heads_LAK[..., half:], heads_LAK[..., :half]], axis=-1)
    return np.asarray(heads_LAK * cos_LK[:, None] + turned * sin_LK[:, None], np.float32)


def _attend(query_LAK: Array, key_LBK: Array, value_LBK: Array, *, causal: bool) -> Array:
    """Attention [L, A * K], one head at a time; B key heads serve A / B query heads each."""
    length, heads, size = query_LAK.shape
    share = heads // key_LBK.shape[1]
    mixed = np.empty_like(query_LAK)
    scores = np.empty((length, length), np.float32)  # one for all heads: fresh memory is slow
    future = np.triu(np.full((length, length), -np.inf, np.float32), 1) if causal else None
    for head in range(heads):
        queries = np.ascontiguousarray(query_LAK[:, head]) / np.float32(math.sqrt(size))
        np.matmul(queries, np.ascontiguousarray(key_LBK[:, head // share]).T, out=scores)
        if future is not None:
            scores += future
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=1, keepdims=True)
        mixed[:, head] = scores @ np.ascontiguousarray(value_LBK[:, head // share]) / total
    return mixed.reshape(length, -1)


def _silu(values: Array) -> Array:
    return np.asarray(values / (1 + np.exp(-np.maximum(values, -80))), np.float32)


def _gelu(values: Array) -> Array:
    return np.asarray(values * 0.5 * (1 + _erf(values / np.float32(math.sqrt(2)))), np.float32)


def _gelu_tanh(values: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (values + np.float32(0.044715) * values**3)
    return np.asarray(0.5 * values * (1 + np.tanh(inner)), np.float32)
