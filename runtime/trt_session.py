"""Engines at work: a mapped file becomes an engine, and an engine's contexts run on the GPU.

A context is one profile of an engine with shapes and addresses set. Everything TensorRT answers
with False or None becomes one of our errors here. Whether an engine fits this machine was judged
before, by ``trt_engines``.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmo_edge.errors import ArtifactError, BackendUnavailable, GenerationError
from medmo_edge.runtime.trt_cuda import Block, Gpu
from medmo_edge.runtime.trt_library import Library, Messages, use_logger

Shape = tuple[int, ...]
#: TensorRT's types by name -> numpy storage; bfloat16 is kept as its bits
STORAGE = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "uint16",
    "INT32": "int32",
    "INT64": "int64",
}
_NUMBERS = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class Engine:
    """One loaded engine; ``scratch_bytes`` is the memory that its contexts need for activations."""

    def __init__(self, library: Library, path: Path) -> None:
        """Errors: ArtifactError when TensorRT does not take the file."""
        self.path = path
        self._trt = library.load()
        self._logger, self.messages = use_logger(library)
        # Both must outlive the engine.
        self._runtime: Any = self._trt.Runtime(self._logger)
        self._engine: Any = self._read(library)
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        count = self._engine.num_io_tensors
        self.names = tuple(self._engine.get_tensor_name(index) for index in range(count))
        self._refuse_host_tensors()

    def _read(self, library: Library) -> Any:
        with self.path.open("rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._refusal(library)
        return engine

    def _refusal(self, library: Library) -> ArtifactError | BackendUnavailable:
        reason = self.messages.first()
        if "memory" in reason.lower():
            return BackendUnavailable(
                f"the GPU has too little memory for {self.path} ({reason}): close other programs "
                "that use it"
            )
        if "cudaError" in reason:
            return BackendUnavailable(
                f"CUDA fails while {self.path} is loaded ({reason}): install or update the NVIDIA "
                "driver"
            )
        return ArtifactError(
            f"{self.path} is refused by {library.name} {library.version} ({reason}): run "
            "`medmo-edge build` again"
        )

    def _refuse_host_tensors(self) -> None:
        """TensorRT reads a shape that is an input from the computer's memory; ours are none."""
        device = self._trt.TensorLocation.DEVICE
        for name in self.names:
            if self._engine.get_tensor_location(name) != device:
                raise ArtifactError(
                    f"{self.path} wants {name} in the computer's memory, which no graph of ours "
                    "does: export and build again"
                )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        wanted = self._trt.TensorIOMode.INPUT
        return tuple(name for name in self.names if self._engine.get_tensor_mode(name) == wanted)

    def dtype(self, name: str) -> str:
        """TensorRT's name of a tensor's type, e.g. "BF16"."""
        return str(self._engine.get_tensor_dtype(name).name)

    def number(self, name: str) -> str:
        """Our name of a tensor's number format. Errors: ArtifactError for any other."""
        dtype = self.dtype(name)
        if dtype not in _NUMBERS:
            raise ArtifactError(f"{self.path} has {name} in {dtype}: export and build again")
        return _NUMBERS[dtype]

    def shape(self, name: str) -> Shape:
        """A tensor's shape, -1 where it is free."""
        return tuple(self._engine.get_tensor_shape(name))

    def profile(self, name: str, index: int) -> tuple[Shape, Shape, Shape]:
        """Least, tuned-for and largest shape of an input in a profile."""
        least, usual, most = map(tuple, self._engine.get_tensor_profile_shape(name, index))
        return least, usual, most

    @property
    def num_profiles(self) -> int:
        """Number of profiles."""
        return int(self._engine.num_optimization_profiles)

    def aliased_input(self, output: str) -> str | None:
        """The input whose memory an output must share, if TensorRT writes it in place."""
        ask = getattr(self._engine, "get_aliased_input_tensor", None)
        return (ask(output) or None) if ask else None

    def open_context(self, gpu: Gpu, scratch: Block, profile: int) -> "Context":
        """A context of one profile whose activations live in ``scratch``.

        Contexts may share it as long as they run one after the other.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise GenerationError(
                f"TensorRT cannot prepare {self.path.name}: {self.messages.first()}"
            )
        context.set_device_memory(scratch.address, scratch.nbytes)
        return Context(context, gpu, profile, self.messages, self.path.name)

    def close(self) -> None:
        """Free the engine's weights; its contexts must be gone."""
        self._engine = self._runtime = None


class Context:
    """One profile of an engine, ready for shapes and addresses."""

    def __init__(self, context: Any, gpu: Gpu, profile: int, messages: Messages, name: str) -> None:
        self._context, self._gpu, self._messages, self._name = context, gpu, messages, name
        self._addresses: dict[str, int] = {}
        self._require(context.set_optimization_profile_async(profile, gpu.stream), "profile")
        gpu.wait()

    def _require(self, done: bool, what: str) -> None:
        if not done:
            reason = self._messages.first()
            self._messages.clear()
            raise GenerationError(f"TensorRT refused the {what} of {self._name}: {reason}")

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """What is bound now: a captured graph holds for exactly this."""
        return tuple(self._addresses.items())

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        """Shape of an input for the next launch. Errors: GenerationError outside the profile."""
        self._require(self._context.set_input_shape(name, tuple(shape)), f"shape of {name}")

    def bind(self, name: str, address: int) -> None:
        """Where an input is read or an output written from now on."""
        if self._addresses.get(name) != address:
            self._require(self._context.set_tensor_address(name, address), f"address of {name}")
            self._addresses[name] = address

    def launch(self) -> None:
        """Enqueue one inference."""
        self._require(self._context.execute_async_v3(self._gpu.stream), "launch")

    @property
    def is_capturable(self) -> bool:
        """Whether its launches may be captured now; not so where shapes are worked out late."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return bool(ask(self._gpu.stream)) if ask else True

    def close(self) -> None:
        """Free the context."""
        self._context = None
