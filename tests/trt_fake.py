"""A stand-in for the tensorrt module: real shapes, profiles and aliases; ONNX Runtime computes.

A plan is the path of its ONNX file with profiles, version and compute capability; a launch reads
the bytes at the bound addresses of ``cuda_fake`` when the stream gets there, runs the graph, and
writes its outputs. What TensorRT refuses is refused the same way (False or None and a message);
what it leaves undefined raises Violation. Graphs in float32 or float16 only.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_fake import FakeCuda, Violation

_MAGIC = b"fake plan "
_SCRATCH = 4096
_ALIGNMENT = 256
DataType = IntEnum("DataType", "FLOAT HALF BF16 INT32 INT64 BOOL FP8 INT4 FP4", start=0)
TensorIOMode = IntEnum("TensorIOMode", "NONE INPUT OUTPUT", start=0)
Strategy = IntEnum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0)
Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
# onnx.TensorProto.DataType -> name
_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 6: "INT32", 7: "INT64", 9: "BOOL"}
_STORAGE = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}
_LAYERS = {
    "TensorScatter": ["KV_CACHE_UPDATE"],
    "Attention": ["ATTENTION_INPUT", "ATTENTION_OUTPUT"],
    "RotaryEmbedding": ["ROTARY_EMBEDDING"],
    "QuantizeLinear": ["QUANTIZE"],
    "DequantizeLinear": ["DEQUANTIZE"],
}


class ILogger:
    """The base class of loggers."""

    Severity = Severity


class IProgressMonitor:
    """The base class of monitors."""


@dataclass(eq=False)
class World:
    """What the fake library and its objects share; tests change it.

    ``in_place``: whether engines report aliases; ``refuses``: operators the parser does not know;
    ``fails``: a message with which compiling fails.
    """

    cuda: FakeCuda
    version: str = "10.16.1.11"
    sm: int = 89
    in_place: bool = True
    is_capturable: bool = True
    refuses: frozenset[str] = frozenset()
    fails: str | None = None
    deserialised: int = 0
    logger: Any = None
    launches: list[tuple[str, int, bool]] = field(default_factory=list)
    sessions: dict[str, Any] = field(default_factory=dict)

    def register(self, logger: Any) -> Any:
        """The logger that is really used: TensorRT keeps to the first one it was given."""
        self.logger = self.logger or logger
        return self.logger

    def session(self, path: str) -> Any:
        """ONNX Runtime on the CPU with the graph of a plan."""
        if path not in self.sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            self.sessions[path] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        return self.sessions[path]


def make_tensorrt(world: World) -> SimpleNamespace:
    """What ``import tensorrt`` gives."""
    return SimpleNamespace(
        __version__=world.version,
        ILogger=ILogger,
        IProgressMonitor=IProgressMonitor,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=Strategy,
        NetworkDefinitionCreationFlag=IntEnum("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        MemoryPoolType=IntEnum("MemoryPoolType", "WORKSPACE"),
        Builder=partial(Builder, world),
        Runtime=partial(Runtime, world),
        OnnxParser=partial(OnnxParser, world),
    )


@dataclass(frozen=True)
class Tensor:
    """One input or output of a network or engine, -1 where its shape is free."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]


def _tensor(value: Any) -> Tensor:
    kind = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
    return Tensor(value.name, DataType[_TYPES[kind.elem_type]], tuple(dims))


def _tensors(path: str) -> tuple[list[Tensor], list[Tensor]]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return [_tensor(each) for each in graph.input], [_tensor(each) for each in graph.output]


class Network:
    """INetworkDefinition."""

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.path = ""
        self._layers: list[str] = []
        self._inputs: list[Tensor] = []

    def fill(self, path: str, layers: list[str], inputs: list[Tensor]) -> None:
        """What the parser does."""
        self.path, self._layers, self._inputs = path, layers, inputs

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_layer(self, index: int) -> Any:
        return SimpleNamespace(type=SimpleNamespace(name=self._layers[index]))

    def get_input(self, index: int) -> Tensor:
        return self._inputs[index]


class OnnxParser:
    """OnnxParser; reads the real file."""

    def __init__(self, world: World, network: Network, logger: Any) -> None:
        self._world, self._network = world, network
        self._errors: list[tuple[str, str]] = []

    def parse_from_file(self, model: str) -> bool:
        import onnx

        try:
            graph = onnx.load(model, load_external_data=False).graph
        except Exception as error:
            self._errors = [("", f"failed to parse {model}: {error}")]
            return False
        unknown = sorted({node.op_type for node in graph.node} & self._world.refuses)
        if unknown:
            self._errors = [(unknown[0], f"No importer registered for op: {unknown[0]}")]
            return False
        layers = [name for node in graph.node for name in _LAYERS.get(node.op_type, ["SHUFFLE"])]
        self._network.fill(model, layers, [_tensor(each) for each in graph.input])
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        operator, text = self._errors[index]
        return SimpleNamespace(desc=lambda: text, node_operator=lambda: operator)


class TimingCache:
    """ITimingCache: remembers how many builds it has seen."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class Profile:
    """IOptimizationProfile."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class Config:
    """IBuilderConfig."""

    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.progress_monitor: Any = None
        self.builder_optimization_level = 3
        self.limits: dict[int, int] = {}
        self._timing: TimingCache | None = None

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: int, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._timing = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self._timing


class Builder:
    """Builder; a plan is built as soon as its profiles make sense."""

    def __init__(self, world: World, logger: Any) -> None:
        self._world, self._logger = world, world.register(logger)

    def create_network(self, flags: int = 0) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        error = self._world.fails or self._mistake(network, config)
        if error is not None:
            self._logger.log(Severity.ERROR, error)
            return None
        if not self._tell(config.progress_monitor):
            return None
        timing = config.get_timing_cache()
        if timing is not None:
            timing.content += b"timed "
        plan = {
            "path": network.path,
            "profiles": [each.shapes for each in config.profiles],
            "version": self._world.version,
            "sm": self._world.sm,
        }
        return _MAGIC + json.dumps(plan).encode()

    @staticmethod
    def _mistake(network: Network, config: Config) -> str | None:
        if not network.flags & 0b10:
            return "the network is not strongly typed"
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            for profile in config.profiles or [Profile()]:
                if -1 in tensor.shape and tensor.name not in profile.shapes:
                    return f"{tensor.name} is dynamic and has no shape in a profile"
                for three in zip(*profile.shapes.get(tensor.name, []), tensor.shape, strict=False):
                    low, usual, high, fixed = three
                    if not low <= usual <= high or (fixed >= 0 and {low, high} != {fixed}):
                        return f"{tensor.name} has a profile that cannot be"
        return None

    @staticmethod
    def _tell(monitor: Any) -> bool:
        if monitor is None:
            return True
        monitor.phase_start("Building Engine", None, 3)
        monitor.phase_start("Tactics", "Building Engine", 2)
        going = all(monitor.step_complete("Building Engine", step) for step in range(3))
        monitor.phase_finish("Building Engine")
        return going


class Runtime:
    """Runtime; refuses plans of another version or GPU as TensorRT does."""

    def __init__(self, world: World, logger: Any) -> None:
        self._world, self._logger = world, world.register(logger)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "Engine | None":
        self._world.deserialised += 1
        content = bytes(memoryview(serialized_engine))
        if not content.startswith(_MAGIC):
            self._logger.log(Severity.ERROR, "Serialization assertion header.magicTag failed")
            return None
        plan = json.loads(content[len(_MAGIC) :])
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
        inputs, outputs = _tensors(plan["path"])
        self.inputs = {each.name: each for each in inputs}
        self.tensors = {each.name: each for each in [*inputs, *outputs]}
        self.profiles_in_use: set[int] = set()

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

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
            dtype = np.dtype(_STORAGE[tensor.dtype.name])
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
