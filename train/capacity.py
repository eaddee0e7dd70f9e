"""Whether a stage fits the machine it is about to run on, by its estimate, before anything loads.

A plan (``--dry-run``) asks for the machine that the recipe names; this asks for the one at hand.
"""

from dataclasses import replace
from importlib.util import find_spec

from medmo_edge.errors import RecipeError
from medmo_edge.runtime.device import probe
from medmo_edge.train.dry_run import advice
from medmo_edge.train.estimates import GIB, Estimate, estimate_stage
from medmo_edge.train.parallel import Group
from medmo_edge.train.stages import RlStage, Stage, StagedRecipe


def free_gib(group: Group) -> float:
    """Free memory of this process's device; processes on one CPU share it."""
    if group.device == "cpu":
        return probe().ram_available_bytes / GIB / group.here
    import torch

    return float(torch.cuda.mem_get_info(group.device)[0]) / GIB


def uses_vllm(stage: Stage) -> bool:
    """Whether vLLM writes this stage's answers: it is asked for, and it is installed."""
    wanted = isinstance(stage, RlStage) and stage.rollouts.engine != "generate"
    return wanted and find_spec("vllm") is not None


def as_run(stage: Stage, group: Group) -> Stage:
    """The stage as it will run here: without vLLM where there is none, on a CPU nothing offloaded.

    The CPU's memory is the place that offloading would put it to.
    """
    kept = replace(stage, offload=stage.offload and group.device != "cpu")
    if isinstance(kept, RlStage) and not uses_vllm(kept):
        return replace(kept, rollouts=replace(kept.rollouts, engine="generate"))
    return kept


def require_fit(recipe: StagedRecipe, stage: Stage, group: Group, memory_gib: float) -> Estimate:
    """The estimate of ``stage`` on ``group``. Errors: RecipeError when ``memory_gib`` is less."""
    machine = replace(recipe.machine, devices=group.world, device_memory_gib=memory_gib)
    estimate = estimate_stage(recipe.model, as_run(stage, group), machine)
    if not estimate.fits:
        raise RecipeError(
            f"recipe {recipe.name}, stage {stage.name!r} needs about "
            f"{estimate.memory.device:.1f} GiB a device and {group.device} has {memory_gib:.1f} "
            f"GiB free: {_hint(advice(estimate.memory), group)}"
        )
    return estimate


def _hint(advised: str, group: Group) -> str:
    """What to do; one device has nobody to share with."""
    if "larger device" in advised:
        return advised
    if "sharding" in advised and group.world == 1:
        return "set lora_rank or train fewer modules, or shard over several devices with torchrun"
    return f"{advised} in the recipe, or use more or larger devices"
