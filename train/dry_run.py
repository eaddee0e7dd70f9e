"""What ``medmo-edge train RECIPE --dry-run`` prints: each stage's parameters, tokens, memory, time.

The figures are ``estimates``; nothing is loaded, trained or written.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medmo_edge.errors import UsageError
from medmo_edge.train.estimates import (
    Estimate,
    Memory,
    estimate_phase,
    estimate_rl,
    estimate_stage,
)
from medmo_edge.train.recipe import is_staged, read_document, read_recipe
from medmo_edge.train.stages import read_stages

_PARTS = ("weights", "gradients", "optimizer", "activations", "engine", "context")


def dry_run(name_or_path: str | Path, stage: str | None = None) -> dict[str, Any]:
    """Every estimate of a recipe as plain values; ``stage`` keeps those of one name or kind.

    Errors: RecipeError for the recipe, UsageError for a stage that it does not have.
    """
    document = read_document(name_or_path)
    if is_staged(document):
        recipe = read_stages(document)
        estimates = [estimate_stage(recipe.model, one, recipe.machine) for one in recipe.stages]
        plan: dict[str, Any] = {
            "name": recipe.name,
            "base": recipe.base,
            "machine": asdict(recipe.machine),
        }
    else:
        small = read_recipe(document)
        estimates = [estimate_phase(small, index) for index in range(len(small.phases))]
        estimates += [estimate_rl(small, small.rl)] if small.rl else []
        plan = {"name": small.name, "base": None, "machine": {"threads": small.threads}}
    kept = [one for one in estimates if stage in (None, one.stage, one.kind)]
    if not kept:
        names = ", ".join(dict.fromkeys(one.stage for one in estimates))
        raise UsageError(f"recipe {plan['name']} has no stage {stage!r}: it has {names}")
    return plan | {
        "parameters": dict(kept[0].parameters),
        "stages": [_plain(one) for one in kept],
    }


def _plain(one: Estimate) -> dict[str, Any]:
    values = asdict(one)
    del values["parameters"]
    values["memory_gib"] = values.pop("memory") | {"device": one.memory.device}
    return values | {"fits": one.fits, "advice": None if one.fits else advice(one.memory)}


def advice(memory: Memory) -> str:
    """The setting that lowers the largest part of what a device holds."""
    parts = {name: getattr(memory, name) for name in _PARTS}
    largest = max(parts, key=lambda name: parts[name])
    return {
        "weights": 'set sharding = "fsdp2"',
        "gradients": 'set sharding = "zero2" or "fsdp2", or lora_rank',
        "optimizer": 'set sharding = "zero2" or "fsdp2", offload, or lora_rank',
        "activations": "lower rows and raise accumulation, or set gradient_checkpointing",
        "engine": 'lower engine_memory or set engine = "vllm-server"',
        "context": "use a larger device",
    }[largest]


def format_plan(plan: Mapping[str, Any]) -> str:
    """``dry_run``'s values as a person reads them."""
    lines = [f"{plan['name']}: {_counts(plan['parameters'])}", _machine(plan)]
    for stage in plan["stages"]:
        lines += ["", *_stage_lines(stage)]
    hours = sum(stage["hours"] for stage in plan["stages"])
    return "\n".join([*lines, "", f"time in all: {_time(hours)}", "estimates; nothing was run"])


def _machine(plan: Mapping[str, Any]) -> str:
    machine = plan["machine"]
    if plan["base"] is None:
        return f"from nothing, {machine['threads']} processor threads"
    return (
        f"from {plan['base']}, {machine['devices']} devices of "
        f"{machine['device_memory_gib']:g} GiB and {machine['peak_teraflops']:g} TFLOP/s, "
        f"{machine['utilisation']:.0%} of them reached"
    )


def _stage_lines(stage: Mapping[str, Any]) -> list[str]:
    memory = stage["memory_gib"]
    parts = [f"{name} {memory[name]:.2f}" for name in (*_PARTS, "host") if memory[name]]
    lines = [
        f"{stage['stage']} ({stage['kind']})",
        f"  trained  {_counts(stage['trained'])}",
        f"  step     {stage['tokens_per_step']:,} tokens, {stage['steps']:,} steps",
        f"  memory   {memory['device']:.1f} GiB a device: {', '.join(parts)}",
        f"  time     {_time(stage['hours'])}",
    ]
    if not stage["fits"]:
        lines.append(
            f"  does not fit {stage['device_memory_gib']:g} GiB: {stage['advice']} in the recipe"
        )
    return lines


def _counts(modules: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {_number(count)}" for name, count in modules.items() if count)
    return f"{_number(sum(modules.values()))} parameters: {parts}"


def _number(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return str(count)


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours * 60 >= 1 else "under a minute"
