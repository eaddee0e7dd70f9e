"""Recipes: one TOML file that fixes everything a training run depends on, read into dataclasses.

An unknown key, a missing key or a value of the wrong type is a RecipeError, never a default. Only
the supervised recipe exists so far. A recipe names no file: data come by argument.
"""

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from medmo_edge.errors import RecipeError

PATCH, MERGE, TEMPORAL = 16, 2, 2  # Qwen3-VL's; a recipe cannot change the architecture's grid


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """Language model sizes; ``mrope_section`` counts rotary frequencies (time, row, column)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionModel:
    """Vision tower sizes; ``position_side`` is the side of the square position table."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    position_side: int
    deepstack_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Byte-level BPE of ``bpe_size`` tokens and Qwen's special ones; ``vocab_size`` table rows."""

    bpe_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """What rows are drawn from: blood smears (a share in [0, 1]) and ``phantoms`` drawn once."""

    blood_share: float
    phantoms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """AdamW with linear warm-up and a cosine down to ``final_fraction`` of the peak rate."""

    learning_rate: float
    betas: tuple[float, ...]
    weight_decay: float
    warmup_steps: int
    final_fraction: float
    clip_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliarySpec:
    """Weights of the dense loss on vision tokens: class coverage, box corners, corner digits."""

    coverage: float
    corners: float
    digits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of steps at one resolution; ``turn_tokens`` bounds a row without its picture."""

    steps: int
    rows: int
    min_pixels: int
    max_pixels: int
    turn_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """Every how many steps the run is saved and looked at, and on how many phantoms."""

    save_every: int
    evaluate_every: int
    evaluation_phantoms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One whole run. Equal recipe, data and thread count give the equal checkpoint."""

    name: str
    seed: int
    threads: int
    text: TextModel
    vision: VisionModel
    tokenizer: TokenizerSpec
    data: DataSpec
    optimizer: OptimizerSpec
    auxiliary: AuxiliarySpec
    rhythm: Rhythm
    phases: tuple[Phase, ...]

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that ``step`` (from 0) belongs to; the last one for any later step."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    @property
    def sha256(self) -> str:
        """Identity of the recipe, kept beside saved steps so that a resume cannot mix two runs."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a packaged recipe ("nano", "smoke") or a TOML file.

    Errors: RecipeError with the file and the key that is wrong.
    """
    source, text = _read(name_or_path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {source} is not valid TOML: {error}") from error
    recipe: Recipe = _build(Recipe, values, source)
    _check(recipe, source)
    return recipe


def _read(name_or_path: str | Path) -> tuple[str, str]:
    packaged = resources.files("medmo_edge.train") / f"{name_or_path}.toml"
    try:
        if "/" not in str(name_or_path) and packaged.is_file():
            return str(name_or_path), packaged.read_text(encoding="utf-8")
        return str(name_or_path), Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {name_or_path} cannot be read: give nano, smoke or a TOML file ({error})"
        ) from error


def _build(kind: Any, values: Any, where: str) -> Any:
    """``values`` as an instance of the dataclass ``kind``; tables nest, arrays become tuples."""
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {where}: expected a table")
    hints = get_type_hints(kind)
    unknown, missing = sorted(values.keys() - hints.keys()), sorted(hints.keys() - values.keys())
    if unknown:
        raise RecipeError(f"recipe {where}: unknown key {unknown[0]!r}")
    if missing:
        raise RecipeError(f"recipe {where}: key {missing[0]!r} is missing")
    return kind(**{key: _value(hints[key], values[key], f"{where}: {key}") for key in values})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"recipe {where} must be a list")
        return tuple(_value(get_args(hint)[0], item, where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise RecipeError(f"recipe {where} must be of type {hint.__name__}, not {value!r}")
    return value


def _check(recipe: Recipe, source: str) -> None:
    """Values that would only fail hours later, or never and train nonsense."""
    text, vision = recipe.text, recipe.vision
    token = (PATCH * MERGE) ** 2
    rules = {
        "phases must not be empty": bool(recipe.phases),
        "text.num_heads must be a multiple of num_kv_heads": text.num_heads % text.num_kv_heads
        == 0,
        "text.mrope_section must sum to head_dim / 2": sum(text.mrope_section) * 2 == text.head_dim,
        "vision.hidden_size must be a multiple of 4 * num_heads": vision.hidden_size
        % (4 * vision.num_heads)
        == 0,
        "vision.deepstack_layers must be vision layers": all(
            0 <= layer < vision.num_layers for layer in vision.deepstack_layers
        ),
        "data.blood_share must be in 0..1": 0 <= recipe.data.blood_share <= 1,
        "data.phantoms must be at least 1": recipe.data.phantoms >= 1,
        "phases need steps, rows and one vision token of pixels": all(
            phase.steps > 0 and phase.rows > 0 and token <= phase.min_pixels <= phase.max_pixels
            for phase in recipe.phases
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise RecipeError(f"recipe {source}: {rule}")
