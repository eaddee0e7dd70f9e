"""Which tensors the two GGUF files hold, and where in the checkpoint each comes from.

The lists are made from the config, so a checkpoint with a missing, misshapen or unknown tensor is
found before anything is written. Nothing is permuted or fused: llama.cpp reads Qwen3-VL's own
layout. Source of the names: llama.cpp, conversion/qwen3vl.py and gguf-py/gguf/constants.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medmo_edge.checkpoint import ModelConfig, TensorInfo, TextConfig, VisionConfig
from medmo_edge.errors import ExportError

_TEXT = "model.language_model."
_VISION = "model.visual."
_LM_HEAD = "lm_head.weight"
# Buffers that some transformers versions saved although they follow from the config.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One tensor of a GGUF file.

    ``source_shape`` is its shape in the checkpoint; ``frame`` picks one temporal slice of the patch
    convolution, [D, C, T, h, w] -> [D, C, h, w], which llama.cpp wants as two tensors.
    """

    name: str
    source: str
    source_shape: tuple[int, ...]
    frame: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file, outermost dimension first (GGUF stores it reversed)."""
        if self.frame is None:
            return self.source_shape
        return self.source_shape[:2] + self.source_shape[3:]


def language_tensors(config: ModelConfig) -> list[Planned]:
    """Tensors of the language file in layer order; ``output`` only when it is not tied."""
    text = config.text
    vocab = (text.vocab_size, text.hidden_size)
    planned = [_planned("token_embd.weight", f"{_TEXT}embed_tokens.weight", vocab)]
    for layer in range(text.num_layers):
        for name, (source, shape) in _layer(text).items():
            planned.append(
                _planned(
                    f"blk.{layer}.{name}.weight", f"{_TEXT}layers.{layer}.{source}.weight", shape
                )
            )
    planned.append(_planned("output_norm.weight", f"{_TEXT}norm.weight", (text.hidden_size,)))
    if not text.tie_word_embeddings:
        planned.append(_planned("output.weight", _LM_HEAD, vocab))
    return planned


def vision_tensors(config: ModelConfig) -> list[Planned]:
    """Tensors of the mmproj file: patches, positions, blocks, merger and deepstack mergers."""
    vision = config.vision
    hidden = vision.hidden_size
    planned = _patch_tensors(vision)
    positions = (vision.num_position_embeddings, hidden)
    planned.append(_planned("v.position_embd.weight", f"{_VISION}pos_embed.weight", positions))
    for block in range(vision.depth):
        for name, (source, shape) in _vision_block(vision).items():
            planned += _weight_and_bias(f"v.blk.{block}.{name}", f"blocks.{block}.{source}", shape)
    wide = hidden * vision.merge_size**2
    # The main merger normalises before the patches of a token are joined, deepstack's after.
    planned += _weight_and_bias("v.post_ln", "merger.norm", (hidden,))
    planned += _weight_and_bias("mm.0", "merger.linear_fc1", (wide, wide))
    planned += _weight_and_bias("mm.2", "merger.linear_fc2", (vision.out_hidden_size, wide))
    for number, layer in enumerate(vision.deepstack_indexes):
        source = f"deepstack_merger_list.{number}"
        name = f"v.deepstack.{layer}"  # llama.cpp counts by vision layer, not by merger
        planned += _weight_and_bias(f"{name}.norm", f"{source}.norm", (wide,))
        planned += _weight_and_bias(f"{name}.fc1", f"{source}.linear_fc1", (wide, wide))
        fc2 = (vision.out_hidden_size, wide)
        planned += _weight_and_bias(f"{name}.fc2", f"{source}.linear_fc2", fc2)
    return planned


def check_tensors(
    tensors: Mapping[str, TensorInfo], planned: Sequence[Planned], config: ModelConfig, path: str
) -> None:
    """Every planned tensor is in the checkpoint in its shape, and nothing else is.

    Errors: ExportError naming the first tensor that is missing, misshapen or unknown.
    """
    for each in planned:
        info = tensors.get(each.source)
        if info is None:
            raise ExportError(
                f"{path}: tensor {each.source} is missing: the checkpoint is incomplete"
            )
        if tuple(info.shape) != each.source_shape:
            raise ExportError(
                f"{path}: tensor {each.source} has shape {list(info.shape)}, "
                f"its config says {list(each.source_shape)}: they are not from one model"
            )
    used = {each.source for each in planned}
    if config.text.tie_word_embeddings:
        used.add(_LM_HEAD)  # a copy of the embedding that some trainers save
    for name in tensors:
        if name not in used and not name.endswith(_DERIVED_SUFFIX):
            raise ExportError(
                f"{path}: tensor {name} belongs to no part of Qwen3-VL: "
                "merge or remove what was added to the model"
            )


def _planned(name: str, source: str, shape: tuple[int, ...]) -> Planned:
    return Planned(name=name, source=source, source_shape=shape)


def _weight_and_bias(name: str, source: str, shape: tuple[int, ...]) -> list[Planned]:
    source = _VISION + source
    return [
        _planned(f"{name}.weight", f"{source}.weight", shape),
        _planned(f"{name}.bias", f"{source}.bias", shape[:1]),
    ]


def _layer(text: TextConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    hidden, inner, head = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_heads * head, text.num_kv_heads * head
    return {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (queries, hidden)),
        "attn_q_norm": ("self_attn.q_norm", (head,)),
        "attn_k": ("self_attn.k_proj", (keys, hidden)),
        "attn_k_norm": ("self_attn.k_norm", (head,)),
        "attn_v": ("self_attn.v_proj", (keys, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, queries)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }


def _vision_block(vision: VisionConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    return {
        "ln1": ("norm1", (hidden,)),
        "attn_qkv": ("attn.qkv", (3 * hidden, hidden)),
        "attn_out": ("attn.proj", (hidden, hidden)),
        "ln2": ("norm2", (hidden,)),
        "ffn_up": ("mlp.linear_fc1", (inner, hidden)),
        "ffn_down": ("mlp.linear_fc2", (hidden, inner)),
    }


def _patch_tensors(vision: VisionConfig) -> list[Planned]:
    if vision.temporal_patch_size != 2:
        raise ExportError(
            f"temporal_patch_size is {vision.temporal_patch_size}: llama.cpp knows only 2"
        )
    size = vision.patch_size
    source = f"{_VISION}patch_embed.proj.weight"
    shape = (vision.hidden_size, vision.in_channels, 2, size, size)
    return [
        Planned(name="v.patch_embd.weight", source=source, source_shape=shape, frame=0),
        Planned(name="v.patch_embd.weight.1", source=source, source_shape=shape, frame=1),
        _planned("v.patch_embd.bias", f"{_VISION}patch_embed.proj.bias", (vision.hidden_size,)),
    ]
