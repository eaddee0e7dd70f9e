"""Several processes on one model: plain data parallel (DDP) or sharded (FSDP2), from torchrun.

A recipe's ``sharding`` in these terms: none is DDP; zero2 is FSDP2 that keeps the weights gathered
between forward and backward; zero3 and fsdp2 gather each layer when it is needed. Without a
launcher there is one process and no group. Tensor and pipeline parallelism are not here: no model
of this family needs them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import UsageError
from medmo_edge.train.stages import Stage

if TYPE_CHECKING:
    import torch

SHARDED = ("zero2", "zero3", "fsdp2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The processes of a run as one of them sees it: number ``rank`` of ``world``, on ``device``.

    ``here`` processes run on this machine.
    """

    rank: int = 0
    world: int = 1
    here: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, which must all call it with as many values."""
        if self.world == 1:
            return list(values)
        import torch
        from torch import distributed

        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(summed)
        return [float(value) for value in summed.tolist()]

    def wait(self) -> None:
        """Return when all processes have called it."""
        self.total([0.0])


@contextmanager
def joined(device: str | None = None) -> Iterator[Group]:
    """The group that torchrun started, or the only process; left at the end.

    ``device``: "cpu" or "cuda", default a GPU where there is one. Errors: UsageError for a machine
    with fewer GPUs than processes.
    """
    import torch
    from torch import distributed

    environment = os.environ
    world, rank = int(environment.get("WORLD_SIZE", 1)), int(environment.get("RANK", 0))
    place = int(environment.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and place >= torch.cuda.device_count():
        raise UsageError(
            f"process {place} of this machine has no GPU of {torch.cuda.device_count()}: start "
            "one process per GPU"
        )
    own = f"cuda:{place}" if kind == "cuda" else "cpu"
    if world > 1:
        if kind == "cuda":
            torch.cuda.set_device(own)
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        here = int(environment.get("LOCAL_WORLD_SIZE", 1))
        yield Group(rank=rank, world=world, here=here, device=own)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def spread(model: Any, stage: Stage, group: Group, precision: str) -> Any:
    """What to call instead of ``model`` so that all processes learn as one.

    Brings ``model`` to the group's device. Sharding changes it in place: its parameters are then
    this process's part. What learns must be set before. ``precision`` "bfloat16" computes in it
    and adds gradients in float32.
    """
    if stage.gradient_checkpointing:
        _checkpoint_activations(model)
    offloads = stage.offload and group.device != "cpu"  # where there is nowhere else to put it
    if offloads or (group.world > 1 and stage.sharding in SHARDED):
        return _shard(model, stage, group, precision)
    model.to(group.device)
    if group.world == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    places = [group.device] if group.device.startswith("cuda") else None
    return DistributedDataParallel(model, device_ids=places, gradient_as_bucket_view=True)


def _checkpoint_activations(model: Any) -> None:
    """Layers keep their input only and are computed again backward."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _shard(model: Any, stage: Stage, group: Group, precision: str) -> Any:
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if not distributed.is_initialized():  # one process that offloads
        distributed.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(group.device.partition(":")[0], (group.world,)),
        "reshard_after_forward": stage.sharding != "zero2",
    }
    if stage.offload and group.device != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    half: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    computed = half if precision == "bfloat16" else {}
    # The angles that layers are given stay in float32; the root alone casts what comes in.
    inner = MixedPrecisionPolicy(**computed, cast_forward_inputs=False)
    for layer in (*model.model.visual.blocks, *model.model.language_model.layers):
        fully_shard(layer, mp_policy=inner, **options)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**computed), **options)
    return model


def is_sharded(model: Any) -> bool:
    """Whether this process holds only a part of the parameters."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def arithmetic(model: Any, group: Group, precision: str) -> AbstractContextManager[Any]:
    """The context to call ``model`` in: bfloat16 autocast, which a sharded one has built in."""
    import torch

    if precision != "bfloat16" or is_sharded(model):
        return nullcontext()
    return torch.autocast(group.device.partition(":")[0], torch.bfloat16)


def without_exchange(model: Any, is_last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch: DDP exchanges gradients only in the last of a step.

    Sharded models exchange each time, as whole gradients would not fit.
    """
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()


def whole_weights(
    model: Any, group: Group, *, only_learned: bool = False
) -> "dict[str, torch.Tensor]":
    """The state dict of the unwrapped ``model`` with whole tensors, for the process that leads.

    All processes must call it; the others get nothing. Names are those of a single process.
    ``only_learned`` leaves frozen tensors out where a sharded model would have to gather them.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not is_sharded(model):
        return dict(model.state_dict()) if group.leads else {}
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_learned
    )
    weights: Any = get_model_state_dict(model, options=options)
    return weights if group.leads else {}
