"""Qwen3-VL's layers as torch functions of one layer's weights, which tell who reads what.

The same operations in the same order as transformers' classes (models/qwen3_vl/modeling_qwen3_vl.py
of 5.23, sdpa attention), so results agree to the bit where the matrix kernels do; only the patch
embedding is written as the matrix product that its convolution is. One prompt or image at a time:
no padding, no cache, no dropout, no gradients.

Shape suffixes: L prompt tokens, N patches, D hidden size, H heads, K head size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medmo_edge.model_config import TextConfig, VisionConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VISION_EPS = 1e-6  # fixed in the reference, not in config.json
VISION_ROPE_THETA = 10000.0

#: called with the names of the linears that read the same input, and that input [rows, in]
Watch = Callable[[tuple[str, ...], "Tensor"], None]
Rope = tuple["Tensor", "Tensor"]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer under their names within it, and who watches its linears, if anyone."""

    weights: "Mapping[str, Tensor]"
    watch: Watch | None = None

    def linear(self, name: str, x: "Tensor") -> "Tensor":
        """``x`` [..., in] through the linear ``name``, with its bias where it has one."""
        from torch.nn.functional import linear

        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def seen(self, x: "Tensor", *names: str) -> "Tensor":
        """``x`` itself, after telling the watcher that the linears ``names`` read it."""
        if self.watch:
            self.watch(names, x.reshape(-1, x.shape[-1]))
        return x


def patch_embedding(layer: Layer, patches_NP: "Tensor", positions_ND: "Tensor") -> "Tensor":
    """Patches to [N, D], with their interpolated position embeddings added."""
    from torch.nn.functional import linear

    weight = layer.weights["patch_embed.proj.weight"].flatten(1)
    x = layer.seen(patches_NP.to(weight.dtype), "patch_embed.proj")
    embedded = linear(x, weight, layer.weights["patch_embed.proj.bias"])
    return embedded + positions_ND.to(embedded.dtype)


def vision_block(layer: Layer, x_ND: "Tensor", rope: Rope, config: VisionConfig) -> "Tensor":
    """One block over the patches of one image; ``rope`` is cos and sin [N, K] in float32."""
    x_ND = x_ND + _vision_attention(layer, _layer_norm(layer, "norm1", x_ND), rope, config)
    inner = layer.seen(_layer_norm(layer, "norm2", x_ND), "mlp.linear_fc1")
    return x_ND + _vision_mlp(layer, "mlp", inner, "tanh")


def _vision_attention(layer: Layer, x_ND: "Tensor", rope: Rope, config: VisionConfig) -> "Tensor":
    from torch.nn.functional import scaled_dot_product_attention

    rows, heads = x_ND.shape[0], config.num_heads
    qkv = layer.linear("attn.qkv", layer.seen(x_ND, "attn.qkv"))
    q, k, v = qkv.reshape(rows, 3, heads, -1).permute(1, 0, 2, 3).unbind(0)
    cos, sin = (part.unsqueeze(-2) for part in rope)
    q, k = (_rotate(part.float(), cos, sin).to(qkv.dtype) for part in (q, k))
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
    mixed = scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    mixed = mixed.transpose(1, 2).reshape(rows, -1)
    return layer.linear("attn.proj", layer.seen(mixed, "attn.proj"))


def _vision_mlp(layer: Layer, name: str, x: "Tensor", approximate: str) -> "Tensor":
    from torch.nn.functional import gelu

    prefix = f"{name}." if name else ""
    inner = gelu(layer.linear(f"{prefix}linear_fc1", x), approximate=approximate)
    return layer.linear(f"{prefix}linear_fc2", layer.seen(inner, f"{prefix}linear_fc2"))


def merger(layer: Layer, x_ND: "Tensor", *, norm_last: bool) -> "Tensor":
    """Four patches to one token of the language model: [N, D] -> [N / 4, hidden].

    Deepstack mergers join the patches first and normalise afterwards (``norm_last``).
    """
    width = layer.weights["linear_fc1.weight"].shape[1]
    if norm_last:
        x = _layer_norm(layer, "norm", x_ND.reshape(-1, width))
    else:
        x = _layer_norm(layer, "norm", x_ND).reshape(-1, width)
    return _vision_mlp(layer, "", layer.seen(x, "linear_fc1"), "none")


def text_layer(layer: Layer, x_1LD: "Tensor", rope: Rope, config: TextConfig) -> "Tensor":
    """One decoder layer over a whole prompt; ``rope`` is cos and sin [1, L, K] in x's type."""
    eps, weights = config.rms_norm_eps, layer.weights
    x = rms_norm(x_1LD, weights["input_layernorm.weight"], eps)
    x_1LD = x_1LD + _text_attention(layer, x, rope, config)
    x = rms_norm(x_1LD, weights["post_attention_layernorm.weight"], eps)
    return x_1LD + _text_mlp(layer, layer.seen(x, "mlp.gate_proj", "mlp.up_proj"))


def _text_attention(layer: Layer, x: "Tensor", rope: Rope, config: TextConfig) -> "Tensor":
    from torch.nn.functional import scaled_dot_product_attention

    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layer.seen(x, *names)
    q, k, v = (layer.linear(name, x).view(1, x.shape[1], -1, config.head_dim) for name in names)
    q = rms_norm(q, layer.weights["self_attn.q_norm.weight"], config.rms_norm_eps)
    k = rms_norm(k, layer.weights["self_attn.k_norm.weight"], config.rms_norm_eps)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    cos, sin = (part.unsqueeze(1) for part in rope)
    mixed = scaled_dot_product_attention(
        _rotate(q, cos, sin),
        _rotate(k, cos, sin),
        v,
        is_causal=x.shape[1] > 1,
        scale=config.head_dim**-0.5,
        enable_gqa=config.num_heads != config.num_kv_heads,
    )
    mixed = mixed.transpose(1, 2).reshape(1, x.shape[1], -1)
    return layer.linear("self_attn.o_proj", layer.seen(mixed, "self_attn.o_proj"))


def _text_mlp(layer: Layer, x: "Tensor") -> "Tensor":
    from torch.nn.functional import silu

    inner = silu(layer.linear("mlp.gate_proj", x)) * layer.linear("mlp.up_proj", x)
    return layer.linear("mlp.down_proj", layer.seen(inner, "mlp.down_proj"))


def rms_norm(x: "Tensor", weight: "Tensor", eps: float) -> "Tensor":
    """Root mean square norm over the last axis, in float32 inside, in x's type outside."""
    import torch

    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _layer_norm(layer: Layer, name: str, x: "Tensor") -> "Tensor":
    from torch.nn.functional import layer_norm

    weight = layer.weights[f"{name}.weight"]
    return layer_norm(x, weight.shape, weight, layer.weights[f"{name}.bias"], VISION_EPS)


def _rotate(x: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
    import torch

    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


def vision_rope(rows_columns_N2: "Tensor", config: VisionConfig) -> Rope:
    """cos and sin [N, K] of patches at (row, column), float32."""
    import torch

    half = config.hidden_size // config.num_heads // 2
    steps = torch.arange(0, half, 2, dtype=torch.float, device=rows_columns_N2.device) / half
    angles = rows_columns_N2[..., None].float() * (1.0 / (VISION_ROPE_THETA**steps))
    return _doubled(angles.cos().flatten(1)), _doubled(angles.sin().flatten(1))


def text_rope(positions_3L: "Tensor", config: TextConfig, dtype: "torch.dtype") -> Rope:
    """cos and sin [1, L, K] of interleaved M-RoPE: time, then rows and columns every third."""
    import torch

    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=positions_3L.device)
    frequencies = 1.0 / (config.rope_theta ** (steps / config.head_dim))
    angles = positions_3L[..., None].float() * frequencies
    chosen = angles[0].clone()
    for axis in (1, 2):
        picked = slice(axis, config.mrope_section[axis] * 3, 3)
        chosen[:, picked] = angles[axis][:, picked]
    return _doubled(chosen.cos())[None].to(dtype), _doubled(chosen.sin())[None].to(dtype)


def _doubled(half: "Tensor") -> "Tensor":
    import torch

    return torch.cat((half, half), dim=-1)
