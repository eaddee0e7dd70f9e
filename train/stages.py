"""Recipes of stages: from a checkpoint through pretrain, instruct and rl, as MedMO was trained.

Stages are data: every setting of a stage is in the TOML file, under the same keys for all of one
kind. This module reads and checks them; it trains nothing. Settings that are not published are
marked in the files as ours.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from medmo_edge.errors import RecipeError
from medmo_edge.model_config import ModelConfig, TextConfig
from medmo_edge.samples import TASKS
from medmo_edge.train.recipe import (
    MERGE,
    PATCH,
    VisionModel,
    fits,
    is_multiple,
    is_staged,
    read_document,
    size_rules,
)
from medmo_edge.train.recipe_toml import Document, Rules, build, require, suggest, weights_rule
from medmo_edge.train.reinforcement import Curriculum, Groups, Objective, group_rules

Module = Literal["vision", "merger", "language"]
Kind = Literal["pretrain", "instruct", "rl"]
Sharding = Literal["none", "zero2", "zero3", "fsdp2"]
Augment = Literal["none", "geometric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the recipe is planned for; ``utilisation`` is the part of the peak that is reached."""

    devices: int
    device_memory_gib: float
    peak_teraflops: float
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """AdamW and its schedule; ``warmup_ratio`` is of the stage's steps.

    ``module_rates`` are learning rates of single modules, instead of ``learning_rate``.
    """

    learning_rate: float
    module_rates: dict[str, float]
    schedule: Literal["cosine", "linear", "constant"]
    warmup_ratio: float
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts(Groups):
    """Groups of answers for GRPO; tokens are means (``mean_*``) or bounds (``max_*``)."""

    max_prompt_tokens: int
    mean_completion_tokens: int
    engine: Literal["generate", "vllm-colocate", "vllm-server"]
    engine_memory: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A JSONL file of samples; ``path`` is relative to the data folder, ``weight`` to the others.

    ``tasks`` are the ones that are read, all when it is empty. ``augment`` "geometric" crops, flips
    and transposes pictures whose texts name no side.
    """

    path: str
    weight: float
    tasks: tuple[str, ...]
    augment: Augment


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One supervised stretch of training on ``samples`` samples, ``epochs`` times.

    ``rows`` samples a device and step, ``accumulation`` times. ``text_tokens`` and
    ``answer_tokens`` are means per sample, the second within the first. ``row_tokens`` is the
    budget of one packed row: short samples share it, none may need more. ``lora_rank`` 0 trains
    the modules in full. A state to resume from is kept every ``save_every`` steps. ``mixture``
    weighs the tasks, and ``data`` the files that have each.
    """

    name: str
    kind: Kind
    samples: int
    epochs: float
    min_pixels: int
    max_pixels: int
    text_tokens: int
    answer_tokens: int
    row_tokens: int
    trainable: tuple[Module, ...]
    lora_rank: int
    rows: int
    accumulation: int
    sharding: Sharding
    offload: bool
    gradient_checkpointing: bool
    save_every: int
    tuning: Tuning
    mixture: dict[str, float]
    data: tuple[DataSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RlStage(Stage):
    """A stretch of reinforcement learning; ``rewards`` weighs ``medmo_edge.train.rewards``."""

    rollouts: Rollouts
    objective: Objective
    rewards: dict[str, float]
    curriculum: Curriculum


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedRecipe:
    """A whole road from the checkpoint ``base``, whose sizes are in ``text`` and ``vision``."""

    name: str
    base: str
    seed: int
    precision: Literal["bfloat16", "float32"]
    text: TextConfig
    vision: VisionModel
    machine: Machine
    stages: tuple[Stage, ...]

    @property
    def model(self) -> ModelConfig:
        """The architecture as a checkpoint's config has it."""
        return model_of(self.text, self.vision)


def model_of(text: TextConfig, vision: VisionModel) -> ModelConfig:
    """The architecture of these sizes; token ids are unknown to a recipe and 0."""
    return ModelConfig(
        text=text,
        vision=vision.config(text.hidden_size),
        image_token_id=0,
        video_token_id=0,
        vision_start_token_id=0,
        vision_end_token_id=0,
        eos_token_ids=(0,),
        pad_token_id=0,
        bos_token_id=None,
    )


def load_stages(name_or_path: str | Path) -> StagedRecipe:
    """Read a packaged recipe ("medmo-4b", "medmo-8b") or a TOML file of stages.

    Errors: RecipeError with the file, the line and the key that is wrong.
    """
    document = read_document(name_or_path)
    if not is_staged(document):
        raise RecipeError(f"recipe {document.source} has no stages: it trains from nothing")
    return read_stages(document)


def read_stages(document: Document) -> StagedRecipe:
    """The stages of a parsed recipe. Errors: RecipeError."""
    entries = document.values.get("stages", [])
    if not isinstance(entries, list) or not entries:
        raise document.refuse(("stages",), "stages must be a list of tables, [[stages]]")
    stages = tuple(_read_stage(document, index) for index in range(len(entries)))
    whole = {name: value for name, value in document.values.items() if name != "stages"}
    rest = dataclasses.replace(document, values=whole)
    recipe: StagedRecipe = build(StagedRecipe, rest, given={StagedRecipe: {"stages": stages}})
    _check(recipe, document)
    return recipe


def _read_stage(document: Document, index: int) -> Any:
    entry = document.values["stages"][index]
    kind = entry.get("kind", "pretrain") if isinstance(entry, dict) else "pretrain"
    if kind not in get_args(Kind):  # before the keys, which depend on it
        problem = f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}"
        raise document.refuse(("stages", index, "kind"), problem)
    return build(RlStage if kind == "rl" else Stage, document, ("stages", index))


def _check(recipe: StagedRecipe, document: Document) -> None:
    """Values that would only fail after hours on many machines."""
    machine = recipe.machine
    rules: Rules = size_rules(recipe.text, recipe.vision)
    rules[("machine",)] = (
        "devices, memory and speed must be above 0, utilisation in 0..1",
        machine.devices > 0
        and machine.device_memory_gib > 0
        and machine.peak_teraflops > 0
        and 0 < machine.utilisation <= 1,
    )
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        rules |= _stage_rules(stage, ("stages", index), stage.name not in names[:index])
        tokens = _sample_tokens(stage)
        rules[("stages", index, "text_tokens")] = fits(tokens, recipe.text)
        rules[("stages", index, "row_tokens")] = (
            f"row_tokens must be {tokens} (one sample of max_pixels and text_tokens) or more, and "
            f"no more than max_positions {recipe.text.max_positions}",
            tokens <= stage.row_tokens <= recipe.text.max_positions,
        )
    require(rules, document)


def _sample_tokens(stage: Stage) -> int:
    """A sample with one picture of the largest size and a mean text."""
    return stage.max_pixels // (PATCH * MERGE) ** 2 + stage.text_tokens


def _stage_rules(stage: Stage, path: tuple[str | int, ...], is_new_name: bool) -> Rules:
    token = (PATCH * MERGE) ** 2
    positive = min(stage.samples, stage.epochs, stage.rows, stage.accumulation) > 0
    rules: Rules = {
        (*path, "name"): ("stages need different names", is_new_name and bool(stage.name)),
        (*path, "samples"): ("samples, epochs, rows and accumulation must be above 0", positive),
        (*path, "max_pixels"): (
            "min_pixels must be one vision token or more and max_pixels no less",
            token <= stage.min_pixels <= stage.max_pixels,
        ),
        (*path, "answer_tokens"): (
            "answer_tokens must be above 0 and at most text_tokens",
            0 < stage.answer_tokens <= stage.text_tokens,
        ),
        (*path, "trainable"): (
            "trainable must name each module once, at least one",
            len(set(stage.trainable)) == len(stage.trainable) > 0,
        ),
        (*path, "save_every"): ("save_every must be above 0", stage.save_every > 0),
        (*path, "tuning", "module_rates"): (
            "module_rates must name modules in trainable, with rates of 0 or more",
            set(stage.tuning.module_rates) <= set(stage.trainable)
            and min(stage.tuning.module_rates.values(), default=0.0) >= 0,
        ),
        (*path, "lora_rank"): ("lora_rank must be 0 or more", stage.lora_rank >= 0),
        (*path, "sharding"): (
            "offload needs sharding zero3 or fsdp2",
            not stage.offload or stage.sharding in ("zero3", "fsdp2"),
        ),
        (*path, "mixture"): weights_rule("mixture", stage.mixture, TASKS),
    }
    for index, source in enumerate(stage.data):
        rules |= _source_rules(source, (*path, "data", index))
    return rules | (_rl_rules(stage, path) if isinstance(stage, RlStage) else {})


def _source_rules(source: DataSource, path: tuple[str | int, ...]) -> Rules:
    unknown = sorted(set(source.tasks) - set(TASKS))
    hint = suggest(unknown[0], list(TASKS)) if unknown else ""
    return {
        (*path, "path"): ("path must name a JSONL file below the data folder", bool(source.path)),
        (*path, "weight"): ("weight must be above 0", 0 < source.weight < float("inf")),
        (*path, "tasks"): (f"tasks has unknown {unknown[:1]}{hint}", not unknown),
    }


def _rl_rules(stage: RlStage, path: tuple[str | int, ...]) -> Rules:
    rollouts = stage.rollouts
    asked = stage.text_tokens - stage.answer_tokens
    prompt = stage.max_pixels // (PATCH * MERGE) ** 2 + asked
    return {
        **group_rules(path, rollouts, stage.objective, stage.rewards, stage.curriculum),
        (*path, "rollouts", "max_prompt_tokens"): (
            f"{prompt} prompt tokens do not fit: raise max_prompt_tokens or lower max_pixels",
            prompt <= rollouts.max_prompt_tokens,
        ),
        (*path, "rollouts", "guided"): (
            "guided needs our own loop: set engine to generate",
            rollouts.engine == "generate" or not rollouts.guided,
        ),
        (*path, "rollouts"): (
            "rows * accumulation must be a multiple of num_generations",
            is_multiple(stage.rows * stage.accumulation, rollouts.num_generations),
        ),
    }
