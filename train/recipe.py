"""Recipes: one TOML file that fixes everything a training run depends on, read into dataclasses.

An unknown key, a missing key or a value of the wrong type is a RecipeError, never a default. Here
are recipes that train a small model from nothing; ``stages`` has those that start from a
checkpoint. A recipe names no file: data come by argument.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Literal

from medmo_edge.errors import RecipeError
from medmo_edge.model_config import TextConfig, VisionConfig
from medmo_edge.train.recipe_toml import Document, Rules, build, parse, require
from medmo_edge.train.reinforcement import Reinforcement, parts_rule, stage_rules

PATCH, MERGE, TEMPORAL = 16, 2, 2  # Qwen3-VL's; a recipe cannot change the architecture's grid


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionModel:
    """Vision tower sizes; ``position_side`` is the side of the square position table."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    position_side: int
    deepstack_layers: tuple[int, ...]

    def config(self, out_hidden_size: int) -> VisionConfig:
        """The tower as a checkpoint's config has it; ``out_hidden_size`` is the text's width."""
        return VisionConfig(
            depth=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            patch_size=PATCH,
            temporal_patch_size=TEMPORAL,
            merge_size=MERGE,
            num_position_embeddings=self.position_side**2,
            out_hidden_size=out_hidden_size,
            deepstack_indexes=self.deepstack_layers,
            in_channels=3,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Byte-level BPE of ``bpe_size`` tokens and Qwen's special ones; ``vocab_size`` table rows."""

    bpe_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """How many ``phantoms`` there are to draw from; other pictures come from the data folder."""

    phantoms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """AdamW with linear warm-up and a cosine down to ``final_fraction`` of a stage's peak rate."""

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
    """A stretch of steps at one resolution; ``turn_tokens`` bounds a row without its picture.

    ``blood_share`` and ``radiology_share`` of the rows are smears and VQA-RAD pictures, the rest
    are phantoms. Phases of one ``stage`` that follow each other with the same ``learning_rate``
    share one schedule; another rate begins a new one, warm-up included (a warm restart).
    ``platelet_share`` of the smears are seen close to a platelet and asked about platelets alone.
    """

    stage: Literal["pretrain", "instruct"]
    learning_rate: float
    blood_share: float
    radiology_share: float
    platelet_share: float
    steps: int
    rows: int
    min_pixels: int
    max_pixels: int
    turn_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One schedule of the learning rate: ``steps`` steps from step ``first``, up to ``peak``."""

    first: int
    steps: int
    peak: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """Every how many steps the run is saved and looked at, and on how many phantoms."""

    save_every: int
    evaluate_every: int
    evaluation_phantoms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One whole run from nothing. Equal recipe, data and threads give the equal checkpoint.

    Phases belong to stages; a stage starts from the checkpoint of the one before it. The last may
    be ``rl``, which has no phases.
    """

    name: str
    seed: int
    threads: int
    text: TextConfig
    vision: VisionModel
    tokenizer: TokenizerSpec
    data: DataSpec
    optimizer: OptimizerSpec
    auxiliary: AuxiliarySpec
    rhythm: Rhythm
    phases: tuple[Phase, ...]
    rl: Reinforcement | None

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all phases and of the rl stage."""
        return sum(phase.steps for phase in self.phases) + (self.rl.steps if self.rl else 0)

    @property
    def warmup_steps(self) -> int:
        """Steps on the way to a schedule's peak, of a recipe of one stage."""
        return self.rl.warmup_steps if self.rl else self.optimizer.warmup_steps

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, in their order."""
        names = [*(phase.stage for phase in self.phases), *(["rl"] if self.rl else [])]
        return tuple(dict.fromkeys(names))

    def only(self, stage: str) -> "Recipe":
        """The recipe of one of its stages alone, which draws pictures of its own."""
        phases = tuple(phase for phase in self.phases if phase.stage == stage)
        seed = self.seed + _SEEDS_APART * self.stages.index(stage)
        rl = self.rl if stage == "rl" else None
        return dataclasses.replace(self, seed=seed, phases=phases, rl=rl)

    def phase_at(self, step: int) -> Phase:
        """The phase that ``step`` (from 0) belongs to; the last one for any later step."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def course_at(self, step: int) -> Course:
        """The schedule of ``step`` in a recipe of one stage; the last one for any later step."""
        if self.rl is not None:
            return Course(first=0, steps=self.rl.steps, peak=self.rl.learning_rate)
        course = Course(first=0, steps=0, peak=0.0)
        for peak, phases in groupby(self.phases, lambda phase: phase.learning_rate):
            first = course.first + course.steps
            course = Course(first=first, steps=sum(phase.steps for phase in phases), peak=peak)
            if step < first + course.steps:
                break
        return course

    @property
    def sha256(self) -> str:
        """Identity of the recipe, kept beside saved steps so that a resume cannot mix two runs."""
        values = dataclasses.asdict(self)
        values["text"] = {k: v for k, v in values["text"].items() if k not in _NOT_WRITTEN}
        if self.rl is None:  # as if no recipe could have one: saved runs keep their identity
            del values["rl"]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


_SEEDS_APART = 1000
# Fields of TextConfig that no [text] table says: they follow from the rest.
_NOT_WRITTEN = ("rms_norm_eps", "tie_word_embeddings", "vocab_size")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a packaged recipe ("nano", "smoke") or a TOML file that trains from nothing.

    Errors: RecipeError with the file, the line and the key that is wrong; also for a recipe of
    stages, which the loop of this package cannot run.
    """
    document = read_document(name_or_path)
    if is_staged(document):
        raise RecipeError(
            f"recipe {document.source} starts from the checkpoint {document.values.get('base')!r}, "
            "which cannot be trained here yet: see what it needs with --dry-run, or train nano"
        )
    return read_recipe(document)


def is_staged(document: Document) -> bool:
    """Whether the recipe starts from a checkpoint and goes through stages."""
    return "stages" in document.values or "base" in document.values


def read_recipe(document: Document) -> Recipe:
    """A recipe from nothing. Errors: RecipeError."""
    tokenizer = document.values.get("tokenizer")
    rows = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else 0
    fixed = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "vocab_size": rows}
    recipe: Recipe = build(Recipe, document, given={TextConfig: fixed})
    _check(recipe, document)
    return recipe


def read_document(name_or_path: str | Path) -> Document:
    """A packaged recipe by name, or a TOML file. Errors: RecipeError."""
    packaged = resources.files("medmo_edge.train") / f"{name_or_path}.toml"
    try:
        if "/" not in str(name_or_path) and packaged.is_file():
            text = packaged.read_text(encoding="utf-8")
        else:
            text = Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {name_or_path} cannot be read: give nano, smoke, medmo-4b, medmo-8b or a TOML "
            f"file ({error})"
        ) from error
    return parse(text, str(name_or_path))


def _check(recipe: Recipe, document: Document) -> None:
    """Values that would only fail hours later, or never and train nonsense."""
    token = (PATCH * MERGE) ** 2
    data, phases = recipe.data, recipe.phases
    rules = size_rules(recipe.text, recipe.vision) | {
        ("phases",): ("phases must not be empty", bool(phases)),
        ("data", "phantoms"): ("phantoms must be at least 1", data.phantoms >= 1),
    }
    for index, phase in enumerate(phases):
        positive = phase.steps > 0 and phase.rows > 0
        rules[("phases", index)] = (
            "phases need steps, rows and one vision token of pixels",
            positive and token <= phase.min_pixels <= phase.max_pixels,
        )
        rules[("phases", index, "blood_share")] = parts_rule(
            "blood_share", phase.blood_share, "radiology_share", phase.radiology_share
        )
        rules[("phases", index, "platelet_share")] = (
            "platelet_share must be in 0..1",
            0 <= phase.platelet_share <= 1,
        )
        before = phases[index - 1] if index else phase
        rules[("phases", index, "stage")] = (
            "pretrain must come before instruct",
            (before.stage, phase.stage) != ("instruct", "pretrain"),
        )
        rules[("phases", index, "learning_rate")] = (
            "learning_rate must be above 0",
            phase.learning_rate > 0,
        )
        tokens = phase.max_pixels // token + phase.turn_tokens
        rules[("phases", index, "max_pixels")] = fits(tokens, recipe.text)
    if recipe.rl is not None:
        rules |= stage_rules(recipe.rl, ("rl",))
    require(rules, document)


def size_rules(text: TextConfig, vision: VisionModel) -> Rules:
    """What the sizes of any Qwen3-VL must fulfil, under the path of the key that breaks it."""
    layers = range(vision.num_layers)
    return {
        ("text", "num_kv_heads"): (
            "num_heads must be a multiple of num_kv_heads",
            is_multiple(text.num_heads, text.num_kv_heads),
        ),
        ("text", "mrope_section"): (
            "mrope_section must sum to head_dim / 2",
            sum(text.mrope_section) * 2 == text.head_dim,
        ),
        ("vision", "hidden_size"): (
            "hidden_size must be a multiple of 4 * num_heads",
            is_multiple(vision.hidden_size, 4 * vision.num_heads),
        ),
        ("vision", "deepstack_layers"): (
            "deepstack_layers must be vision layers",
            all(layer in layers for layer in vision.deepstack_layers),
        ),
    }


def fits(tokens: int, text: TextConfig) -> tuple[str, bool]:
    """The rule that a row of ``tokens`` is no longer than the model's positions."""
    limit = text.max_positions
    problem = f"{tokens} tokens do not fit max_positions {limit}: lower max_pixels or the text"
    return problem, tokens <= limit


def is_multiple(value: int, of: int) -> bool:
    """Whether ``value`` is a positive multiple of ``of``."""
    return value > 0 and of > 0 and value % of == 0
