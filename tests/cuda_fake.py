"""A stand-in for cuda.bindings.runtime that holds device memory in numpy and forgives nothing.

Work on a stream is put off until somebody waits, as late as CUDA may do it: results that are read
too early are not there yet, and pinned inputs that change too early are seen changed. Memory of the
GPU begins as NaN, its addresses are never used twice, and every access is checked against what is
allocated. What CUDA would answer with an error code comes back as one; what would be undefined
behaviour raises ``Violation``.

Not modelled: several streams at work at once, events, peers, managed memory.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST_ADDRESS = 0x7F00_0000_0000
_GUARD = 1 << 20
_ALIGNMENT = 256

Operation = Callable[[], None]


class Violation(AssertionError):
    """The code under test did what CUDA leaves undefined."""


class Error(IntEnum):
    """The part of cudaError_t that is used."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class MemcpyKind(IntEnum):
    """cudaMemcpyKind."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(IntEnum):
    """cudaStreamCaptureMode."""

    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


_TEXTS = {
    Error.cudaErrorMemoryAllocation: b"out of memory",
    Error.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime",
    Error.cudaErrorIllegalAddress: b"an illegal memory access was encountered",
    Error.cudaErrorStreamCaptureUnsupported: b"operation not permitted when stream is capturing",
    Error.cudaErrorStreamCaptureInvalidated: b"operation failed due to a previous error",
}


@dataclass(eq=False)
class Stream:
    """Work that was enqueued and not done yet; ``captured`` is a list while it is capturing."""

    handle: int
    queue: list[Operation] = field(default_factory=list)
    captured: list[Operation] | None = None
    is_broken: bool = False

    def __int__(self) -> int:
        return self.handle


@dataclass(eq=False)
class Graph:
    """A captured graph, or an executable one."""

    operations: list[Operation]
    is_alive: bool = True


class FakeCuda:
    """The functions of cuda.bindings.runtime that the backend calls, with their signatures."""

    cudaError_t = Error
    cudaMemcpyKind = MemcpyKind
    cudaStreamCaptureMode = CaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, total_bytes: int = 1 << 30) -> None:
        self._total = total_bytes
        self._next = _FIRST_ADDRESS
        self._device: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, Stream] = {}
        self._executables: list[Graph] = []
        #: function name -> code that it answers with, e.g. a failing driver
        self.failures: dict[str, Error] = {}
        #: how often each function was called
        self.calls: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found
        failure = self.failures.get(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        return found if failure is None else lambda *_: (failure, None)

    # What tests look at.

    @property
    def used_bytes(self) -> int:
        """Memory of the GPU in use."""
        return sum(each.nbytes for each in self._device.values())

    def leaks(self) -> list[str]:
        """What is allocated or alive still."""
        return [
            *(f"device memory of {each.nbytes} bytes" for each in self._device.values()),
            *(f"pinned memory of {each.nbytes} bytes" for each in self._pinned.values()),
            *(f"stream {handle}" for handle in self._streams),
            *("a graph" for each in self._executables if each.is_alive),
        ]

    def memory(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the GPU; a Violation outside of what is allocated now."""
        for start, block in self._device.items():
            if start <= address and address + nbytes <= start + block.nbytes:
                return block[address - start : address - start + nbytes]
        raise Violation(f"GPU address {address:#x} of {nbytes} bytes is not allocated")

    def stream(self, handle: int) -> Stream:
        """The stream of a handle."""
        if int(handle) not in self._streams:
            raise Violation(f"no stream has the handle {handle}")
        return self._streams[int(handle)]

    def enqueue(self, handle: int, operation: Operation) -> None:
        """Put work behind what a stream has, or into the graph that it captures."""
        stream = self.stream(handle)
        (stream.queue if stream.captured is None else stream.captured).append(operation)

    def is_capturing(self, handle: int) -> bool:
        """Whether a stream is capturing."""
        return self.stream(handle).captured is not None

    # The functions.

    def cudaSetDevice(self, device: int) -> tuple[Error]:
        return (Error.cudaSuccess if device == 0 else Error.cudaErrorInvalidValue,)

    def cudaGetLastError(self) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, _TEXTS.get(error, b"unknown error")

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self._total - self.used_bytes, self._total

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, Stream]:
        stream = Stream(handle=len(self._streams) + 1)
        self._streams[stream.handle] = stream
        return Error.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Error]:
        del self._streams[self.stream(int(stream)).handle]
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Error]:
        if stream.captured is not None:
            stream.is_broken = True
            return (Error.cudaErrorStreamCaptureUnsupported,)
        self._drain(stream)
        return (Error.cudaSuccess,)

    def _drain(self, stream: Stream) -> None:
        queue, stream.queue = stream.queue, []
        for operation in queue:
            operation()

    def _is_any_capturing(self) -> bool:
        captures = [each for each in self._streams.values() if each.captured is not None]
        for stream in captures:
            stream.is_broken = True
        return bool(captures)

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        if self._is_any_capturing():
            return Error.cudaErrorStreamCaptureUnsupported, None
        if self.used_bytes + size > self._total:
            return Error.cudaErrorMemoryAllocation, None
        address = self._next
        self._device[address] = np.full(size, 0xFF, np.uint8)  # NaN in every format
        self._next += size + _GUARD + -size % _ALIGNMENT
        return Error.cudaSuccess, address

    def cudaFree(self, devPtr: int) -> tuple[Error]:
        if any(stream.queue for stream in self._streams.values()):
            raise Violation("memory is freed while work is pending")
        if devPtr not in self._device:
            raise Violation(f"{devPtr:#x} is freed twice or was never allocated")
        del self._device[devPtr]
        return (Error.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[Error, int]:
        array = np.full(size, 0xFF, np.uint8)
        self._pinned[array.ctypes.data] = array
        return Error.cudaSuccess, array.ctypes.data

    def cudaFreeHost(self, ptr: int) -> tuple[Error]:
        if ptr not in self._pinned:
            raise Violation("pinned memory is freed twice or was never allocated")
        del self._pinned[ptr]
        return (Error.cudaSuccess,)

    def _is_pinned(self, address: int, nbytes: int) -> bool:
        return any(
            start <= address and address + nbytes <= start + block.nbytes
            for start, block in self._pinned.items()
        )

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Stream) -> tuple[Error]:
        target = self.memory(devPtr, count)
        self.enqueue(int(stream), lambda: target.fill(value))
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: MemcpyKind, stream: Stream
    ) -> tuple[Error]:
        return self.cudaMemcpy2DAsync(dst, count, src, count, count, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self,
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: MemcpyKind,
        stream: Stream,
    ) -> tuple[Error]:
        if width > dpitch or width > spitch:
            return (Error.cudaErrorInvalidValue,)
        sides = {"dst": (dst, dpitch), "src": (src, spitch)}
        host = {1: "src", 2: "dst"}.get(int(kind))
        for side, (address, pitch) in sides.items():
            nbytes = pitch * (height - 1) + width
            if side != host:
                self.memory(address, nbytes)
            elif address >= _FIRST_ADDRESS and address < self._next:
                raise Violation("a GPU address is given as the computer's")
        self._copy_when_due(sides, host, width, height, stream)
        return (Error.cudaSuccess,)

    def _copy_when_due(
        self,
        sides: dict[str, tuple[int, int]],
        host: str | None,
        width: int,
        height: int,
        stream: Stream,
    ) -> None:
        def copy() -> None:
            for row in range(height):
                values = self._bytes(sides["src"], row, width, is_host=host == "src")
                self._bytes(sides["dst"], row, width, is_host=host == "dst")[:] = values

        if host is None or self._is_pinned(sides[host][0], width * height):
            self.enqueue(int(stream), copy)
            return
        # Pageable memory: CUDA takes the bytes, or brings them, before the call returns.
        if stream.captured is not None:
            raise Violation("pageable memory takes part in a captured graph")
        if host == "src":
            taken = [
                self._bytes(sides["src"], row, width, is_host=True).copy() for row in range(height)
            ]

            def put() -> None:
                for row, values in enumerate(taken):
                    self._bytes(sides["dst"], row, width, is_host=False)[:] = values

            self.enqueue(int(stream), put)
        else:
            self._drain(stream)
            copy()

    def _bytes(
        self, side: tuple[int, int], row: int, width: int, *, is_host: bool
    ) -> NDArray[np.uint8]:
        address = side[0] + row * side[1]
        if not is_host:
            return self.memory(address, width)
        return np.ctypeslib.as_array((ctypes.c_uint8 * width).from_address(address))

    def cudaStreamBeginCapture(self, stream: Stream, mode: CaptureMode) -> tuple[Error]:
        if stream.captured is not None:
            return (Error.cudaErrorStreamCaptureUnsupported,)
        stream.captured, stream.is_broken = [], False
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Error, Graph | None]:
        captured, stream.captured = stream.captured, None
        if captured is None or stream.is_broken:
            return Error.cudaErrorStreamCaptureInvalidated, None
        return Error.cudaSuccess, Graph(captured)

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> tuple[Error, Graph]:
        executable = Graph(list(graph.operations))
        self._executables.append(executable)
        return Error.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: Graph) -> tuple[Error]:
        graph.is_alive = False
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: Graph) -> tuple[Error]:
        graphExec.is_alive = False
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec: Graph, stream: Stream) -> tuple[Error]:
        if not graphExec.is_alive:
            raise Violation("a destroyed graph is launched")
        for operation in graphExec.operations:
            self.enqueue(int(stream), operation)
        return (Error.cudaSuccess,)
