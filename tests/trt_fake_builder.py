"""The building half of the fake TensorRT: parses the real file, checks profiles, writes a plan."""

import json
from types import SimpleNamespace
from typing import Any

from trt_world import MAGIC, Severity, Tensor, World, tensor_of

_LAYERS = {
    "TensorScatter": ["KV_CACHE_UPDATE"],
    "Attention": ["ATTENTION_INPUT", "ATTENTION_OUTPUT"],
    "RotaryEmbedding": ["ROTARY_EMBEDDING"],
    "QuantizeLinear": ["QUANTIZE"],
    "DequantizeLinear": ["DEQUANTIZE"],
}


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
        self._network.fill(model, layers, [tensor_of(each) for each in graph.input])
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
        return MAGIC + json.dumps(plan).encode()

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
