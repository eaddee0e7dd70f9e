"""How each tensor of a GGUF file is stored: llama.cpp's own mixtures for the targets we offer.

A table of rules instead of a call, because llama.cpp decides types only while it quantises a file
that already exists. Tests hold the rules against llama_model_quantize, tensor by tensor. Source:
llama.cpp, src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback) and
conversion/base.py (what stays F32).
"""

from dataclasses import dataclass

from medmo_edge.export.gguf_names import Planned

# Numbers of llama.h's enum llama_ftype, written as general.file_type.
FILE_TYPES = {
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q4_k_m": 15,
    "iq4_xs": 30,
}
_BASE_TYPES = {
    "f16": "F16",
    "bf16": "BF16",
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q4_k_m": "Q4_K",
    "iq4_xs": "IQ4_XS",
}
_BLOCK = {"Q8_0": 32, "Q5_1": 32, "Q5_0": 32, "IQ4_NL": 32, "F16": 1, "BF16": 1, "F32": 1}
_SUPER_BLOCK = 256
_FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "IQ4_XS": "IQ4_NL"}
_WIDE_GROUPS = 4  # query heads per key head from which attn_v is worth more bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What the choice of types depends on, apart from the tensor itself."""

    weights: str
    num_layers: int
    heads_per_kv_head: int
    is_tied: bool
    has_imatrix: bool = False


def language_type(tensor: Planned, mixture: Mixture) -> str:
    """GGML type name of one tensor of the language file."""
    if len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight"):
        return "F32"
    return wanted_type(tensor.name, tensor.shape[-1], mixture)[1]


def wanted_type(name: str, row: int, mixture: Mixture) -> tuple[str, str]:
    """(type the mixture wants, type that fits rows of ``row`` values) of one matrix."""
    base = _BASE_TYPES[mixture.weights]
    if base in ("F16", "BF16"):
        return base, base
    is_output = name == "output.weight" or (name == "token_embd.weight" and mixture.is_tied)
    wanted = _output_type(base) if is_output else _matrix_type(name, base, mixture)
    if is_output and row % block_size(base):
        return wanted, _that_fits("Q8_0", row)
    return wanted, _that_fits(wanted, row)


def vision_type(tensor: Planned) -> str:
    """GGML type name of one tensor of the mmproj file: 16 bit for matrices, F32 for the rest."""
    is_matrix = len(tensor.shape) > 1 and tensor.name.endswith((".weight", ".weight.1"))
    if not is_matrix or tensor.name == "v.position_embd.weight":
        return "F32"
    # The second patch kernel's name does not end in ".weight", yet llama.cpp writes both as F16.
    return "F16"


def block_size(kind: str) -> int:
    """Values that are quantised together; rows must be a multiple of it."""
    return _BLOCK.get(kind, _SUPER_BLOCK)


def _output_type(base: str) -> str:
    return base if base == "Q8_0" else "Q6_K"


def _matrix_type(name: str, base: str, mixture: Mixture) -> str:
    if ".attn_v." in name:
        return _attn_v_type(_layer_of(name), base, mixture)
    if ".ffn_down." in name:
        return _ffn_down_type(_layer_of(name), base, mixture)
    return base


def _attn_v_type(layer: int, base: str, mixture: Mixture) -> str:
    if mixture.weights in ("q4_k_m", "q5_k_m") and _gets_more_bits(layer, mixture.num_layers):
        return "Q6_K"
    if mixture.weights == "iq4_xs" and mixture.heads_per_kv_head >= _WIDE_GROUPS:
        return "Q5_K"
    return base


def _ffn_down_type(layer: int, base: str, mixture: Mixture) -> str:
    if mixture.weights in ("q4_k_m", "q5_k_m") and _gets_more_bits(layer, mixture.num_layers):
        return "Q6_K"
    is_early = layer < mixture.num_layers // 8
    if mixture.weights == "iq4_xs" and is_early and not mixture.has_imatrix:
        return "Q5_K"
    return base


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth and every third layer between (llama.cpp: use_more_bits)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


def _that_fits(kind: str, row: int) -> str:
    """``kind``, or what llama.cpp falls back to when rows are no multiple of its block."""
    if row % block_size(kind) == 0:
        return kind
    kind = _FALLBACK.get(kind, kind)
    return kind if row % block_size(kind) == 0 else "F16"
