"""A stand-in for the tensorrt module: real shapes, profiles and aliases; ONNX Runtime computes.

A plan is the path of its ONNX file with profiles, version and compute capability; a launch reads
the bytes at the bound addresses of ``cuda_fake`` when the stream gets there, runs the graph, and
writes its outputs. What TensorRT refuses is refused the same way (False or None and a message);
what it leaves undefined raises Violation. Graphs in float32 or float16 only.
"""

import json
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_fake import Violation
from trt_fake_builder import Builder, OnnxParser
from trt_world import (
    MAGIC,
    STORAGE,
    DataType,
    ILogger,
    IProgressMonitor,
    Severity,
    Strategy,
    TensorIOMode,
    TensorLocation,
    World,
    tensors_of,
)

_SCRATCH = 4096
_ALIGNMENT = 256


def make_tensorrt(world: World) -> SimpleNamespace:
    """What ``import tensorrt`` gives."""
    return SimpleNamespace(
        __version__=world.version,
        ILogger=ILogger,
        IProgressMonitor=IProgressMonitor,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=Strategy,
        NetworkDefinitionCreationFlag=IntEnum("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        MemoryPoolType=IntEnum("MemoryPoolType", "WORKSPACE"),
        Builder=partial(Builder, world),
        Runtime=partial(Runtime, world),
        OnnxParser=partial(OnnxParser, world),
    )


class Runtime:
    """Runtime; refuses plans of another version or GPU as TensorRT does."""

    def __init__(self, world: World, logger: Any) -> None:
        self._world, self._logger = world, world.register(logger)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "Engine | None":
        self._world.deserialised += 1
        content = bytes(memoryview(serialized_engine))
        if not content.startswith(MAGIC):
            self._logger.log(Severity.ERROR, "Serialization assertion header.magicTag failed")
            return None
        plan = json.loads(content[len(MAGIC) :])
        if (plan["version"], plan["sm"]) != (self._world.version, self._world.sm):
            self._logger.log(Severity.ERROR, "The engine plan file is not compatible")
            return None
        return Engine(self._world, self._logger, plan)


class Engine:
    """ICudaEngine."""

    num_optimization_profiles = property(lambda self: len(self.plan["profiles"]))
    num_io_tensors = property(lambda self: len(self.tensors))
    device_memory_size_v2 = _SCRATCH

    def __init__(self, world: World, logger: Any, plan: dict[str, Any]) -> None:
        self.world, self.logger, self.plan = world, logger, plan
        inputs, outputs = tensors_of(plan["path"])
        self.inputs = {each.name: each for each in inputs}
        self.tensors = {each.name: each for each in [*inputs, *outputs]}
        self.profiles_in_use: set[int] = set()

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        is_host = name in self.world.host_tensors
        return TensorLocation.HOST if is_host else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        shapes = self.plan["profiles"][profile_index].get(name, [self.inputs[name].shape] * 3)
        return [tuple(each) for each in shapes]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        if self.world.in_place and name.startswith("present_"):
            return name.replace("present_", "past_")
        return None

    def create_execution_context(self, strategy: Any) -> "ExecutionContext":
        return ExecutionContext(self, strategy)


class ExecutionContext:
    """IExecutionContext."""

    def __init__(self, engine: Engine, strategy: Any) -> None:
        self._engine, self._world = engine, engine.world
        self._has_memory = strategy != Strategy.USER_MANAGED
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._is_pending = True  # work that TensorRT puts off until the next launch

    def _refuse(self, message: str) -> bool:
        self._engine.logger.log(Severity.ERROR, message)
        return False

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < _SCRATCH or memory % _ALIGNMENT:
            raise Violation("the memory for activations is too small or not aligned")
        self._world.cuda.memory(memory, size)
        self._has_memory = True

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index in self._engine.profiles_in_use:
            return self._refuse(f"profile {profile_index} is in use by another context")
        self._world.cuda.stream(stream_handle)
        self._engine.profiles_in_use.add(profile_index)
        self._profile, self._is_pending = profile_index, True
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if name not in self._engine.inputs or self._profile is None:
            return self._refuse(f"{name} is no input, or no profile is set")
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )
        if not fits:
            return self._refuse(f"{name}: {tuple(shape)} is outside of {low} to {high}")
        self._is_pending |= self._shapes.get(name) != tuple(shape)
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine.tensors or memory % _ALIGNMENT:
            return self._refuse(f"{name} is unknown, or its address is not aligned")
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._world.is_capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, cuda = self._engine, self._world.cuda
        missing = [name for name in engine.tensors if name not in self._addresses]
        if missing or not self._has_memory:
            return self._refuse(f"nothing is bound to {missing[:1] or 'the activations'}")
        for name, tensor in engine.inputs.items():
            if -1 in tensor.shape and name not in self._shapes:
                return self._refuse(f"{name} has no shape")
        for name in engine.tensors:
            alias = engine.get_aliased_input_tensor(name)
            if alias is not None and self._addresses[name] != self._addresses[alias]:
                return self._refuse(f"{name} must share its address with {alias}")
        capturing = cuda.is_capturing(stream_handle)
        if capturing and self._is_pending:
            return self._refuse("shapes changed: launch once before capturing")
        self._is_pending = False
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        rows = shapes.get("inputs_embeds", (0, 0))[1]
        self._world.launches.append((Path(engine.plan["path"]).stem, rows, capturing))
        cuda.enqueue(stream_handle, partial(self._run, shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine, cuda = self._engine, self._world.cuda
        feeds = {}
        for name, tensor in engine.inputs.items():
            dtype = np.dtype(STORAGE[tensor.dtype.name])
            shape = shapes.get(name, tensor.shape)
            raw = cuda.memory(addresses[name], int(np.prod(shape)) * dtype.itemsize)
            feeds[name] = raw.view(dtype).reshape(shape).copy()
            if feeds[name].dtype.kind == "f" and np.isnan(feeds[name]).any():
                raise Violation(f"{name} is read before it was written")
        names = [name for name in engine.tensors if name not in engine.inputs]
        for name, found in zip(
            names, self._world.session(engine.plan["path"]).run(names, feeds), strict=True
        ):
            raw = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
            cuda.memory(addresses[name], raw.nbytes)[:] = raw
