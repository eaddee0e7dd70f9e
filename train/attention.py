"""Attention for short rows on a CPU: three matrix products, instead of the fused kernel.

At a few hundred tokens and in bf16 the fused CPU kernel of torch 2.13 makes a whole training step
cost 1.4 times as much, most of it in the backward pass. Training alone uses this; checkpoints are
asked with the library's own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "medmo_edge_products"
HIDDEN = -30000.0  # added to hidden scores: exp of it is 0, and bf16 holds it


def products(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    scaling: float = 1.0,
    **_: Any,
) -> "tuple[torch.Tensor, None]":
    """softmax(q k' scaling + mask) v for q [B, H, L, D] and k, v [B, H / groups, S, D].

    ``attention_mask`` is added, [B, 1, L, S]; dropout is not supported. Gives [B, L, H, D].
    """
    import torch

    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, width)
    scores = torch.matmul(grouped, key.transpose(2, 3))
    if attention_mask is not None:
        by_head = scores.view(batch, heads, length, -1) + attention_mask
        scores = by_head.view_as(scores)
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
    return mixed.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def additive(visible: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """The boolean mask [B, 1, L, S] as scores to add."""
    import torch

    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, HIDDEN)


def use_products(model: Any) -> None:
    """Let ``model`` attend with ``products``, which takes an additive mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, products)
    for part in (model.model.language_model, model.model.visual):
        part.config._attn_implementation = NAME


def use_library(model: Any) -> None:
    """Back to the library's fused attention, e.g. to generate."""
    for part in (model.model.language_model, model.model.visual):
        part.config._attn_implementation = "sdpa"
