"""Whether a stage fits the machine it is about to run on, by its estimate, before anything loads.

A plan (``--dry-run``) asks for the machine that the recipe names; this asks for the one at hand.
"""

from dataclasses import replace

from medmo_edge.errors import RecipeError
from medmo_edge.runtime.device import probe
from medmo_edge.train.dry_run import advice
from medmo_edge.train.estimates import GIB, Estimate, estimate_stage
from medmo_edge.train.parallel import Group
from medmo_edge.train.stages import Stage, StagedRecipe


def free_gib(group: Group) -> float:
    """Free memory of this process's device; processes on one CPU share it."""
    if group.device == "cpu":
        return probe().ram_available_bytes / GIB / group.here
    import torch

    return float(torch.cuda.mem_get_info(group.device)[0]) / GIB


def require_fit(recipe: StagedRecipe, stage: Stage, group: Group, memory_gib: float) -> Estimate:
    """The estimate of ``stage`` on ``group``. Errors: RecipeError when ``memory_gib`` is less."""
    machine = replace(recipe.machine, devices=group.world, device_memory_gib=memory_gib)
    offloads = stage.offload and group.device != "cpu"  # where there is nowhere else to put it
    estimate = estimate_stage(recipe.model, replace(stage, offload=offloads), machine)
    if not estimate.fits:
        devices = f"{group.world} of them" if group.world > 1 else "the only one"
        raise RecipeError(
            f"recipe {recipe.name}, stage {stage.name!r} needs about "
            f"{estimate.memory.device:.1f} GiB a device and {group.device} ({devices}) has "
            f"{memory_gib:.1f} GiB free: {advice(estimate.memory)} in the recipe, or use more or "
            "larger devices"
        )
    return estimate
