"""Attention as plain products: the same numbers and gradients as torch's own."""

import pytest

pytest.importorskip("torch")

import torch
from torch.nn.functional import scaled_dot_product_attention

from medmo_edge.train.attention import additive, products


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_same_values_and_gradients_as_the_fused_kernel(kv_heads: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(2, 4, 7, 8, generator=generator, requires_grad=True)
    key, value = (
        torch.randn(2, kv_heads, 7, 8, generator=generator, requires_grad=True) for _ in range(2)
    )
    seen = torch.rand(2, 1, 7, 7, generator=generator) > 0.4
    seen |= torch.eye(7, dtype=torch.bool)
    mask = additive(seen, torch.float32) if masked else None
    found, _ = products(torch.nn.Identity(), query, key, value, mask, scaling=8**-0.5)
    mine = torch.autograd.grad(found.square().sum(), (query, key, value))
    wanted = scaled_dot_product_attention(
        query, key, value, attn_mask=seen if masked else None, enable_gqa=True
    ).transpose(1, 2)
    theirs = torch.autograd.grad(wanted.square().sum(), (query, key, value))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_hidden_key_has_no_weight_at_all_even_in_bf16() -> None:
    scores = additive(torch.tensor([[True, False]]), torch.bfloat16)
    assert torch.softmax(scores, dim=1).tolist() == [[1.0, 0.0]]
