"""ONNX Runtime below the backend: the library, sessions, and runs that can be stopped.

Telemetry of the native library is on by default and reads its switch while it loads, so the switch
is set here again before the import. Long native work runs in a thread of its own: the caller goes
on asking the interrupt hook and receives signals, and stops the work at the next graph node.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from logging import getLogger
from pathlib import Path
from typing import Any

from medmo_edge.errors import ArtifactError, BackendUnavailable, GenerationError
from medmo_edge.runtime.backends import Interrupted
from medmo_edge.runtime.device import cpu_features, release_numbers

#: distributions that own the Python module onnxruntime; only one may be installed
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
# The oldest release that these graphs were run with.
MINIMUM_VERSION = (1, 31)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_SILENT = 4  # logging severity: only what kills the process; errors come as exceptions
_POLL_SECONDS = 0.02
# Threads wait busily for the next operation, which is microseconds away, and sleep between runs.
# Without this limit a token cost 92 to 98 ms of CPU time on a busy machine instead of 65 to 74
# (58 to 70 without any spinning; 0.6B shape, int4, two threads).
_SPIN_MICROSECONDS = 50
# How its messages begin; the rest says what is wrong.
_NOISE = "[ONNXRuntimeError] : "
_MAX_LINE = 300
_TOO_NEW = {
    "opset": r"Opset (\d+) is under development.*till opset (\d+)",
    "IR version": r"IR version: (\d+), max supported IR version: (\d+)",
}

Hook = Callable[[], bool]


def versions() -> dict[str, str | None]:
    """Installed version of each distribution; imports nothing."""
    found: dict[str, str | None] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def obstacle() -> str | None:
    """Why the library cannot be used here, else None; loads it when there is no other reason."""
    installed = {name: version for name, version in versions().items() if version}
    if not installed:
        return (
            "onnxruntime is not installed: pip install 'medmo-edge[cpu]', or 'medmo-edge[gpu]' on "
            "a machine with an NVIDIA GPU"
        )
    if len(installed) > 1:
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip "
            "uninstall both, then install one"
        )
    (name, version), *_ = installed.items()
    if release_numbers(version, 2) < MINIMUM_VERSION:
        return (
            f"{name} {version} is too old: install {'.'.join(map(str, MINIMUM_VERSION))} or newer"
        )
    try:
        load_library()
    except BackendUnavailable as error:
        return str(error)
    return None


@cache
def load_library() -> Any:
    """Import onnxruntime (untyped, as it is) once, silent on the network and on the terminal.

    Errors: BackendUnavailable when it does not load.
    """
    if "onnxruntime" in sys.modules and not _silenced_from_outside():
        getLogger("medmo_edge").warning(
            "onnxruntime was imported before medmo_edge and may contact its maker: import "
            "medmo_edge first, or set ORT_DISABLE_TELEMETRY=1 in the environment"
        )
    os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"
    try:
        library = import_module("onnxruntime")
        library.set_default_logger_severity(_SILENT)
    except Exception as error:  # ImportError, or OSError from the dynamic loader
        raise BackendUnavailable(f"onnxruntime does not load: {one_line(error)}") from error
    return library


def _silenced_from_outside() -> bool:
    """Whether the library was told before it was imported; this package's import order says."""
    order = list(sys.modules)
    if order.index("medmo_edge") < order.index("onnxruntime"):
        return True
    try:
        return b"ORT_DISABLE_TELEMETRY=1" in Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:  # no Linux
        return False


def has_cuda() -> bool:
    """Whether the installed flavour could use CUDA; only an open session proves that it does."""
    return CUDA in load_library().get_available_providers()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How sessions run: ``provider``, CPU ``threads``, and whether nodes may be changed."""

    provider: str
    threads: int
    optimise: bool = True


class Interrupt:
    """Runs native work that the hook or a signal can stop."""

    def __init__(self) -> None:
        self.hook: Hook | None = None

    def check(self) -> None:
        """Errors: Interrupted when the hook says so."""
        if self.hook is not None and self.hook():
            raise Interrupted

    def run(self, work: Callable[[], Any], stop: Callable[[], None]) -> Any:
        """The result of ``work``; ``stop`` is called from this thread and must make it end soon.

        Errors: what ``work`` raises; Interrupted when the hook said so; what a signal raised.
        """
        self.check()
        job = _Job(work)
        thread = threading.Thread(target=job.run, name="onnxruntime", daemon=True)
        thread.start()
        try:
            while not job.done.wait(_POLL_SECONDS):
                self.check()
            self.check()
        except BaseException:
            stop()
            job.done.wait()
            raise
        finally:
            thread.join()
        return job.result()


class _Job:
    """One call in another thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # it belongs to the thread that waits
            self._error = error
        finally:
            self.done.set()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


def open_session(path: Path, settings: Settings, interrupt: Interrupt) -> Any:
    """Load one graph with its weights.

    Errors: ArtifactError when ONNX Runtime refuses the file; Interrupted.
    """
    library = load_library()
    options = _options(library, settings)
    # A provider that is not there, or cannot start, leaves its place to the next one.
    known = set(library.get_available_providers())
    providers = [each for each in dict.fromkeys((settings.provider, CPU)) if each in known]

    def load() -> Any:
        return library.InferenceSession(
            os.fspath(path), options, providers=providers, enable_fallback=0
        )

    try:
        return interrupt.run(load, lambda: options.set_load_cancellation_flag(True))
    except Interrupted:
        raise
    except Exception as error:
        raise ArtifactError(_refusal(path, library.__version__, str(error))) from error


def _options(library: Any, settings: Settings) -> Any:
    options = library.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    if not settings.optimise:
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
    entry = options.add_session_config_entry
    entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    entry("session.force_spinning_stop", "1")
    # fp8 graphs with fp32 activations do not load otherwise (microsoft/onnxruntime #22269).
    entry("session.disable_quant_qdq", "1")
    if not sums_int8_exactly(cpu_features()):
        entry("session.x64quantprecision", "1")
    return options


def sums_int8_exactly(features: Sequence[str]) -> bool:
    """Whether the fast int8 kernels are exact on a processor with these features.

    x86 without VNNI adds products of 8 bit in 16 bits, which overflow. ONNX Runtime has an option
    against that, but takes it everywhere: with VNNI it would only cost three quarters of the speed.
    """
    return any(name in features for name in ("avx512_vnni", "avx_vnni", "neon"))


def _refusal(path: Path, version: str, reason: str) -> str:
    for what, pattern in _TOO_NEW.items():
        if found := re.search(pattern, reason):
            return (
                f"{path} has {what} {found[1]}, ONNX Runtime {version} reads up to {found[2]}: "
                "update ONNX Runtime, or export again with this version of medmo-edge"
            )
    if "External" in reason and ("out of bounds" in reason or "does not exist" in reason):
        return f"{path} refers to weights that its data file lacks: copy the artifact again"
    return f"{path} is refused by ONNX Runtime {version}: export again ({_shorten(reason)})"


def run(session: Any, binding: Any, interrupt: Interrupt, *, long: bool) -> None:
    """One inference; a ``long`` one can be stopped in the middle.

    Errors: GenerationError when the library fails, Interrupted.
    """
    options = load_library().RunOptions()
    options.log_severity_level = _SILENT

    def work() -> None:
        session.run_with_iobinding(binding, options)

    def stop() -> None:
        options.terminate = True

    try:
        interrupt.run(work, stop) if long else work()
    except (Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        raise GenerationError(f"ONNX Runtime failed: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What a native error says, on one line; the end names the cause, the start source files."""
    return _shorten(str(error))


def _shorten(message: str) -> str:
    line = " ".join(message.removeprefix(_NOISE).split())
    return line if len(line) < _MAX_LINE else "... " + line[-_MAX_LINE:]
