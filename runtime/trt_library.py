"""TensorRT's Python modules: which one is installed, whether it is new enough, what it says.

``tensorrt`` and ``tensorrt_rtx`` offer the same classes for what is needed here. Nothing is
imported before an engine is built or loaded: versions come from the packages' metadata. CUDA calls
are in ``trt_cuda``.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, Literal

from medmo_edge.errors import BackendUnavailable, one_line
from medmo_edge.runtime.device import release_numbers

Name = Literal["tensorrt", "tensorrt-rtx"]
#: in order of preference; tensorrt-rtx is the one for GeForce and RTX cards, and builds without GPU
NAMES: tuple[Name, ...] = ("tensorrt", "tensorrt-rtx")
CUDA = "cuda-bindings"
# Attention came with 10.14, rotary embedding and KV cache with 10.15; RTX 1.7 is what was tried.
_MINIMUM: dict[Name, tuple[int, int]] = {"tensorrt": (10, 15), "tensorrt-rtx": (1, 7)}
_KEPT_MESSAGES = 20
_ADVICE = (
    "pip install 'medmo-edge[tensorrt-rtx]' for an RTX card, install NVIDIA's tensorrt otherwise "
    "(see docs/tensorrt.md); on a Jetson it comes with JetPack 7.2"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One installed flavour; ``version`` in full, since engines are bound to it."""

    name: Name
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, which names its target GPUs."""
        return self.name == "tensorrt-rtx"

    @property
    def short_version(self) -> str:
        """Three numbers of the version."""
        return ".".join(map(str, release_numbers(self.version, 3)))

    def same_version(self, version: str) -> bool:
        """Whether ``version`` has the same four numbers."""
        return release_numbers(version, 4) == release_numbers(self.version, 4)

    def obstacle(self) -> str | None:
        """Why this one is too old, else None."""
        minimum = _MINIMUM[self.name]
        if release_numbers(self.version, 2) >= minimum:
            return None
        needed = ".".join(map(str, minimum))
        hint = ", on a Jetson JetPack 7.2 or newer has it" if self.name == "tensorrt" else ""
        return (
            f"{self.name} {self.version} is too old, {needed} is the first that can run these "
            f"graphs: update it{hint}; or export a gguf target for llama.cpp"
        )

    def load(self) -> Any:
        """The module (untyped, as it is). Errors: BackendUnavailable when it does not load."""
        return _load(_module_name(self.name))


def versions() -> dict[str, str | None]:
    """Installed version of each distribution; imports nothing unless metadata is missing."""
    return {name: _version(name) for name in (*NAMES, CUDA)}


def installed() -> tuple[Library, ...]:
    """What is installed, in order of preference, old versions included."""
    return tuple(
        Library(name=name, version=version)
        for name in NAMES
        if (version := _version(name)) is not None
    )


def usable() -> tuple[Library, ...]:
    """What is installed and new enough."""
    return tuple(each for each in installed() if each.obstacle() is None)


def build_obstacle() -> str | None:
    """Why no engine can be built here, else None."""
    found = installed()
    if not found:
        return f"TensorRT is not installed: {_ADVICE}"
    return None if usable() else found[0].obstacle()


def run_obstacle() -> str | None:
    """Why no engine can run here as far as libraries go, else None."""
    obstacle = build_obstacle()
    if obstacle is None and _version(CUDA) is None:
        return "cuda-bindings is not installed: pip install 'medmo-edge[tensorrt]'"
    return obstacle


def _module_name(name: Name) -> str:
    return name.replace("-", "_")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    # A system package may come without metadata; cuda-bindings never does.
    if name == "tensorrt" and find_spec(name) is not None:
        try:
            return str(_load(name).__version__)
        except BackendUnavailable:
            return None
    return None


@cache
def _load(module: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # ImportError, or OSError and RuntimeError from the loader
        raise BackendUnavailable(f"{module} does not load: {one_line(error)}") from error


@dataclass(slots=True)
class Messages:
    """What a library reported: the first errors since ``clear``, oldest first."""

    errors: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was reported before the next piece of work."""
        self.errors.clear()

    def first(self) -> str:
        """The first error on one line: later ones follow from it."""
        return " ".join(self.errors[0].split())[:300] if self.errors else "no reason was given"


# By module name: TensorRT goes on using the first logger while anything made with it lives, so
# there can be only one; the module is kept beside it because a logger is of its classes.
_loggers: dict[str, tuple[Any, Any, Messages]] = {}


def use_logger(library: Library) -> tuple[Any, Messages]:
    """The logger for Builder, parser and Runtime, which keeps errors and prints nothing."""
    trt = library.load()
    known = _loggers.get(library.name)
    if known is None or known[0] is not trt:
        messages = Messages()
        known = _loggers[library.name] = (trt, _make_logger(trt, messages), messages)
    known[2].clear()
    return known[1], known[2]


def _make_logger(trt: Any, messages: Messages) -> Any:
    severe = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severe and len(messages.errors) < _KEPT_MESSAGES:
                messages.errors.append(message)

    return Logger()
