"""The metadata keys of the two GGUF files, as llama.cpp's own converter writes them.

No key is written for the pixel limits: llama.cpp has none for Qwen3-VL, they travel in our
manifest. Source: llama.cpp, conversion/base.py and conversion/qwen3vl.py.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medmo_edge.checkpoint import Checkpoint, TextConfig
from medmo_edge.errors import ExportError
from medmo_edge.export.gguf_types import FILE_TYPES
from medmo_edge.export.gguf_vocab import read_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

# generation_config.json -> general.sampling.*: hints for other programs, our runtime reads its own.
_SAMPLING = {
    "top_k": "add_sampling_top_k",
    "top_p": "add_sampling_top_p",
    "min_p": "add_sampling_min_p",
    "temperature": "add_sampling_temp",
    "repetition_penalty": "add_sampling_penalty_repeat",
}


def add_language_keys(
    writer: "GGUFWriter",
    checkpoint: Checkpoint,
    *,
    weights: str,
    size_label: str,
    imatrix: Mapping[str, Any] | None = None,
) -> None:
    """Keys of the language file; ``imatrix`` says where an importance matrix came from."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    _add_sampling(writer, checkpoint.generation)
    writer.add_name(checkpoint.name)
    writer.add_size_label(size_label)
    _add_text_shape(writer, checkpoint.config.text)
    writer.add_num_deepstack_layers(len(checkpoint.config.vision.deepstack_indexes))
    writer.add_file_type(FILE_TYPES[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, checkpoint)
    for key, value in (imatrix or {}).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(f"quantize.imatrix.{key}", value)


def add_vision_keys(writer: "GGUFWriter", checkpoint: Checkpoint, *, size_label: str) -> None:
    """Keys of the mmproj file."""
    import gguf

    vision, preprocessing = checkpoint.config.vision, checkpoint.preprocessing
    writer.add_type(gguf.GGUFType.MMPROJ)
    _add_sampling(writer, checkpoint.generation)
    writer.add_name(checkpoint.name)
    writer.add_size_label(size_label)
    writer.add_file_type(FILE_TYPES["f16"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
    writer.add_vision_projection_dim(checkpoint.config.text.hidden_size)
    writer.add_vision_image_size(_table_side(vision.num_position_embeddings) * vision.patch_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_image_mean(preprocessing.image_mean)
    writer.add_vision_image_std(preprocessing.image_std)
    writer.add_vision_use_gelu(True)
    writer.add_vision_spatial_merge_size(vision.merge_size)
    # Qwen3-VL's LayerNorms use 1e-6, a constant of its code; llama.cpp takes the text model's.
    writer.add_vision_attention_layernorm_eps(checkpoint.config.text.rms_norm_eps)
    layers = [layer in vision.deepstack_indexes for layer in range(vision.depth)]
    writer.add_vision_is_deepstack_layers(layers)


def _add_sampling(writer: "GGUFWriter", generation: Mapping[str, Any]) -> None:
    for key, method in _SAMPLING.items():
        value = generation.get(key)
        if value is not None:
            getattr(writer, method)(value)


def _add_text_shape(writer: "GGUFWriter", text: TextConfig) -> None:
    writer.add_block_count(text.num_layers)
    writer.add_context_length(text.max_positions)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_rope_dimension_sections([*text.mrope_section, 0])
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)


def _add_vocabulary(writer: "GGUFWriter", checkpoint: Checkpoint) -> None:
    vocabulary = read_vocabulary(checkpoint)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, index in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    # The chat template writes every special token itself.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(checkpoint.chat_template)


def _table_side(positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise ExportError(f"{positions} vision positions are no square table: llama.cpp needs one")
    return side
