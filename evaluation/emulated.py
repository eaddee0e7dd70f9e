"""Artifacts for TensorRT asked without a GPU: their graphs, weights and rounding, on the CPU.

For measuring what a target costs in accuracy before a GPU is at hand. It says nothing about speed,
nor about what TensorRT makes of the graphs: a certificate of an emulated run is bound to the device
class "emulated ..." and never counts where an engine runs. Numbers are those of ``emulated_graph``.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from tempfile import TemporaryDirectory

from medmo_edge.errors import ArtifactError, BackendUnavailable, UsageError
from medmo_edge.evaluation.emulated_graph import emulate_graph
from medmo_edge.manifest import MANIFEST_NAME, Manifest, read_manifest
from medmo_edge.runtime import ort_native as native
from medmo_edge.runtime.backends import choose
from medmo_edge.runtime.chat import Chat
from medmo_edge.runtime.device import Device, probe
from medmo_edge.runtime.model_facts import memory_obstacle
from medmo_edge.runtime.ort import Ort
from medmo_edge.runtime.session import Session, load

BACKEND, FORMAT = "emulated", "trt"
_PREFIX_BYTES = 256 << 20
_ROLES = ("vision", "decoder")


def open_session(
    path: str | Path,
    backend: str = "auto",
    *,
    threads: int | None = None,
    max_context: int | None = None,
) -> Session:
    """A session of an artifact: as ``runtime.load``, but ``backend`` may be "emulated".

    "auto" emulates an artifact for TensorRT where no engine of it can run, and says why. Errors: as
    ``load``; UsageError when an artifact of another kind is to be emulated.
    """
    obstacle = _obstacle(Path(path), backend)
    if obstacle is None:
        return load(path, backend, threads=threads, max_context=max_context)
    if obstacle:
        getLogger("medmo_edge").warning(f"{path} is emulated on the CPU: {obstacle}")
    return emulate(path, threads=threads, max_context=max_context)


def emulate(
    path: str | Path,
    *,
    threads: int | None = None,
    max_context: int | None = None,
    rounded: bool = True,
) -> Session:
    """A session that computes an artifact's graphs in ONNX Runtime on the CPU.

    ``rounded``: the result of every operator in the graph's own 16 bits; otherwise float32
    between the roundings that the graph itself asks for. Errors: ArtifactError,
    BackendUnavailable.
    """
    start = time.perf_counter()
    manifest = read_manifest(path)
    backend = Emulated(manifest, probe(), threads, max_context, rounded=rounded)
    try:
        chat = Chat.from_artifact(manifest)
    except BaseException:
        backend.close()
        raise
    return Session(
        backend,
        chat,
        manifest,
        budget_bytes=_PREFIX_BYTES,
        load_seconds=time.perf_counter() - start,
        chosen="emulated, for evaluation only",
    )


def _obstacle(path: Path, backend: str) -> str | None:
    """None: no emulation. Else why the artifact is emulated, "" when that was asked for."""
    if backend not in (BACKEND, "auto") or not (path / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(path, verify=False)
    if backend == BACKEND:
        if manifest.backend != FORMAT:
            raise UsageError(f"{manifest.target} needs no emulation: leave --backend out")
        return ""
    if manifest.backend != FORMAT:
        return None
    choices = {choice.name: choice for choice in choose(manifest, probe())}
    choice = choices.get(FORMAT)
    return choice.obstacle if choice else "this version has no TensorRT backend"


class Emulated(Ort):
    """The backend: ``Ort`` on rewritten copies of the graphs, which live as long as it does."""

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        threads: int | None,
        max_context: int | None,
        *,
        rounded: bool,
    ) -> None:
        """Errors: ArtifactError, BackendUnavailable."""
        native.load_library()
        obstacle = memory_obstacle(_needed_bytes(manifest), device)
        if obstacle is not None:
            raise BackendUnavailable(f"{manifest.folder} cannot be emulated: it {obstacle}")
        with _rewritten(manifest, rounded) as (folder, copy):
            capacity = _capacity(manifest)
            cells = min(max_context or capacity, capacity)
            super().__init__(copy, device, "cpu", threads or 1, cells, optimise=False)
            self._folder = folder
        number = manifest.weights["graph_dtype"] if rounded else "float32"
        self.device = f"emulated in {number} on {self.device}"

    def close(self) -> None:
        """See ``Backend``."""
        super().close()
        self._folder.cleanup()


@contextmanager
def _rewritten(
    manifest: Manifest, rounded: bool
) -> Iterator[tuple[TemporaryDirectory[str], Manifest]]:
    """A new folder with the rewritten graphs, and its manifest; removed when the block fails."""
    temporary = TemporaryDirectory(prefix="medmo-edge-emulated-")
    try:
        folder = Path(temporary.name)
        for role in _ROLES:
            source = manifest.path_of(role)
            emulate_graph(source, folder / source.name, rounded=rounded)
        table = manifest.path_of("embeddings")
        (folder / table.name).symlink_to(table.resolve())
        weights = manifest.weights | {"graph_dtype": "float32"}
        yield temporary, replace(manifest.moved_to(folder), weights=weights)
    except BaseException:
        temporary.cleanup()
        raise


def _needed_bytes(manifest: Manifest) -> int:
    """Weights in float32, twice: the rewritten file in memory, and what the library makes of it."""
    parts = (manifest.weights.get(part, {}) for part in ("language", "vision"))
    return 8 * sum(int(part.get("parameters", 0)) for part in parts)


def _capacity(manifest: Manifest) -> int:
    capacity = manifest.weights.get("build", {}).get("capacity")
    if not isinstance(capacity, int) or capacity < 1:
        raise ArtifactError(
            f"{manifest.folder}: manifest.json does not say the length of the cache: export again"
        )
    return capacity
