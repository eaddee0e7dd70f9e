"""Host inputs of the graphs against transformers' own functions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmo_edge.vision_inputs import VisionGeometry, merge_order, rope_cos_sin, vision_inputs

GRIDS = st.tuples(st.integers(1, 60), st.integers(1, 60))
# cos and sin of two libraries; angles reach a few thousand radians.
TOLERANCE = 1e-6


def geometry(head_dim: int = 64, side: int = 48, merge: int = 2) -> VisionGeometry:
    return VisionGeometry(head_dim=head_dim, num_position_embeddings=side * side, merge_size=merge)


def reference_taps(grid: tuple[int, int, int], shape: VisionGeometry) -> Any:
    torch = pytest.importorskip("torch")
    vision_utils = pytest.importorskip("transformers.vision_utils")
    return vision_utils.get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]),
        num_grid_per_side=int(shape.num_position_embeddings**0.5),
        align_corners=True,
        spatial_merge_size=shape.merge_size,
    )


@given(GRIDS, st.sampled_from([(2, 48), (1, 16), (3, 7)]))
def test_position_taps_are_those_of_transformers(
    blocks: tuple[int, int], merge_and_side: tuple[int, int]
) -> None:
    merge, side = merge_and_side
    shape = geometry(side=side, merge=merge)
    grid = (1, blocks[0] * merge, blocks[1] * merge)
    indexes, weights = reference_taps(grid, shape)
    made = vision_inputs(grid, shape)
    assert made.pos_idx.dtype == np.int64 and made.pos_weight.dtype == np.float32
    assert np.array_equal(made.pos_idx, indexes.numpy().T)
    np.testing.assert_allclose(made.pos_weight, weights.numpy().T, rtol=0, atol=2e-7)


def reference_rotary(grid: tuple[int, int, int], shape: VisionGeometry) -> Any:
    torch = pytest.importorskip("torch")
    vision_utils = pytest.importorskip("transformers.vision_utils")
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding

    config = Qwen3VLVisionConfig(hidden_size=2 * shape.head_dim, num_heads=2)
    positions = vision_utils.get_vision_position_ids(torch.tensor([grid]), shape.merge_size)
    return Qwen3VLVisionRotaryEmbedding(config)(torch.zeros(1), positions)


@pytest.mark.parametrize("head_dim", [32, 64, 72])
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 36), (1, 64, 6), (1, 130, 98)])
def test_vision_rotary_is_that_of_transformers(grid: tuple[int, int, int], head_dim: int) -> None:
    shape = geometry(head_dim=head_dim)
    made = vision_inputs(grid, shape)
    for mine, theirs in zip((made.cos, made.sin), reference_rotary(grid, shape), strict=True):
        assert mine.dtype == np.float32 and mine.shape == (grid[1] * grid[2], head_dim)
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=TOLERANCE)
        assert np.array_equal(mine[:, : head_dim // 2], mine[:, head_dim // 2 :])


def reference_rope(
    positions: NDArray[np.int64], head_dim: int, theta: float, section: tuple[int, int, int]
) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section)}
    config = Qwen3VLTextConfig(head_dim=head_dim, rope_parameters=rope)
    return Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))


@pytest.mark.parametrize(
    ("head_dim", "theta", "section"),
    [(128, 5e6, (24, 20, 20)), (64, 1e4, (12, 10, 10)), (64, 5e6, (14, 8, 10))],
)
def test_interleaved_rope_is_that_of_transformers(
    head_dim: int, theta: float, section: tuple[int, int, int]
) -> None:
    positions = np.random.default_rng(0).integers(0, 5000, (3, 2, 17))
    expected = reference_rope(positions, head_dim, theta, section)
    made = rope_cos_sin(positions, head_dim=head_dim, rope_theta=theta, mrope_section=section)
    for mine, theirs in zip(made, expected, strict=True):
        assert mine.shape == (2, 17, head_dim // 2) and mine.dtype == np.float32
        # One unit in the last place of a frequency turns into 2e-4 at position 5000.
        np.testing.assert_allclose(mine, theirs.numpy()[..., : head_dim // 2], rtol=0, atol=5e-4)
        np.testing.assert_allclose(
            np.median(np.abs(mine - theirs.numpy()[..., : head_dim // 2])), 0, atol=1e-7
        )


def test_positions_without_a_batch_axis_and_a_hand_computed_angle() -> None:
    positions = np.array([[3], [5], [7]])
    cos, sin = rope_cos_sin(positions, head_dim=16, rope_theta=10000.0, mrope_section=(4, 2, 2))
    # Axes of the 8 frequencies: T H W T H W T T.
    used = np.array([3, 5, 7, 3, 5, 7, 3, 3])
    angle = used * 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(cos, np.cos(angle)[None], atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle)[None], atol=1e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_merge_order_keeps_the_patches_of_a_token_together(h: int, w: int, merge: int) -> None:
    rows, columns = np.indices((h * merge, w * merge))
    tokens = merge_order(rows // merge * w + columns // merge, merge).reshape(h * w, merge**2)
    assert np.array_equal(tokens, np.repeat(np.arange(h * w)[:, None], merge**2, axis=1))
    inside = merge_order(rows % merge * merge + columns % merge, merge).reshape(h * w, merge**2)
    assert np.array_equal(inside, np.tile(np.arange(merge**2), (h * w, 1)))


def test_geometry_from_the_facts_of_a_manifest() -> None:
    facts = {"hidden_size": 1152, "num_heads": 16, "num_position_embeddings": 2304, "merge_size": 2}
    assert VisionGeometry.from_manifest(facts) == geometry(head_dim=72)
