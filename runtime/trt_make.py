"""Makes the engine folder of an artifact: both graphs compiled, recorded, put in place at once.

Also the quick check that compiles graphs for GPUs that are not here and keeps nothing. How a graph
becomes an engine is in ``trt_build``; what a folder holds, in ``trt_engines``.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from medmo_edge.errors import BackendUnavailable, UsageError
from medmo_edge.manifest import Manifest
from medmo_edge.progress import StageProgress
from medmo_edge.runtime import trt_fit as fit
from medmo_edge.runtime import trt_library
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.trt_build import (
    Built,
    Settings,
    compile_graph,
    decoder_profiles,
    vision_profiles,
)
from medmo_edge.runtime.trt_engines import (
    FILES,
    FOLDER,
    TIMING_CACHE,
    EngineRecord,
    Engines,
    graph_hashes,
    kept_timing_cache,
    key_of,
    new_engine_folder,
    read_record,
    system_name,
    write_record,
)
from medmo_edge.runtime.trt_library import Library

_PROFILES = {"vision": vision_profiles, "decoder": decoder_profiles}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where engines are for: a library, a compute capability, the GPU's name.

    ``is_here``: the GPU is in this machine; ``jetson_bytes``: memory that CPU and GPU share there.
    """

    library: Library
    sm: int
    gpu: str
    is_here: bool
    jetson_bytes: int | None = None


def silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""


def choose_library(*, rtx: bool = False) -> Library:
    """The one to build with. Errors: BackendUnavailable when there is none that can."""
    for each in trt_library.usable():
        if each.is_rtx or not rtx:
            return each
    if rtx and trt_library.usable():
        raise BackendUnavailable(
            "tensorrt-rtx is not installed: pip install 'medmo-edge[tensorrt-rtx]'"
        )
    raise BackendUnavailable(trt_library.build_obstacle() or "TensorRT is not installed")


def place_of(manifest: Manifest, sm: int) -> Place:
    """A GPU that need not be here. Errors: BackendUnavailable without RTX, or for a wrong GPU."""
    library = choose_library(rtx=True)
    place = Place(library=library, sm=sm, gpu=f"any SM {sm}", is_here=False)
    return _checked(manifest, place, fit.precision_obstacle(manifest, sm, "the GPU asked for"))


def place_here(manifest: Manifest, device: Device, *, rtx: bool = False) -> Place:
    """The first GPU of this machine. Errors: BackendUnavailable when there is none that can."""
    if not device.cuda:
        raise BackendUnavailable(
            "no CUDA GPU here: engines are built on the machine that runs them; to try the graphs "
            "without a GPU, use --check --sm 89"
        )
    gpu, shared = device.cuda[0], device.ram_bytes if device.jetson else None
    obstacle = fit.device_obstacle(manifest, device)
    if obstacle is not None:
        raise BackendUnavailable(f"{manifest.folder} ({manifest.target}): {obstacle}")
    library = choose_library(rtx=rtx)
    place = Place(library=library, sm=gpu.sm, gpu=gpu.name, is_here=True, jetson_bytes=shared)
    return _checked(manifest, place, None)


def _checked(manifest: Manifest, place: Place, obstacle: str | None) -> Place:
    library = place.library
    obstacle = obstacle or fit.version_obstacle(manifest, library.name, library.version)
    if obstacle is not None:
        raise BackendUnavailable(f"{manifest.folder} ({manifest.target}): {obstacle}")
    return place


def make_engines(
    manifest: Manifest,
    device: Device,
    *,
    place: Place | None = None,
    output: Path | None = None,
    level: int = 3,
    progress: StageProgress = silent,
) -> Engines:
    """Build both engines into ``output``/<key>, default the artifact's own folder.

    An engine folder of that key is replaced once the new one is complete. Errors:
    BackendUnavailable, ArtifactError; on any of them, and on Ctrl-C, nothing is left.
    """
    place = place or place_here(manifest, device)
    target = (output or manifest.folder / FOLDER) / key_of(place.library, place.sm)
    timing = kept_timing_cache([target])
    built: dict[str, Built] = {}
    with new_engine_folder(target) as staging:
        for name, file in FILES.items():
            settings = _settings(place, level, timing)
            graph = manifest.path_of(name)
            built[name] = compile_one(place.library, name, graph, manifest, settings, progress)
            (staging / file).write_bytes(built[name].engine)
            timing = built[name].timing or timing
        if timing:
            (staging / TIMING_CACHE).write_bytes(timing)
        write_record(staging, _record(manifest, device, place, level, built))
    return Engines(folder=target, record=read_record(target))


def _settings(place: Place, level: int, timing: bytes) -> Settings:
    shared = place.jetson_bytes
    return Settings(
        sm=None if place.is_here else place.sm,
        level=level,
        # Where CPU and GPU share memory, trying a tactic must not starve the rest of the system.
        workspace_bytes=None if shared is None else shared // 4,
        timing=timing,
    )


def compile_one(
    library: Library,
    name: str,
    graph: Path,
    manifest: Manifest,
    settings: Settings,
    progress: StageProgress = silent,
) -> Built:
    """One graph of an artifact, "vision" or "decoder", by its recipe."""
    profiles = partial(_PROFILES[name], recipe=fit.Recipe.of(manifest))
    return compile_graph(library, graph, profiles, settings, progress)


def _record(
    manifest: Manifest, device: Device, place: Place, level: int, built: Mapping[str, Built]
) -> EngineRecord:
    return EngineRecord(
        target=manifest.target,
        library=place.library.name,
        version=place.library.version,
        sm=place.sm,
        system=system_name(),
        gpu=place.gpu,
        driver=device.driver if place.is_here else None,
        cuda_version=device.cuda_version if place.is_here else None,
        graphs=graph_hashes(manifest),
        profiles=fit.Recipe.of(manifest).profiles(),
        settings={"level": level},
        files={FILES[name]: memoryview(each.engine).nbytes for name, each in built.items()},
        seconds={name: round(each.seconds, 3) for name, each in built.items()},
        layers={name: dict(sorted(each.layers.items())) for name, each in built.items()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check_graphs(
    manifest: Manifest,
    graphs: Mapping[str, Path],
    sm: int,
    progress: StageProgress = silent,
) -> dict[str, Any]:
    """Compile graphs (cut ones, as a rule) with RTX for a GPU that need not be here.

    Returns seconds, bytes and layers of each; the engines are dropped. Errors: BackendUnavailable
    also when the artifact's precision is not for such a GPU, ArtifactError, UsageError.
    """
    if not graphs:
        raise UsageError("no graph to check")
    place = place_of(manifest, sm)
    found: dict[str, Any] = {"library": place.library.name, "version": place.library.version}
    for name, graph in graphs.items():
        start = time.monotonic()
        built = compile_one(
            place.library, name, graph, manifest, _settings(place, 3, b""), progress
        )
        found[name] = {
            "seconds": round(time.monotonic() - start, 3),
            "bytes": memoryview(built.engine).nbytes,
            "layers": dict(sorted(built.layers.items())),
        }
    return {"target": manifest.target, "sm": sm, **found}
