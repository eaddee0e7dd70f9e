"""The Qwen3-VL architecture as config.json describes it, and the tensors that must follow from it.

Reads the transformers 4.57 form (``rope_theta``, ``rope_scaling``) and the 5.x form
(``rope_parameters``). It refuses everything this package cannot compute: other architectures,
mixtures of experts, quantised checkpoints, other activations, stretched or non-interleaved rope.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medmo_edge.errors import CheckpointError

ARCHITECTURE = "Qwen3VLForConditionalGeneration"
MODEL_TYPE = "qwen3_vl"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Language model sizes; ``mrope_section`` counts frequencies of time, row and column."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float
    vocab_size: int
    max_positions: int
    tie_word_embeddings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """Vision tower sizes; ``deepstack_indexes`` are the layers whose features join the text."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    num_position_embeddings: int
    out_hidden_size: int
    deepstack_indexes: tuple[int, ...]
    in_channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One checkpoint's architecture and special token ids; ``eos_token_ids`` end an answer."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int | None


def read_config(
    config: Mapping[str, Any], generation: Mapping[str, Any], where: str, *, has_lm_head: bool
) -> ModelConfig:
    """Check and read config.json and generation_config.json; ``where`` names the folder in errors.

    ``has_lm_head`` decides when the two levels of config.json disagree about tied embeddings.
    Errors: CheckpointError for a missing or impossible value, or an architecture we cannot run.
    """
    _refuse_other_models(config, where)
    fields = _Fields(config, f"{where}: config.json")
    text = _read_text(fields, has_lm_head)
    vision = _read_vision(fields.section("vision_config"))
    _check_fit(text, vision, fields.where)
    ends = _token_ids(generation, config, "eos_token_id")
    if not ends:
        raise CheckpointError(f"{where}: neither config names eos_token_id, so no answer could end")
    starts = _token_ids(generation, config, "bos_token_id")
    read = ModelConfig(
        text=text,
        vision=vision,
        image_token_id=fields.integer("image_token_id"),
        video_token_id=fields.integer("video_token_id"),
        vision_start_token_id=fields.integer("vision_start_token_id"),
        vision_end_token_id=fields.integer("vision_end_token_id"),
        eos_token_ids=ends,
        pad_token_id=[*_token_ids(generation, config, "pad_token_id"), *ends][0],
        bos_token_id=starts[0] if starts else None,
    )
    last = max(read.image_token_id, read.vision_start_token_id, read.vision_end_token_id, *ends)
    if last >= text.vocab_size:
        raise CheckpointError(f"{where}: token id {last} is beyond vocab_size {text.vocab_size}")
    return read


def _refuse_other_models(config: Mapping[str, Any], where: str) -> None:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    if config.get("model_type") == f"{MODEL_TYPE}_moe" or "Moe" in str(name):
        raise CheckpointError(f"{where} is {name}, a mixture of experts: only dense Qwen3-VL works")
    if config.get("model_type") != MODEL_TYPE or (names and ARCHITECTURE not in names):
        raise CheckpointError(
            f"{where} is {name or 'of no named architecture'}: only {ARCHITECTURE} works"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise CheckpointError(
            f"{where} is quantised ({method or 'unknown method'}): use the bf16 checkpoint it was "
            "made from, the export quantises by itself"
        )


class _Fields:
    """Typed access to one section of config.json; every miss is a CheckpointError."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def section(self, name: str) -> "_Fields":
        found = self.values.get(name)
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{self.where} has no section {name}")
        return _Fields(found, f"{self.where}, {name}")

    def integer(self, name: str, default: int | None = None) -> int:
        found = self.values.get(name)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise CheckpointError(f"{self.where}: {name} is {found!r}, not a whole number")
        return found

    def size(self, name: str, default: int | None = None) -> int:
        found = self.integer(name, default)
        if not 0 < found < 1 << 31:
            raise CheckpointError(f"{self.where}: {name} is {found}, which cannot be a size")
        return found

    def real(self, name: str) -> float:
        found = self.values.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e12:
            raise CheckpointError(f"{self.where}: {name} is {found!r}, not a positive number")
        return float(found)

    def integers(self, name: str) -> tuple[int, ...]:
        found = self.values.get(name)
        if not isinstance(found, list) or any(type(value) is not int for value in found):
            raise CheckpointError(f"{self.where}: {name} is {found!r}, not a list of whole numbers")
        return tuple(found)

    def require(self, name: str, wanted: object, default: object = None) -> None:
        found = self.values.get(name, default)
        if found != wanted:
            raise CheckpointError(f"{self.where}: {name} is {found!r}, only {wanted!r} works")


def _read_text(config: _Fields, has_lm_head: bool) -> TextConfig:
    text = config.section("text_config")
    text.require("hidden_act", "silu", "silu")
    text.require("attention_bias", False, False)
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    head_dim = text.size("head_dim", hidden // heads)
    rope_theta, sections = _read_rope(text, head_dim)
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=text.size("intermediate_size"),
        num_layers=text.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=text.size("num_key_value_heads", heads),
        head_dim=head_dim,
        rope_theta=rope_theta,
        mrope_section=sections,
        rms_norm_eps=text.real("rms_norm_eps"),
        vocab_size=text.size("vocab_size"),
        max_positions=text.size("max_position_embeddings"),
        tie_word_embeddings=_is_tied(config.values, text.values, has_lm_head),
    )


def _read_rope(text: _Fields, head_dim: int) -> tuple[float, tuple[int, int, int]]:
    """rope_theta and mrope_section, from ``rope_parameters`` (5.x) or ``rope_scaling`` (4.57)."""
    new_form = isinstance(text.values.get("rope_parameters"), Mapping)
    rope = text.section("rope_parameters" if new_form else "rope_scaling")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"{rope.where}: rope_type is {kind!r}, only 'default' works")
    rope.require("mrope_interleaved", True, True)
    sections = rope.integers("mrope_section")
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise CheckpointError(
            f"{rope.where}: mrope_section {list(sections)} does not add up to head_dim / 2 "
            f"= {head_dim / 2:g}"
        )
    theta = rope if new_form and "rope_theta" in rope.values else text
    return theta.real("rope_theta"), (sections[0], sections[1], sections[2])


def _is_tied(top: Mapping[str, Any], text: Mapping[str, Any], has_lm_head: bool) -> bool:
    levels = {bool(level["tie_word_embeddings"]) for level in (top, text) if _says_tied(level)}
    return levels.pop() if len(levels) == 1 else bool(levels) and not has_lm_head


def _says_tied(level: Mapping[str, Any]) -> bool:
    return level.get("tie_word_embeddings") is not None


def _read_vision(vision: _Fields) -> VisionConfig:
    vision.require("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    return VisionConfig(
        depth=vision.size("depth"),
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        num_heads=vision.size("num_heads"),
        patch_size=vision.size("patch_size"),
        temporal_patch_size=vision.size("temporal_patch_size"),
        merge_size=vision.size("spatial_merge_size"),
        num_position_embeddings=vision.size("num_position_embeddings"),
        out_hidden_size=vision.size("out_hidden_size"),
        deepstack_indexes=vision.integers("deepstack_visual_indexes"),
        in_channels=vision.size("in_channels", 3),
    )


def _check_fit(text: TextConfig, vision: VisionConfig, where: str) -> None:
    """Relations between values, each of which would otherwise fail deep inside a backend."""
    problems = {
        "num_attention_heads is no multiple of num_key_value_heads": (
            text.num_heads % text.num_kv_heads
        ),
        "vision out_hidden_size differs from text hidden_size": (
            vision.out_hidden_size != text.hidden_size
        ),
        "vision hidden_size is no multiple of 4 * num_heads": (
            vision.hidden_size % (4 * vision.num_heads)
        ),
        "num_position_embeddings is no square": (
            math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings
        ),
        "in_channels is not 3": vision.in_channels != 3,
        "deepstack_visual_indexes do not rise within the vision depth": (
            sorted(set(vision.deepstack_indexes) & set(range(vision.depth)))
            != list(vision.deepstack_indexes)
        ),
        "deepstack has more levels than the language model has layers": (
            len(vision.deepstack_indexes) > text.num_layers
        ),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise CheckpointError(f"{where}: {problem}")


def _token_ids(
    generation: Mapping[str, Any], config: Mapping[str, Any], name: str
) -> tuple[int, ...]:
    """Ids under ``name``: generation_config.json wins over config.json's two levels."""
    text = config.get("text_config")
    for level in (generation, config, text if isinstance(text, Mapping) else {}):
        found = level.get(name)
        values = found if isinstance(found, list) else [found]
        if values and all(type(value) is int and value >= 0 for value in values):
            return tuple(values)
    return ()


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the architecture; a tied ``lm_head.weight`` is not one."""
    text = {f"model.language_model.{name}": s for name, s in _text_tensors(config.text).items()}
    vision = {f"model.visual.{name}": s for name, s in _vision_tensors(config.vision).items()}
    head = {"lm_head.weight": (config.text.vocab_size, config.text.hidden_size)}
    return text | vision | ({} if config.text.tie_word_embeddings else head)


def _text_tensors(text: TextConfig) -> dict[str, Shape]:
    hidden, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (text.head_dim,),
        "self_attn.k_norm": (text.head_dim,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = {
        f"layers.{index}.{name}.weight": shape
        for index in range(text.num_layers)
        for name, shape in layer.items()
    }
    return {
        "embed_tokens.weight": (text.vocab_size, hidden),
        "norm.weight": (hidden,),
        **layers,
    }


def _vision_tensors(vision: VisionConfig) -> dict[str, Shape]:
    hidden, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    merged = hidden * vision.merge_size**2
    block: dict[str, Shape] = {
        "norm1": (hidden,),
        "norm2": (hidden,),
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.linear_fc1": (inner, hidden),
        "mlp.linear_fc2": (hidden, inner),
    }
    modules: dict[str, Shape] = {
        "patch_embed.proj": (hidden, 3, vision.temporal_patch_size, patch, patch),
        **_merger("merger", hidden, merged, vision.out_hidden_size),
    }
    for index in range(vision.depth):
        modules |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    for level in range(len(vision.deepstack_indexes)):
        # Deepstack mergers normalise after joining the patches, the main one before.
        name = f"deepstack_merger_list.{level}"
        modules |= _merger(name, merged, merged, vision.out_hidden_size)
    weights = {f"{name}.weight": shape for name, shape in modules.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    return {"pos_embed.weight": (vision.num_position_embeddings, hidden)} | weights | biases


def _merger(name: str, normed: int, merged: int, out: int) -> Mapping[str, Shape]:
    return {
        f"{name}.norm": (normed,),
        f"{name}.linear_fc1": (merged, merged),
        f"{name}.linear_fc2": (out, merged),
    }


def num_parameters(shapes: Sequence[Shape]) -> int:
    """Total number of values in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)
