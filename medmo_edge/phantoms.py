"""Drawn chest radiographs (phantoms) with known lesions, from a seed and numpy alone.

They stand in for patient pictures in tests, the demo and the training of MedMO-nano: every box and
fact is exact, because the lesion was put there. They do not simulate X-ray physics and show no
patient; a model that reads phantoms has proved nothing about radiographs.

Drawing works in fractions: u = x / width and v = y / height in [0, 1], brightness in [0, 1] with
dense tissue bright (MONOCHROME2). Anatomy, findings and noise have a random stream each, so the
same seed without findings is the same chest, healthy.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box

NODULE, EFFUSION, HEART = "nodule", "effusion", "heart"
CLEAR_NODULE = (0.125, 0.22)  # diameter as a fraction of the width
ENLARGED_RATIO = 0.5  # heart width / chest width, the radiologist's cardiothoracic ratio
MIN_SIDE = 64

Map = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Phantom:
    """One drawn radiograph: pixels [H, W] uint8, boxes in its pixels, and what is true of it.

    ``boxes`` holds the findings (nodule, effusion), ``anatomy`` the heart. ``facts``: "nodules" and
    "effusions" (counts), "heart_enlarged" (bool), "cardiothoracic_ratio" (float).
    """

    pixels: NDArray[np.uint8]
    boxes: tuple[Box, ...]
    anatomy: tuple[Box, ...]
    facts: Mapping[str, int | float | bool]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chest:
    """Where things are in one drawn chest, in fractions; lungs are (left edge first) ellipses."""

    u: Map
    v: Map
    axis: float
    width: float
    lungs: tuple[tuple[float, float, float, float], ...]
    domes: tuple[tuple[float, float], ...]
    heart: tuple[float, float, float, float]


def draw(
    seed: int,
    *,
    size: tuple[int, int] = (512, 576),
    nodule: bool | None = None,
    effusion: bool | None = None,
    heart_enlarged: bool | None = None,
    nodule_diameter: tuple[float, float] = CLEAR_NODULE,
) -> Phantom:
    """Draw the phantom of ``seed`` at ``size`` (width, height) in pixels.

    ``nodule``, ``effusion`` and ``heart_enlarged`` force a finding; None leaves it to the seed
    (present in one of two, one of three and one of three phantoms). ``nodule_diameter`` is its
    range as a part of the width. Errors: ValueError below 64 pixels a side.
    """
    width, height = size
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"a phantom needs at least {MIN_SIDE} pixels a side, not {width} x {height}"
        )
    anatomy, findings, noise = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3)
    )
    enlarged = bool(anatomy.random() < 1 / 3) if heart_enlarged is None else heart_enlarged
    chest = _lay_out(anatomy, width, height, enlarged)
    picture, lungs = _draw_anatomy(chest, anatomy)
    boxes: list[Box] = []
    wanted = (findings.random() < 1 / 3, findings.random() < 1 / 2)
    fluid_side = int(findings.integers(2))
    fluid = _effusion(chest, lungs[fluid_side], fluid_side, findings)
    if wanted[0] if effusion is None else effusion:
        picture = picture + (0.72 - picture) * fluid
        boxes.append(_box_of(EFFUSION, fluid > 0.35))
    side = 1 - fluid_side if boxes else int(findings.integers(2))
    spot, xyxy = _nodule(chest, side, findings, nodule_diameter)
    if wanted[1] if nodule is None else nodule:
        picture = picture + spot
        boxes.append(Box(NODULE, *xyxy))
    heart = _heart_box(chest)
    return Phantom(
        pixels=_expose(picture, noise),
        boxes=tuple(sorted(boxes, key=lambda box: box.label, reverse=True)),
        anatomy=(heart,),
        facts=_facts(boxes, chest, enlarged),
        seed=seed,
    )


def _lay_out(rng: np.random.Generator, width: int, height: int, enlarged: bool) -> _Chest:
    v: Map = np.tile(((np.arange(height) + 0.5) / height)[:, None], width).astype(np.float32)
    u: Map = np.tile((np.arange(width) + 0.5) / width, (height, 1)).astype(np.float32)
    axis = 0.5 + rng.uniform(-0.03, 0.03)
    half = rng.uniform(0.36, 0.42)  # from the spine to the inner chest wall
    top, length = rng.uniform(0.10, 0.16), rng.uniform(0.58, 0.68)
    lungs, domes = [], []
    for sign in (-1, 1):
        reach = half * rng.uniform(0.94, 1.0)
        lungs.append((axis + sign * reach * 0.56, top + length * 0.62, reach * 0.44, length * 0.62))
        domes.append((top + length * rng.uniform(0.92, 1.02) - 0.02 * sign, rng.uniform(0.7, 1.3)))
    ratio = rng.uniform(0.53, 0.62) if enlarged else rng.uniform(0.36, 0.46)
    heart_half = ratio * half
    heart_v = min(dome for dome, _ in domes) - rng.uniform(0.08, 0.12)
    heart_height = heart_half * width / height * rng.uniform(0.8, 1.0)
    heart = (axis + heart_half * rng.uniform(0.28, 0.42), heart_v, heart_half, heart_height)
    return _Chest(
        u=u, v=v, axis=axis, width=half, lungs=tuple(lungs), domes=tuple(domes), heart=heart
    )


def _draw_anatomy(chest: _Chest, rng: np.random.Generator) -> tuple[Map, tuple[Map, Map]]:
    """The healthy picture and the soft mask of each lung."""
    u, v = chest.u, chest.v
    body = _soft(_ellipse(u, v, chest.axis, 0.72, chest.width * 1.22, 0.80), 0.02)
    neck = _soft(np.abs(u - chest.axis) - 0.13 - 0.05 * v, 0.015)
    body = np.maximum(body, neck)
    picture = 0.04 + body * (rng.uniform(0.46, 0.54) + 0.10 * v)
    lungs = (_lung(chest, 0), _lung(chest, 1))
    air = np.maximum(lungs[0], lungs[1])
    picture = picture * (1 - air * rng.uniform(0.60, 0.70))
    picture = picture + air * _vessels(chest, rng)
    picture = picture + _ribs(chest, rng) * (0.35 + 0.65 * air) * body
    spine = np.exp(-(((u - chest.axis) / 0.045) ** 2)).astype(np.float32)
    picture = picture + 0.16 * spine * (1 + 0.15 * np.cos(v * 2 * np.pi * 17)) * body
    middle = _soft(np.abs(u - chest.axis) - 0.055 - 0.03 * v, 0.012) * body
    heart = _soft(_ellipse(u, v, *chest.heart) * chest.heart[2], 0.008)
    dense = np.maximum(middle * 0.55, heart)
    picture = picture + (0.70 - picture) * dense * 0.85
    return picture.astype(np.float32), lungs


def _lung(chest: _Chest, side: int) -> Map:
    shape = _soft(_ellipse(chest.u, chest.v, *chest.lungs[side]) * chest.lungs[side][2], 0.008)
    dome, bend = chest.domes[side]
    outward = chest.u - (chest.lungs[side][0] - (0.04 if side else -0.04))
    floor = dome - 0.05 + bend * outward**2 * 2.5
    return shape * _soft(chest.v - floor, 0.006)


def _ribs(chest: _Chest, rng: np.random.Generator) -> Map:
    """Nine arches each side, falling outwards, and two collar bones."""
    away = np.abs(chest.u - chest.axis) / chest.width
    start, step = rng.uniform(0.05, 0.09), rng.uniform(0.075, 0.088)
    slope, thick = rng.uniform(0.10, 0.16), rng.uniform(0.010, 0.014)
    fall = slope * away * away - 0.04 * np.sin(np.pi * away)
    ribs = np.zeros_like(chest.u)
    for index in range(9):
        line = start + index * step + fall
        ribs += _band(chest.v - line, thick)
    collar = 0.13 - 0.07 * away + rng.uniform(-0.01, 0.01)
    bones = _band(chest.v - collar, 0.012) * (away > 0.15)
    arches = ribs * (away > 0.12) * (away < 1.12) * rng.uniform(0.06, 0.10)
    return np.asarray(arches + 0.13 * bones * (away < 1.2), np.float32)


def _vessels(chest: _Chest, rng: np.random.Generator) -> Map:
    """Thin bright branches that leave each hilum and fade outwards."""
    branches = np.zeros_like(chest.u)
    for sign in (-1, 1):
        hilum_u, hilum_v = chest.axis + sign * 0.11, rng.uniform(0.42, 0.48)
        du, dv = (chest.u - hilum_u) * sign, chest.v - hilum_v
        distance = np.hypot(du, dv) + 1e-6
        angle = np.arctan2(dv, du)
        for _ in range(7):
            bend = rng.uniform(-1.3, 1.4) + rng.uniform(-1.2, 1.2) * distance
            across = np.abs(angle - bend) * distance
            branches += np.exp(-((across / 0.007) ** 2)) * np.exp(-distance / 0.16)
        branches += 0.8 * np.exp(-((distance / 0.05) ** 2))
    return (0.11 * np.minimum(branches, 1.6)).astype(np.float32)


def _effusion(chest: _Chest, lung: Map, side: int, rng: np.random.Generator) -> Map:
    """Soft mask of fluid that fills one lung's base and climbs the outer wall (the meniscus)."""
    outward = (chest.u - chest.lungs[side][0]) * (1 if side else -1) / chest.lungs[side][2]
    level = chest.domes[side][0] - 0.05 - rng.uniform(0.06, 0.19)
    climb = rng.uniform(0.05, 0.12) * np.clip(outward, 0, 1.2) ** 2
    return lung * _soft(level - climb - chest.v, 0.006)


def _nodule(
    chest: _Chest, side: int, rng: np.random.Generator, diameter: tuple[float, float]
) -> tuple[Map, tuple[float, float, float, float]]:
    """Brightness to add for one round lesion inside a lung, and its exact box in pixels."""
    height, width = chest.u.shape
    across = rng.uniform(*diameter)
    radius_u = across / 2
    radius_v = across / 2 * width / height * rng.uniform(0.85, 1.15)
    lung_u, lung_v, reach_u, _ = chest.lungs[side]
    room = max(reach_u - radius_u, 0.02)
    center_u = lung_u + rng.uniform(-0.6, 0.6) * room
    floor = chest.domes[side][0] - 0.09
    center_v = rng.uniform(min(0.26, floor - radius_v - 0.05), floor - radius_v)
    # The profile ends at the box: nothing of the lesion lies outside.
    distance = _ellipse(chest.u, chest.v, center_u, center_v, radius_u, radius_v) + 1
    profile = np.clip((1 - distance) / 0.22, 0, 1)
    spot = rng.uniform(0.20, 0.32) * profile * profile * (3 - 2 * profile)
    return spot.astype(np.float32), _inside(center_u, center_v, radius_u, radius_v, width, height)


def _expose(picture: Map, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Detector side: contrast, slow shading, grain as coarse at any size, quantisation."""
    height, width = picture.shape
    gain, gamma = rng.uniform(0.95, 1.15), rng.uniform(0.85, 1.15)
    shading = _stretch(rng.normal(0, 0.012, (7, 6)), height, width)
    grain = _stretch(rng.normal(0, 0.010, (160, 144)), height, width)
    value = np.clip(picture * gain + shading + grain, 0, 1) ** gamma
    value = value + rng.normal(0, 0.008, picture.shape)
    return np.asarray(np.clip(np.rint(value * 255), 0, 255), np.uint8)


def _stretch(coarse: NDArray[np.float64], height: int, width: int) -> Map:
    """Bilinear enlargement of a coarse map to [height, width]."""
    rows = np.linspace(0, coarse.shape[0] - 1, height)
    columns = np.linspace(0, coarse.shape[1] - 1, width)
    top, left = rows.astype(int), columns.astype(int)
    bottom = np.minimum(top + 1, coarse.shape[0] - 1)
    right = np.minimum(left + 1, coarse.shape[1] - 1)
    across = coarse[:, left] * (1 - (columns - left)) + coarse[:, right] * (columns - left)
    down = (rows - top)[:, None]
    return np.asarray(across[top] * (1 - down) + across[bottom] * down, np.float32)


def _ellipse(u: Map, v: Map, center_u: float, center_v: float, half_u: float, half_v: float) -> Map:
    """Relative distance to an ellipse: -1 in the middle, 0 on the line."""
    inner = ((u - center_u) / half_u) ** 2 + ((v - center_v) / half_v) ** 2
    return np.asarray(np.sqrt(inner) - 1, np.float32)


def _soft(distance: Map, edge: float) -> Map:
    """1 inside (negative distance), 0 outside, a logistic edge between."""
    return np.asarray(1 / (1 + np.exp(np.clip(distance / edge, -30, 30))), np.float32)


def _band(distance: Map, half: float) -> Map:
    """A flat-topped stripe of half width ``half``."""
    square = (distance / half) ** 2
    return np.exp(-square * square)


def _box_of(label: str, mask: NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(
        label, float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
    )


def _heart_box(chest: _Chest) -> Box:
    height, width = chest.u.shape
    return Box(HEART, *_inside(*chest.heart, width, height))


def _inside(
    u: float, v: float, half_u: float, half_v: float, width: int, height: int
) -> tuple[float, float, float, float]:
    """Box in pixels of an ellipse in fractions; the edge of a very wide or tall picture cuts it."""
    left, right = max(u - half_u, 0.0) * width, min(u + half_u, 1.0) * width
    top, bottom = max(v - half_v, 0.0) * height, min(v + half_v, 1.0) * height
    return left, top, right, bottom


def _facts(boxes: list[Box], chest: _Chest, enlarged: bool) -> dict[str, int | float | bool]:
    return {
        "nodules": sum(box.label == NODULE for box in boxes),
        "effusions": sum(box.label == EFFUSION for box in boxes),
        "heart_enlarged": enlarged,
        "cardiothoracic_ratio": round(chest.heart[2] / chest.width, 3),
    }
