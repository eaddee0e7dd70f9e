"""llama.cpp below the backend: the library, its messages, its interrupts and its memory.

Only the low-level interface of llama-cpp-python (``llama_cpp.llama_cpp`` and ``mtmd_cpp``, ctypes)
is used. Native code never prints: one callback collects the messages of all three loggers, so that
an error can quote the last one. Signals that arrive during native work stop it and are delivered
afterwards; ctypes would swallow an exception raised inside a callback.
"""

import ctypes
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from logging import getLogger
from pathlib import Path
from types import FrameType
from typing import Any

from medmo_edge.errors import BackendUnavailable, one_line
from medmo_edge.runtime.device import release_numbers

DISTRIBUTION = "llama-cpp-python"
# The first release we know to interpolate Qwen3-VL's position table with align_corners, as
# transformers does (llama.cpp #25781): with older ones boxes drift away from the image centre.
MINIMUM_VERSION = (0, 3, 36)
_REQUIRED = {
    "llama_cpp.llama_cpp": (
        "LLAMA_LOAD_MODE_MMAP",
        "llama_get_memory",
        "llama_log_set",
        "llama_memory_seq_rm",
        "llama_model_n_embd_inp",
        "llama_set_abort_callback",
        "llama_state_seq_set_data",
    ),
    "llama_cpp.mtmd_cpp": (
        "mtmd_encode_chunk",
        "mtmd_get_output_embd",
        "mtmd_helper_decode_image_chunk",
        "mtmd_helper_log_set",
        "mtmd_log_set",
    ),
}
# Packages that load an OpenMP runtime, which reads its settings once.
_OPENMP_MODULES = ("llama_cpp", "sklearn", "torch")
_WARN, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level
# Nodes of the vision graph computed between two looks at the interrupt hook.
_NODES_PER_LOOK = 32


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded ctypes modules (untyped, as ctypes is) and what they said."""

    llama: Any
    mtmd: Any
    messages: "Messages"


class Messages:
    """Warnings and errors of native code, oldest dropped first; one per process."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=50)
        self._level = 0

    def receive(self, level: int, text: bytes | None, _: object) -> None:
        """The logger callback: a message may come in pieces."""
        self._level = self._level if level == _CONTINUED else level
        line = (text or b"").decode("utf-8", "replace").strip()
        if self._level in (_WARN, _ERROR) and line:
            self._lines.append(line)

    def clear(self) -> None:
        """Forget what was said about earlier work."""
        self._lines.clear()

    def last(self) -> str:
        """The last messages as the end of one line, empty when nothing was said."""
        # The first error names the cause; what follows only says who passed it on.
        causes = [line for line in self._lines if "error" in line.lower() or "fail" in line.lower()]
        line = " ".join((causes or list(self._lines) or [""])[0].split())
        return f" (llama.cpp: {line[:300]})" if line else ""


def version() -> str | None:
    """Installed version of llama-cpp-python, or None; imports nothing."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def obstacle() -> str | None:
    """Why the library cannot be used here, else None; loads it when there is no other reason."""
    installed = version()
    if installed is None:
        return f"{DISTRIBUTION} is not installed: pip install 'medmo-edge[llamacpp]'"
    if release_numbers(installed, 3) < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        return f"{DISTRIBUTION} {installed} places boxes wrongly: install {needed} or newer"
    try:
        load_library()
    except BackendUnavailable as error:
        return str(error)
    return None


@cache
def load_library() -> Library:
    """Import and initialise llama.cpp once per process.

    Errors: BackendUnavailable when a library or symbol is missing.
    """
    _warn_about_spinning()
    # An assertion that fails would start a debugger on this process to print where.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        llama, mtmd = (import_module(name) for name in _REQUIRED)
    except Exception as error:  # ImportError, or RuntimeError / OSError from its own loader
        raise BackendUnavailable(
            f"{DISTRIBUTION} does not load: {one_line(error, 300, named=True)}"
        ) from error
    for module, names in zip((llama, mtmd), _REQUIRED.values(), strict=True):
        for name in names:
            if not hasattr(module, name):
                raise BackendUnavailable(f"{DISTRIBUTION} {version()} has no {name}")
    messages = Messages()
    _keep_alive.append(llama.llama_log_callback(messages.receive))
    for set_logger in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
        set_logger(_keep_alive[-1], None)
    llama.llama_backend_init()
    return Library(llama, mtmd, messages)


# Callbacks that native code may call until the process ends.
_keep_alive: list[Any] = []


def openmp_spins() -> bool:
    """Whether OpenMP may have read its settings before this package set GOMP_SPINCOUNT."""
    if os.environ.get("GOMP_SPINCOUNT") != "0":
        return True
    try:
        if b"GOMP_SPINCOUNT=0" in Path("/proc/self/environ").read_bytes().split(b"\0"):
            return False  # set from outside, before anything could load
    except OSError:  # no Linux
        return False
    order = list(sys.modules)
    first = order.index("medmo_edge")
    return any(name in order[:first] for name in _OPENMP_MODULES)


def _warn_about_spinning() -> None:
    if openmp_spins():
        getLogger("medmo_edge").warning(
            "OpenMP threads may spin, and answers take minutes on a busy machine: import "
            "medmo_edge before %s, or set GOMP_SPINCOUNT=0 in the environment",
            ", ".join(_OPENMP_MODULES),
        )


class Interrupt:
    """The question that native code asks again and again: stop now?

    It answers yes when the hook says so or when a signal waits for delivery.
    """

    def __init__(self, library: Library) -> None:
        self.hook: Callable[[], bool] | None = None
        self._signalled: tuple[int, FrameType | None] | None = None
        self._nodes = 0
        self._abort_callback = library.llama.ggml_abort_callback(lambda _: self.wanted())
        self._never = library.llama.ggml_abort_callback(0)  # a null pointer
        #: ctypes callbacks for the vision tower (``cb_eval``) and for loading
        self.eval_callback = library.llama.ggml_backend_sched_eval_callback(self._at_node)
        self.progress_callback = library.llama.llama_progress_callback(
            lambda _, __: not self.wanted()
        )

    def wanted(self) -> bool:
        """Whether to stop now."""
        return self._signalled is not None or (self.hook is not None and self.hook())

    def _at_node(self, _: object, asked: bool, __: object) -> bool:
        """Vision scheduler: ``asked`` selects the nodes after which it looks again."""
        if not asked:
            return not self.wanted()
        self._nodes += 1
        return self._nodes % _NODES_PER_LOOK == 0

    @contextmanager
    def of_text(self, library: Library, context: int | None) -> Iterator[None]:
        """Let ``llama_decode`` of this context ask before every operation, if anybody may say no.

        Every question waits for the interpreter's lock.
        """
        silent = self.hook is None and threading.current_thread() is not threading.main_thread()
        if context is None or silent:
            yield
            return
        library.llama.llama_set_abort_callback(context, self._abort_callback, None)
        try:
            yield
        finally:
            library.llama.llama_set_abort_callback(context, self._never, None)

    @contextmanager
    def native_work(self) -> Iterator[None]:
        """Hold signals back during native work in the main thread; deliver them afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        held = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in held:
            signal.signal(number, self._remember)
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)
            self._deliver(held)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signalled = (number, frame)

    def _deliver(self, handlers: dict[signal.Signals, Any]) -> None:
        if self._signalled is not None:
            number, frame = self._signalled
            self._signalled = None
            handlers[signal.Signals(number)](number, frame)


class Handles:
    """Native objects of one artifact, freed in the order of ownership: vision, context, model."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.model: int | None = None
        self.context: int | None = None
        self.vision: int | None = None

    def free_context(self) -> None:
        """Free the text context and its KV cache, if there is one."""
        if self.context is not None:
            self._library.llama.llama_free(self.context)
            self.context = None

    def free(self) -> None:
        """Free everything; harmless when called again."""
        if self.vision is not None:
            self._library.mtmd.mtmd_free(self.vision)
            self.vision = None
        self.free_context()
        if self.model is not None:
            self._library.llama.llama_model_free(self.model)
            self.model = None


def has_amx_code(llama: Any) -> bool:
    """Whether this llama.cpp was compiled with AMX kernels.

    On a processor with AMX they fault at the first quantised matrix product when the compiler
    optimises the tile configuration away (ggml-org/llama.cpp #20824, PR #26954, open in 2026-11).
    """
    return b"AMX_INT8 = 1" in llama.llama_print_system_info()


def open_model(library: Library, path: Path, *, mmap: bool, interrupt: Interrupt) -> int | None:
    """Load the language file on the CPU; None when llama.cpp refuses it or was interrupted."""
    llama = library.llama
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mmap else llama.LLAMA_LOAD_MODE_NONE
    parameters.progress_callback = interrupt.progress_callback
    # The only switch that keeps AMX out; repacking for AVX goes with it, but slow beats a crash.
    parameters.use_extra_bufts = not has_amx_code(library.llama)
    model: int | None = llama.llama_model_load_from_file(os.fsencode(path), parameters)
    return model


def open_context(
    library: Library, model: int, *, cells: int, lanes: int, batch: int, threads: int
) -> int | None:
    """A context with an f16 KV cache of ``cells`` tokens in ``lanes`` equal parts.

    None when memory does not suffice.
    """
    llama = library.llama
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = cells, batch, batch
    parameters.n_seq_max = lanes
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.offload_kqv = parameters.op_offload = False
    context: int | None = llama.llama_init_from_model(model, parameters)
    return context


def open_vision(
    library: Library, path: Path, model: int, *, threads: int, max_tokens: int, interrupt: Interrupt
) -> int | None:
    """The vision tower; None when the file is refused. It never resizes up to ``max_tokens``."""
    parameters = library.mtmd.mtmd_context_params_default()
    parameters.use_gpu = parameters.print_timings = parameters.warmup = False
    parameters.n_threads = threads
    # Without flash attention a picture of 1024 tokens needs half as much time again, and 1 GB.
    parameters.flash_attn_type = library.llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    # Its own limits would make llama.cpp resize, letterboxed, what we have already resized.
    parameters.image_min_tokens, parameters.image_max_tokens = 1, max_tokens
    parameters.cb_eval = interrupt.eval_callback
    vision: int | None = library.mtmd.mtmd_init_from_file(os.fsencode(path), model, parameters)
    return vision


def token_batch(library: Library, ids: Any, positions: Any) -> Any:
    """A llama_batch over two int32 arrays, which must stay alive; logits of the last token only."""
    batch = library.llama.llama_batch()
    batch.n_tokens = len(ids)
    batch.token = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    return batch
