"""Resize, patches, grids and rope positions against transformers' own code."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from medmo_edge.errors import CheckpointError, ImageError, PromptError
from medmo_edge.preprocess import (
    Preprocessing,
    grid_thw,
    mrope_positions,
    num_vision_tokens,
    patchify,
    resize,
    smart_resize,
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

PROFILES = {
    "qwen3-vl": Preprocessing(),
    "nano": Preprocessing(min_pixels=4096, max_pixels=262144),
    "one size": Preprocessing(min_pixels=65536, max_pixels=65536),
    "qwen2-vl": Preprocessing(
        patch_size=14,
        min_pixels=3136,
        max_pixels=1003520,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    ),
    "other merge": Preprocessing(
        patch_size=8, merge_size=3, temporal_patch_size=1, min_pixels=576, max_pixels=57600
    ),
}

# One float32 rounding: the two reference processors differ from each other by as much.
TOLERANCE = 6e-8
CLIP_TOLERANCE = 2.4e-7


def reference(preprocessing: Preprocessing) -> Any:
    """transformers' Pillow image processor, which needs no torchvision."""
    pytest.importorskip("transformers", reason="the reference processor needs transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    return Qwen2VLImageProcessorPil(
        size={
            "shortest_edge": preprocessing.min_pixels,
            "longest_edge": preprocessing.max_pixels,
        },
        patch_size=preprocessing.patch_size,
        temporal_patch_size=preprocessing.temporal_patch_size,
        merge_size=preprocessing.merge_size,
        image_mean=list(preprocessing.image_mean),
        image_std=list(preprocessing.image_std),
    )


def noise(height: int, width: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(height * 10_000 + width)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def compare(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> None:
    """Assert that grid and values equal the reference processor's."""
    expected = reference(preprocessing)(images=[Image.fromarray(pixels)], return_tensors="np")
    resized = resize(pixels, preprocessing)
    grid = grid_thw(resized.shape[0], resized.shape[1], preprocessing)
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    values = patchify(resized, preprocessing)
    assert values.dtype == np.float32 and values.flags.c_contiguous
    assert values.shape == expected["pixel_values"].shape
    tolerance = CLIP_TOLERANCE if preprocessing.image_mean == CLIP_MEAN else TOLERANCE
    assert np.abs(values - expected["pixel_values"]).max() <= tolerance


SIZES = [
    (64, 64),
    (480, 640),
    (640, 480),
    (33, 1999),
    (1999, 33),
    (1, 1),
    (1, 200),
    (200, 1),
    (3, 50),
    (50, 3),
    (3, 3),
    (5, 7),
    (31, 1000),
    (997, 1009),
]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", SIZES)
def test_pixel_values_equal_transformers(profile: str, size: tuple[int, int]) -> None:
    compare(noise(*size), PROFILES[profile])


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    profile=st.sampled_from(["nano", "other merge"]),
)
def test_any_small_image_equals_transformers(height: int, width: int, profile: str) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    compare(noise(height, width), PROFILES[profile])


def test_real_images_equal_transformers(data_dir: Path) -> None:
    paths = sorted((data_dir / "bccd" / "images").iterdir())[:3]
    paths += sorted((data_dir / "vqa-rad").rglob("*.jpg"))[:5]
    assert len(paths) == 8
    for path in paths:
        with Image.open(path) as image:
            compare(np.asarray(image.convert("RGB")), PROFILES["qwen3-vl"])


def test_a_huge_image_equals_transformers() -> None:
    compare(noise(2500, 3300), PROFILES["nano"])


@given(
    height=st.integers(1, 70_000),
    width=st.integers(1, 70_000),
    profile=st.sampled_from(sorted(PROFILES)),
)
def test_smart_resize_equals_transformers(height: int, width: int, profile: str) -> None:
    pytest.importorskip("transformers", reason="the reference needs transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        smart_resize as expected,
    )

    p = PROFILES[profile]
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError):
            expected(height, width, p.factor, p.min_pixels, p.max_pixels)
        with pytest.raises(ImageError, match="longer than 200:1"):
            smart_resize(height, width, p)
        return
    new = smart_resize(height, width, p)
    assert new == expected(height, width, p.factor, p.min_pixels, p.max_pixels)
    grid = grid_thw(*new, p)
    assert num_vision_tokens(grid, p) == (new[0] // p.factor) * (new[1] // p.factor)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (1, 201), (201, 1)])
def test_impossible_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError):
        resize(np.zeros((*size, 3), np.uint8), Preprocessing())


@pytest.mark.parametrize("profile", ["qwen3-vl", "qwen2-vl"])
def test_normalisation_is_the_fast_processors(profile: str) -> None:
    """Bit for bit the arithmetic of transformers' torchvision processor, which checkpoints name.

    That class cannot be imported without torchvision, so its two lines are repeated here in torch:
    mean and std divided by the rescale factor, then subtract and divide.
    """
    torch = pytest.importorskip("torch", reason="the reference arithmetic needs torch")
    p = PROFILES[profile]
    levels = np.arange(256, dtype=np.uint8)
    side = p.factor
    images = [np.full((side, side, 3), level, np.uint8) for level in levels]
    ours = np.stack([patchify(image, p)[0] for image in images])  # [256, P]
    mean = torch.tensor(p.image_mean) * (1.0 / (1 / 255))
    std = torch.tensor(p.image_std) * (1.0 / (1 / 255))
    fast = (torch.arange(256).float()[:, None] - mean) / std  # [256, C]
    per_channel = ours.reshape(256, 3, -1)
    assert np.array_equal(per_channel, np.repeat(fast.numpy()[:, :, None], per_channel.shape[2], 2))
    # The Pillow processor rounds once more; no 16-bit model can see the difference.
    rescaled = (levels[:, None] * (1 / 255)).astype(np.float32)
    slow = (rescaled - np.array(p.image_mean, np.float32)) / np.array(p.image_std, np.float32)
    slower = torch.from_numpy(slow)
    if profile == "qwen3-vl":
        assert torch.equal(fast.bfloat16(), slower.bfloat16())
        assert torch.equal(fast.half(), slower.half())


def test_patches_by_hand() -> None:
    """Patch order and layout without the reference: four patches of one token are neighbours."""
    p = Preprocessing(patch_size=2, merge_size=2, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    rows = patchify(image, p)
    assert rows.shape == (8, 3 * 2 * 2 * 2)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]
    for row, (y, x) in zip(rows, corners, strict=True):
        patch = image[y : y + 2, x : x + 2].transpose(2, 0, 1)[:, None].repeat(2, axis=1)
        assert np.array_equal(row, patch.ravel().astype(np.float32) / np.float32(255))


def test_resize_accepts_views_and_keeps_fitting_images() -> None:
    p = PROFILES["nano"]
    pixels = noise(200, 300)
    flipped = pixels[::-1, :, ::-1]
    assert np.array_equal(resize(flipped, p), resize(flipped.copy(), p))
    fitting = noise(64, 96)
    assert np.array_equal(resize(fitting, p), fitting)
    assert resize(fitting[:, ::-1], p).flags.c_contiguous


IMAGE = 9
grids = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda hw: (1, 2 * hw[0], 2 * hw[1]))


@given(
    shapes=st.lists(grids, max_size=3), texts=st.lists(st.integers(1, 5), min_size=4, max_size=4)
)
def test_rope_positions_equal_transformers(
    shapes: Sequence[tuple[int, int, int]], texts: Sequence[int]
) -> None:
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    ids: list[int] = []
    for grid, text in zip(shapes, texts, strict=False):
        ids += [1] * text + [IMAGE] * (math.prod(grid) // 4)
    ids += [2] * texts[3]
    expected, delta = _rope_model().get_rope_index(
        input_ids=torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([[int(id == IMAGE) for id in ids]]),
        image_grid_thw=torch.tensor(shapes) if shapes else None,
    )
    positions, our_delta = mrope_positions(ids, shapes, IMAGE, 2)
    assert positions.dtype == np.int64
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert our_delta == int(delta)


def _rope_model() -> Any:
    """The real Qwen3VLModel without its weights: only the merge size is needed."""
    from types import SimpleNamespace

    transformers = pytest.importorskip("transformers", reason="the reference needs transformers")
    model = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLModel
    stand_in = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    )
    for name in ("get_rope_index", "get_vision_position_ids"):
        setattr(stand_in, name, getattr(model, name).__get__(stand_in))
    return stand_in


def test_rope_positions_of_a_prompt_that_ends_with_its_image() -> None:
    positions, delta = mrope_positions([1, 1] + [IMAGE] * 6, [(1, 4, 6)], IMAGE, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2],
        [0, 1, 2, 2, 2, 3, 3, 3],
        [0, 1, 2, 3, 4, 2, 3, 4],
    ]
    assert delta == -3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, IMAGE, IMAGE, IMAGE], "needs 4 image tokens in a row"),
        ([1, 1], "needs 4 image tokens in a row"),
        ([1, IMAGE, IMAGE, 1, IMAGE, IMAGE], "needs 4 image tokens in a row"),
        ([IMAGE] * 5, "for more than its 1 images"),
        ([IMAGE] * 4 + [1, IMAGE], "for more than its 1 images"),
    ],
)
def test_prompts_whose_image_tokens_do_not_fit(ids: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        mrope_positions(ids, [(1, 4, 4)], IMAGE, 2)


PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def test_processor_config_in_all_forms() -> None:
    read = Preprocessing.from_processor_config
    assert read(PROCESSOR) == Preprocessing()
    assert read({"image_processor": PROCESSOR, "video_processor": {}}) == Preprocessing()
    old = {**PROCESSOR, "size": None, "min_pixels": 65536, "max_pixels": 16777216}
    assert read(old) == Preprocessing()
    full = {"do_resize": True, "resample": 3, "rescale_factor": 0.00392156862745098}
    assert read(PROCESSOR | full) == Preprocessing()


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": None},
        {"size": {"height": 224, "width": 224}},
        {"size": 224},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"resample": 2},
        {"do_resize": False},
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"patch_size": 0},
        {"min_pixels": 100, "max_pixels": 50},
    ],
)
def test_processor_configs_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        Preprocessing.from_processor_config(PROCESSOR | change)
    assert "\n" not in str(caught.value)


def test_preprocessing_survives_a_manifest() -> None:
    p = PROFILES["qwen2-vl"]
    assert Preprocessing.from_dict(p.to_dict()) == p
    hashes = {profile.sha256 for profile in PROFILES.values()}
    assert len(hashes) == len(PROFILES)
    assert Preprocessing(min_pixels=4096).sha256 == Preprocessing(min_pixels=4096).sha256
