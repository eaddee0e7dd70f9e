"""Tiny random Qwen3-VL checkpoints: Hugging Face folders written with numpy alone.

Their answers mean nothing; only agreement does.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TINY = Path(__file__).with_name("tiny")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_checkpoint(
    path: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    tied: bool = True,
    shards: int = 1,
    dtype: str = "BF16",
    seed: int = 0,
    min_pixels: int = 4096,
    max_pixels: int = 262144,
    coords: str = "norm1000",
    chat_template: str | None = None,
) -> Path:
    """Write a whole Hugging Face folder; ``text`` and ``vision`` change the tiny shapes."""
    path.mkdir(parents=True)
    ids = _write_tokenizer(path)
    vocab_size = -(-len(ids) // 64) * 64
    config = _config({"vocab_size": vocab_size, **(text or {})}, vision or {}, tied, ids)
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    _write_json(path / "config.json", config)
    _write_json(path / "medmo_edge.json", {"coords": coords})
    _write_json(path / "generation_config.json", _read("generation_config") | _ends(ids))
    _write_json(
        path / "preprocessor_config.json",
        {**_read("preprocessor_config"), **_patch_sizes(config["vision_config"]), "size": limits},
    )
    template = chat_template or (TINY / "chat_template.jinja").read_text(encoding="utf-8")
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_tensors(path, _shapes(config), shards=shards, dtype=dtype, seed=seed)
    return path


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((TINY / f"{name}.json").read_text(encoding="utf-8"))
    return values


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _config(
    text: Mapping[str, Any], vision: Mapping[str, Any], tied: bool, ids: Mapping[str, int]
) -> dict[str, Any]:
    """config.json in the 4.57 and the 5.x form at once, as our own trainer writes it."""
    config = _read("config")
    config |= {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }
    config["text_config"] |= {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": tied,
        **text,
    }
    config["vision_config"] |= vision
    return config


def _ends(ids: Mapping[str, int]) -> dict[str, Any]:
    end = ids["<|endoftext|>"]
    return {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [ids["<|im_end|>"], end]}


def _patch_sizes(vision: Mapping[str, Any]) -> dict[str, int]:
    return {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
    }


def _write_tokenizer(path: Path) -> dict[str, int]:
    """Train a small byte-level BPE with Qwen's rules; returns token -> id, added ones included."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from tokenizers.processors import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([pre.Split(Regex(QWEN2_SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    alphabet = sorted(pre.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_sentences(), trainer)
    for token, special in _read("added_tokens").items():
        added = AddedToken(token, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer.model.save(str(path))  # vocab.json and merges.txt, for transformers 4.57
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    _write_json(path / "tokenizer_config.json", _tokenizer_config(ids))
    return ids


def _tokenizer_config(ids: Mapping[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(ids[token]): {"content": token, **flags, "special": special}
        for token, special in _read("added_tokens").items()
    }
    return {**_read("tokenizer_config"), "added_tokens_decoder": added}


def _sentences() -> list[str]:
    """A corpus with the words that questions and answers of the tests are made of."""
    findings = ["nodule", "white blood cell", "fracture", "pleural effusion", "opacity", "mass"]
    sides = ["left", "right", "upper", "lower", "basal", "apical"]
    forms = [
        "Locate the {finding}.",
        "Is there a {finding} in the {side} lung? Yes, there is a {finding}.",
        "{finding} <box>[[{a}, {b}, {a}, {b}]]</box>",
        "Generate a detailed radiology report for this image: no {finding} in the {side} zone.",
        "Describe this medical image. The {side} lobe shows a {finding}, how many? {b}",
    ]
    return [
        form.format(finding=finding, side=side, a=37 * index % 1000, b=53 * index % 1000)
        for index, form in enumerate(forms)
        for finding in findings
        for side in sides
    ]


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the architecture, written down independently of the package."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, inner, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (text["vocab_size"], hidden)}
    for layer in range(text["num_hidden_layers"]):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["norm.weight"] = (hidden,)
    shapes = {f"model.language_model.{name}": shape for name, shape in shapes.items()}
    shapes |= {f"model.visual.{n}": shape for n, shape in _vision_shapes(vision).items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes


def _vision_shapes(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    wide, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = wide * vision["spatial_merge_size"] ** 2
    linears = {
        "patch_embed.proj": (wide, 3, vision["temporal_patch_size"], patch, patch),
        **_merger("merger", wide, merged, vision["out_hidden_size"]),
    }
    for level in range(len(vision["deepstack_visual_indexes"])):
        linears |= _merger(
            f"deepstack_merger_list.{level}", merged, merged, vision["out_hidden_size"]
        )
    for layer in range(vision["depth"]):
        linears |= {
            f"blocks.{layer}.norm1": (wide,),
            f"blocks.{layer}.norm2": (wide,),
            f"blocks.{layer}.attn.qkv": (3 * wide, wide),
            f"blocks.{layer}.attn.proj": (wide, wide),
            f"blocks.{layer}.mlp.linear_fc1": (inner, wide),
            f"blocks.{layer}.mlp.linear_fc2": (wide, inner),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.weight": (vision["num_position_embeddings"], wide)
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _merger(name: str, normed: int, merged: int, out: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.norm": (normed,),
        f"{name}.linear_fc1": (merged, merged),
        f"{name}.linear_fc2": (out, merged),
    }


def _draw(name: str, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float32]:
    """Random weights that keep activations near one and logits spread over a few units."""
    values = random.standard_normal(shape, np.float32)
    if name == "model.language_model.norm.weight":
        return 3 + 0.3 * values  # spreads the logits, so that a greedy choice is rarely a tie
    if "norm" in name and name.endswith(".weight"):
        return 1 + 0.1 * values
    if name.endswith(".bias"):
        return 0.1 * values
    if "embed_tokens" in name or "pos_embed" in name:
        return values * np.float32(0.5 if "pos_embed" in name else 0.05)
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def _write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, shards: int, dtype: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = (
            f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            if shards > 1
            else "model.safetensors"
        )
        held = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        arrays = {name: _store(_draw(name, shapes[name], random), dtype) for name in held}
        _write_safetensors(path / file, arrays, dtype)
        weight_map |= dict.fromkeys(held, file)
    if shards > 1:
        _write_json(
            path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}
        )


def _store(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype != "BF16":
        return values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_safetensors(path: Path, arrays: Mapping[str, NDArray[Any]], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.tobytes())
