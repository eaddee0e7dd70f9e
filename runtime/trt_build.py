"""Builds engines: parse a graph, set shape profiles, let TensorRT compile, record what came out.

The network is strongly typed: precision is what the graph says, nothing else. The decoder gets two
profiles, prefill and decode. It loads no engine and measures nothing but its own seconds.

Compiling happens in a thread of its own: the caller goes on receiving signals, and stops the work
at TensorRT's next step.
"""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmo_edge.errors import ArtifactError, BackendUnavailable, one_line
from medmo_edge.progress import StageProgress
from medmo_edge.runtime.trt_fit import Recipe
from medmo_edge.runtime.trt_library import Library, Messages, use_logger

PREFILL, DECODE = 0, 1  # profiles of the decoder
#: what RTX can be told to compile for; full TensorRT always compiles for the GPU it finds
_CURRENT = "CURRENT"
# What to export for a GPU that lacks a number format, by how TensorRT's name of it begins.
_INSTEAD = (("fp8", "trt-int4-awq"), ("fp4", "trt-fp8"), ("bf16", "trt-fp16"), ("", "trt-fp16"))
# What the parser says of an operator that it has no code for.
_UNKNOWN_OPERATOR = ("no importer", "plugin not found", "unsupported op")
_POLL_SECONDS = 0.05
_MAX_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to compile: ``sm`` names the GPU (RTX only), None the one that is here.

    ``level``: TensorRT's effort, 0 to 5; ``workspace_bytes``: most memory that a layer may take
    for itself, None as TensorRT likes; ``timing``: a timing cache to start from.
    """

    sm: int | None = None
    level: int = 3
    workspace_bytes: int | None = None
    timing: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One engine: its bytes, the layers of the parsed network by type, and the new timing cache."""

    engine: Any = field(repr=False)  # has the buffer interface
    layers: dict[str, int]
    seconds: float
    timing: bytes = field(default=b"", repr=False)


Shape = tuple[int, ...]
#: (least, tuned for, most) for every input that is not fixed
Profile = dict[str, tuple[Shape, Shape, Shape]]


def decoder_profiles(inputs: Mapping[str, Shape], recipe: Recipe) -> list[Profile]:
    """Prefill and decode. ``inputs``: shapes with -1 for what is free, batch and tokens."""
    tokens = {PREFILL: (1, recipe.opt, recipe.chunk), DECODE: (1, 1, 1)}
    return [_profile(inputs, tokens[index], {}) for index in sorted(tokens)]


def vision_profiles(inputs: Mapping[str, Shape], recipe: Recipe) -> list[Profile]:
    """One picture of any number of patches."""
    return [_profile(inputs, recipe.patches, {"cos": 0, "sin": 0})]


def _profile(
    inputs: Mapping[str, Shape], steps: tuple[int, int, int], free_axis: Mapping[str, int]
) -> Profile:
    """``steps`` on the axis that varies, by default the second; a batch, if there is one, is 1."""
    found: Profile = {}
    for name, shape in inputs.items():
        if -1 in shape:
            varies = free_axis.get(name, 1)
            low, usual, high = (_filled(shape, varies, step) for step in steps)
            found[name] = (low, usual, high)
    return found


def _filled(shape: Shape, varies: int, step: int) -> Shape:
    return tuple(
        size if size >= 0 else step if axis == varies else 1 for axis, size in enumerate(shape)
    )


def compile_graph(
    library: Library,
    graph: Path,
    profiles: Callable[[Mapping[str, Shape]], Sequence[Profile]],
    settings: Settings,
    progress: StageProgress,
) -> Built:
    """An engine of one ONNX file.

    Errors: ArtifactError when TensorRT refuses the graph, BackendUnavailable when it cannot compile
    for this GPU; KeyboardInterrupt stops it.
    """
    start = time.monotonic()
    trt = library.load()
    logger, messages = use_logger(library)
    builder = _make_builder(trt, logger, messages, library)
    network, parser = _parse(trt, builder, logger, messages, graph, library)
    layers = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    config = builder.create_builder_config()
    _configure(trt, config, settings, library)
    inputs = {each.name: tuple(each.shape) for each in _inputs(network)}
    for profile in profiles(inputs):
        config.add_optimization_profile(_make_profile(builder, profile))
    # In RTX timing caches do nothing.
    timing = None if library.is_rtx else _attach_timing_cache(config, settings.timing)
    watch = _Watch(graph.stem, progress)
    monitor = _make_monitor(trt, watch)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor
    engine = watch.run(lambda: builder.build_serialized_network(network, config))
    if engine is None:
        raise _refusal(library, graph, messages.first())
    del parser  # owns the weights that the builder has read until now
    seconds = time.monotonic() - start
    return Built(
        engine=engine, layers=dict(layers), seconds=seconds, timing=_timing_bytes(config, timing)
    )


def _make_builder(trt: Any, logger: Any, messages: Messages, library: Library) -> Any:
    try:
        return trt.Builder(logger)
    except Exception as error:  # the bindings raise TypeError when CUDA does not start
        reason = messages.first() if messages.errors else one_line(error)
        raise BackendUnavailable(
            f"{library.name} {library.version} cannot build here: {reason}"
        ) from error


def _parse(
    trt: Any, builder: Any, logger: Any, messages: Messages, graph: Path, library: Library
) -> tuple[Any, Any]:
    network = builder.create_network(_network_flags(trt, library))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        error = parser.get_error(0) if parser.num_errors else None
        operator = error.node_operator() if error else ""
        raise _parse_refusal(library, graph, operator, error.desc() if error else messages.first())
    return network, parser


def _network_flags(trt: Any, library: Library) -> int:
    """Strong typing has to be asked for in TensorRT 10 and RTX; in 11 there is nothing else."""
    major = int(library.version.split(".")[0])
    if major >= 11 and not library.is_rtx:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse_refusal(library: Library, graph: Path, operator: str, reason: str) -> ArtifactError:
    text = " ".join(reason.split())[:_MAX_SHOWN]
    if any(phrase in text.lower() for phrase in _UNKNOWN_OPERATOR):
        return ArtifactError(
            f"{graph} uses the operator {operator or 'named here'}, which {library.name} "
            f"{library.version} does not know ({text}): update TensorRT, or export again with this "
            "version of medmo-edge"
        )
    where = f" at {operator}" if operator else ""
    return ArtifactError(
        f"{graph} is refused by {library.name} {library.version}{where}: export again ({text})"
    )


def _refusal(library: Library, graph: Path, reason: str) -> BackendUnavailable:
    """Why compiling failed, with what to do where that is known."""
    text = reason[:_MAX_SHOWN]
    advice = "report this with the artifact's manifest.json"
    if numbers := re.search(r"HW-specific datatypes: (\w+)", text):
        target = next(target for name, target in _INSTEAD if numbers[1].startswith(name))
        advice = f"this GPU has no {numbers[1]}: export --target {target}"
    elif "memory" in text.lower():
        advice = "close other programs, or export again with a shorter --cache-length"
    return BackendUnavailable(
        f"{library.name} {library.version} cannot compile {graph.name}: {text}: {advice}"
    )


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(index) for index in range(network.num_inputs)]


def _configure(trt: Any, config: Any, settings: Settings, library: Library) -> None:
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if not library.is_rtx:
        config.builder_optimization_level = settings.level
        return
    config.num_compute_capabilities = 1
    name = _CURRENT if settings.sm is None else f"SM{settings.sm}"
    known = trt.ComputeCapability.__members__
    if name not in known:
        numbers = ", ".join(each[2:] for each in known if each.startswith("SM"))
        raise BackendUnavailable(
            f"{library.name} {library.version} compiles for SM {numbers}, not {settings.sm}: "
            "use full TensorRT on that machine"
        )
    config.set_compute_capability(known[name], 0)


def _make_profile(builder: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, shapes in profile.items():
        made.set_shape(name, *shapes)
    return made


def _attach_timing_cache(config: Any, content: bytes) -> Any:
    """The cache of an earlier build, or an empty one when TensorRT does not like it."""
    for each in (content, b""):
        cache = config.create_timing_cache(each)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _timing_bytes(config: Any, cache: Any) -> bytes:
    found = config.get_timing_cache() if cache is not None else None
    return bytes(found.serialize()) if found is not None else b""


class _Watch:
    """Progress of one build, and the wish to end it."""

    def __init__(self, graph: str, progress: StageProgress) -> None:
        self._graph, self._progress = graph, progress
        self._stop = threading.Event()
        self._phases: dict[str, int] = {}
        self._errors: list[BaseException] = []

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """TensorRT entered a phase; only outer ones are shown."""
        if parent is None:
            self._phases[phase] = steps
            self._tell(phase, 0)

    def stepped(self, phase: str, step: int) -> bool:
        """A step is done; False asks TensorRT to give up."""
        if phase in self._phases:
            self._tell(phase, step + 1)
        return not self._stop.is_set()

    def _tell(self, phase: str, done: int) -> None:
        """Nothing may be raised through TensorRT's own frames."""
        try:
            self._progress(f"{self._graph}: {phase}", done, self._phases[phase])
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def run(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``; Ctrl-C is raised here once TensorRT has given up.

        An event is waited for, not the thread: in Python 3.11 an interrupted ``join`` takes the
        thread for ended, and a process that ends before TensorRT's threads do is aborted.
        """
        results: list[Any] = []
        done = threading.Event()

        def job() -> None:
            try:
                results.append(work())
            except BaseException as error:  # it belongs to the thread that waits
                self._errors.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=job, name="tensorrt", daemon=True)
        thread.start()
        try:
            while not done.wait(_POLL_SECONDS):
                pass
        except BaseException:
            self._stop.set()
            _wait_patiently(done)
            raise
        finally:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return results[0]


def _wait_patiently(done: threading.Event) -> None:
    """Also through a second Ctrl-C."""
    while not done.is_set():
        try:
            done.wait()
        except KeyboardInterrupt:
            continue


def _make_monitor(trt: Any, watch: _Watch) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            watch.started(phase, parent, steps)

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return watch.stepped(phase, step)

    return Monitor()
