"""Attention within each sample of a packed row, without a mask over the whole row.

The library's fused attention computes every pair of a row's tokens and hides those of different
samples, which for ten samples in a row is ten times the work. Here each sample is attended to by
itself, by the same kernel. Everything else (padded batches, generation with a cache, masks of the
caller's) goes to the library as before. With flash_attention_2 none of this is needed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "medmo_edge_packed"
_SPANS = "_medmo_edge_spans"  # kept on the position tensor that all layers of a pass share


def attend(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    position_ids: "torch.Tensor | None" = None,
    **options: Any,
) -> "tuple[torch.Tensor, None]":
    """Causal attention for q [B, H, L, D] and k, v [B, H / groups, S, D]; gives [B, L, H, D].

    Without a mask ``position_ids`` [1, L] say where samples begin.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as library

    spans = [query.shape[2]]
    if attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]:
        spans = _spans(position_ids)
    if len(spans) == 1:
        whole: Any = library(module, query, key, value, attention_mask, **options)
        return whole[0], None
    parts = zip(*(torch.split(one, spans, 2) for one in (query, key, value)), strict=True)
    seen: Any = [library(module, q, k, v, None, **options)[0] for q, k, v in parts]
    return torch.cat(seen, dim=1), None


def _spans(position_ids: "torch.Tensor") -> list[int]:
    """Lengths of the stretches in which positions count up by one; one for a batch of rows."""
    if position_ids.shape[0] != 1:
        return [position_ids.shape[1]]
    found: list[int] | None = getattr(position_ids, _SPANS, None)
    if found is None:
        breaks = (position_ids[0].diff() != 1).nonzero()[:, 0].add(1).tolist()
        edges = [0, *breaks, position_ids.shape[1]]
        found = [end - start for start, end in zip(edges, edges[1:], strict=False)]
        setattr(position_ids, _SPANS, found)  # one wait for the device a pass, not one a layer
    return found


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: "torch.Tensor | None" = None,
    use_vmap: bool = False,
    **options: Any,
) -> "torch.Tensor | None":
    """No mask for a row without padding and cache, which ``attend`` cuts up; else the library's."""
    from transformers.masking_utils import sdpa_mask

    if batch_size == 1 and q_length == kv_length and attention_mask is None and not use_vmap:
        return None
    made: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **options,
    )
    return made


def use_packed(model: Any) -> None:
    """Let the language model of ``model`` attend within samples, if it uses the library's sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.model.language_model.config
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, mask)
        config._attn_implementation = NAME
