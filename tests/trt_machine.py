"""A machine with a GPU that is not there: the fakes of CUDA and TensorRT put in their places."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from cuda_fake import FakeCuda
from trt_fake import make_tensorrt
from trt_world import World

from medmo_edge.runtime import session, trt, trt_cuda, trt_library
from medmo_edge.runtime.device import Cuda, Device, probe


@dataclass(eq=False)
class Machine:
    """The fakes, the device that is probed, and the packages that are installed."""

    world: World
    device: Device
    packages: dict[str, str | None]

    @property
    def cuda(self) -> FakeCuda:
        """The fake of cuda.bindings.runtime."""
        return self.world.cuda

    def become(self, *, version: str | None = None, sm: int | None = None, **device: Any) -> None:
        """Another TensorRT or another GPU."""
        if version is not None:
            self.world.version = self.packages["tensorrt"] = version
        if sm is not None:
            self.world.sm = sm
            self.device = replace(self.device, cuda=(replace(self.device.cuda[0], sm=sm),))
        self.device = replace(self.device, **device)


@contextmanager
def pretend(memory_bytes: int = 1 << 30) -> Iterator[Machine]:
    """A machine with one GPU of SM 89, TensorRT 10.16 and cuda-bindings."""
    world = World(cuda=FakeCuda(memory_bytes))
    gpu = Cuda(name="Example GPU", sm=89, memory_bytes=24 << 30)
    device = replace(probe(), cuda=(gpu,), driver="580.65.06", cuda_version="13.0")
    packages: dict[str, str | None] = {"tensorrt": world.version, "cuda-bindings": "13.5.0"}
    machine = Machine(world=world, device=device, packages=packages)
    library = make_tensorrt(world)
    with (
        patch.object(trt_library, "_version", lambda name: machine.packages.get(name)),
        patch.object(trt_library, "_load", lambda module: library),
        patch.object(trt_cuda, "load_cuda", lambda: world.cuda),
        patch.object(session, "probe", lambda: machine.device),
        patch.object(trt, "cuda_devices", lambda: machine.device.cuda),
    ):
        yield machine
