"""CUDA below the trt backend: one GPU, one stream, its memory, and captured graphs.

A thin layer over ``cuda.bindings.runtime`` that turns error codes into our errors and knows what it
must free. It computes nothing, uses the first GPU only, and is not thread-safe.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import BackendUnavailable, GenerationError, one_line
from medmo_edge.runtime.trt_library import CUDA

ALIGNMENT = 256  # bytes; what TensorRT asks of every tensor's address
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


@cache
def load_cuda() -> Any:
    """cuda.bindings.runtime. Errors: BackendUnavailable when it is missing or does not load."""
    try:
        return import_module("cuda.bindings.runtime")
    except Exception as error:  # ImportError, or RuntimeError from the loader
        raise BackendUnavailable(
            f"{CUDA} does not load ({one_line(error)}): pip install 'medmo-edge[tensorrt]'"
        ) from error


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment."""
    return nbytes + -nbytes % ALIGNMENT


@dataclass(frozen=True, slots=True)
class Block:
    """Memory of the GPU; ``address`` is aligned."""

    address: int
    nbytes: int


class OutOfMemory(GenerationError):
    """The GPU has not the memory that was asked for."""


class Gpu:
    """The first GPU and one stream, on which everything happens in order.

    Copies, launches and fills only enqueue; ``wait`` returns when they are done. Errors of all
    methods: GenerationError when CUDA reports one.
    """

    def __init__(self) -> None:
        """Errors: BackendUnavailable when CUDA cannot start."""
        self._cuda = load_cuda()
        self._device: dict[int, int] = {}  # address -> bytes
        self._pinned: set[int] = set()
        self._graphs: list[Any] = []
        try:
            self._call("cudaSetDevice", 0)
            self._stream: Any = self._call("cudaStreamCreateWithFlags", self._flag())
        except GenerationError as error:
            raise BackendUnavailable(
                f"CUDA cannot start: {error}: install or update the NVIDIA driver"
            ) from error

    def _flag(self) -> int:
        return int(self._cuda.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call of the library; its result without the error code."""
        code, *results = getattr(self._cuda, name)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            self._cuda.cudaGetLastError()  # or the next call would report it again
            raise self._error(name, code)
        return results[0] if len(results) == 1 else tuple(results) if results else None

    def _error(self, name: str, code: Any) -> GenerationError:
        _, text = self._cuda.cudaGetErrorString(code)
        kind = OutOfMemory if getattr(code, "name", "") == _OUT_OF_MEMORY else GenerationError
        message = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        return kind(f"{name} failed: {message} (CUDA error {int(code)})")

    def free_bytes(self) -> int:
        """Memory of the GPU that is free now."""
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, nbytes: int, purpose: str) -> Block:
        """Memory of the GPU. Errors: OutOfMemory that names ``purpose``."""
        try:
            address = int(self._call("cudaMalloc", max(nbytes, 1)))
        except OutOfMemory as error:
            raise OutOfMemory(
                f"the GPU has no {nbytes / 1e9:.2f} GB left for {purpose} "
                f"({self.free_bytes() / 1e9:.2f} GB are free): close other programs that use it"
            ) from error
        self._device[address] = nbytes
        return Block(address, nbytes)

    def free(self, block: Block) -> None:
        """Give memory of the GPU back; nothing enqueued may still use it."""
        del self._device[block.address]
        self._call("cudaFree", block.address)

    def pin(self, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the computer that the GPU copies from and to without a detour."""
        address = int(self._call("cudaMallocHost", max(nbytes, 1)))
        self._pinned.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def unpin(self, array: NDArray[np.uint8]) -> None:
        """Give bytes from ``pin`` back; nobody may look at them any more."""
        address = array.ctypes.data
        self._pinned.remove(address)
        self._call("cudaFreeHost", address)

    def to_device(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array, which must stay as it is until ``wait``."""
        self._copy(address, array.ctypes.data, array.nbytes, "HostToDevice")

    def to_host(self, array: NDArray[Any], address: int) -> None:
        """Fill a contiguous array; its values are there after ``wait``."""
        self._copy(array.ctypes.data, address, array.nbytes, "DeviceToHost")

    def on_device(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the GPU."""
        self._copy(target, source, nbytes, "DeviceToDevice")

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        if nbytes:
            self._call("cudaMemcpyAsync", target, source, nbytes, self._kind(kind), self._stream)

    def rows_to_host(
        self, array: NDArray[Any], address: int, pitch: int, width: int, rows: int
    ) -> None:
        """Fill ``array`` with the first ``width`` bytes of ``rows`` rows ``pitch`` bytes apart."""
        kind = self._kind("DeviceToHost")
        self._rows(array.ctypes.data, width, address, pitch, width, rows, kind)

    def rows_to_device(
        self, address: int, pitch: int, array: NDArray[Any], width: int, rows: int
    ) -> None:
        """The way back of ``rows_to_host``."""
        kind = self._kind("HostToDevice")
        self._rows(address, pitch, array.ctypes.data, width, width, rows, kind)

    def _rows(self, *arguments: Any) -> None:
        self._call("cudaMemcpy2DAsync", *arguments, self._stream)

    def _kind(self, kind: str) -> Any:
        return getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")

    def clear(self, block: Block) -> None:
        """Fill memory of the GPU with zeros."""
        self._call("cudaMemsetAsync", block.address, 0, block.nbytes, self._stream)

    def wait(self) -> None:
        """Return when everything enqueued is done; errors of it come up here."""
        self._call("cudaStreamSynchronize", self._stream)

    def wait_quietly(self) -> None:
        """``wait`` before an end, when errors no longer matter."""
        self._cuda.cudaStreamSynchronize(self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` enqueues, as a graph that can be launched again and again.

        Nothing is executed. The addresses and values of arguments are frozen.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def _abandon_capture(self) -> None:
        """Leave capture mode, in which no other work can run."""
        code, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if code == self._cuda.cudaError_t.cudaSuccess and graph is not None:
            self._cuda.cudaGraphDestroy(graph)
        self._cuda.cudaGetLastError()

    def launch(self, executable: Any) -> None:
        """Enqueue a captured graph."""
        self._call("cudaGraphLaunch", executable, self._stream)

    def forget(self, executable: Any) -> None:
        """Destroy a captured graph."""
        self._graphs.remove(executable)
        self._call("cudaGraphExecDestroy", executable)

    def close(self) -> None:
        """Free everything, whatever state CUDA is in; harmless when called again."""
        if self._stream is None:
            return
        self.wait_quietly()
        for executable in self._graphs:
            self._cuda.cudaGraphExecDestroy(executable)
        for address in self._device:
            self._cuda.cudaFree(address)
        for address in self._pinned:
            self._cuda.cudaFreeHost(address)
        self._cuda.cudaStreamDestroy(self._stream)
        self._graphs, self._device, self._pinned, self._stream = [], {}, set(), None
