"""Checkpoints of published shapes with random weights, for benchmarks that need only the shape.

Real Hugging Face folders in sharded bf16, written with numpy alone; weights repeat one block of
random values, so a tensor costs its bytes on the disk and no memory. They say nothing about
accuracy. The same text decoder can also be written as Qwen3ForCausalLM, for other runtimes.
"""

import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.model_config import expected_tensors, read_config

_SHARD_BYTES = 4 << 30
_TILE_VALUES = 1 << 22
_PREFIX = "model.language_model."
_END_IDS = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
_SMALL_VISION = {
    "depth": 6,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "deepstack_visual_indexes": [1, 3, 5],
}
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}\
{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}\
{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
#: published shapes of Qwen3-VL-4B-Instruct and -8B-Instruct; "0.6b" is Qwen3-0.6B's decoder
TEXT: dict[str, dict[str, int]] = {
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
VISION: dict[str, dict[str, Any]] = {
    "0.6b": _SMALL_VISION,
    "4b": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "8b": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}


def write_checkpoint(folder: Path, size: str, tokenizer: Path) -> None:
    """A Hugging Face folder of the size's shape; weights repeat one block of random values."""
    folder.mkdir(parents=True)
    config = _config(size)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _END_IDS)
    _write_json(folder / "preprocessor_config.json", _preprocessor())
    shutil.copy(tokenizer / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    _write_weights(folder, _tensors(config))


def write_text_checkpoint(folder: Path, size: str, tokenizer: Path) -> None:
    """The text decoder of ``write_checkpoint`` alone, as a Qwen3ForCausalLM folder.

    Embeddings are untied: the builder of onnxruntime-genai 0.18 writes a graph that refers to a
    tensor it lacks when a tied head has other bits than the body.
    """
    folder.mkdir(parents=True)
    whole = _config(size)
    config = whole["text_config"] | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _END_IDS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    shapes = {
        name.replace(_PREFIX, "model."): shape
        for name, shape in _tensors(whole).items()
        if name.startswith((_PREFIX, "lm_head"))
    }
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    _write_weights(folder, shapes)


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    is_untied = not config["tie_word_embeddings"]
    model = read_config(config, _END_IDS, "random", has_lm_head=is_untied)
    return expected_tensors(model)


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tile = _random_tile()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(shapes)):
        name = f"model-{number + 1:05}.safetensors"
        _write_shard(folder / name, shard, tile)
        weight_map |= dict.fromkeys(shard, name)
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def _config(size: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        **TEXT[size],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_parameters": {**rope, "rope_theta": 5_000_000},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "model_type": "qwen3_vl_text",
    }
    vision = {
        **VISION[size],
        "num_heads": VISION[size]["hidden_size"] // (72 if size == "8b" else 64),
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": TEXT[size]["hidden_size"],
        "model_type": "qwen3_vl",
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": size != "8b",
        "text_config": {**text, "tie_word_embeddings": size != "8b"},
        "vision_config": vision,
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _random_tile() -> NDArray[np.uint16]:
    values = np.random.default_rng(0).normal(0, 0.02, _TILE_VALUES).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _shards(
    shapes: dict[str, tuple[int, ...]],
) -> Iterator[dict[str, tuple[int, ...]]]:
    rest = iter(shapes.items())
    while shard := dict(islice(rest, 1)):
        size = 2 * sum(math.prod(shape) for shape in shard.values())
        for name, shape in rest:
            shard[name] = shape
            size += 2 * math.prod(shape)
            if size > _SHARD_BYTES:
                break
        yield shard


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], tile: NDArray[np.uint16]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            whole, part = divmod(math.prod(shape), tile.size)
            for _ in range(whole):
                file.write(tile.data)
            file.write(tile[:part].data)
