"""The TensorRT backend: engines built on this machine, on the first CUDA GPU, without torch.

Embeddings are looked up here, in a mapped file; a picture's features go from the vision engine to
the decoder without leaving the GPU. The KV cache has the length the artifact was exported with, and
stays in place between steps and questions. It does not batch conversations, and it builds engines
only where MEDMO_EDGE_BUILD=1 allows it; otherwise it says how to.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import BackendUnavailable, GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.runtime import trt_fit as fit
from medmo_edge.runtime import trt_library
from medmo_edge.runtime.backends import START, Interrupted, Mark
from medmo_edge.runtime.device import Device, cuda_devices
from medmo_edge.runtime.graph_inputs import Embeddings
from medmo_edge.runtime.model_facts import Facts
from medmo_edge.runtime.spans import Span, end_behind, image_span, text_span
from medmo_edge.runtime.trt_cuda import Gpu, OutOfMemory
from medmo_edge.runtime.trt_decoder import Decoder, Features
from medmo_edge.runtime.trt_engines import Engines, Search, find_engines
from medmo_edge.runtime.trt_make import make_engines
from medmo_edge.runtime.trt_session import Engine
from medmo_edge.runtime.trt_vision import Vision

NAME = "trt"
#: set to 1 where engines that are missing may be built when an artifact is loaded
BUILD_VARIABLE = "MEDMO_EDGE_BUILD"
_NO_ROOM = "use smaller or fewer images, a shorter question, or export with a larger --cache-length"


def unavailable() -> str | None:
    """Why TensorRT cannot be used on this machine, else None."""
    return trt_library.run_obstacle() or (None if cuda_devices() else fit.NO_GPU)


def unsuited(manifest: Manifest, device: Device) -> str | None:
    """Why this artifact cannot run here now, else None."""
    obstacle = fit.device_obstacle(manifest, device)
    if obstacle is not None:
        return obstacle
    search = _search(manifest, device)
    if search.found is None:
        return None if _may_build() else search.obstacle
    return fit.memory_obstacle(manifest, device, search.found.nbytes)


def place(manifest: Manifest, device: Device) -> tuple[str, str]:
    """Always the GPU."""
    missing = _search(manifest, device).found is None
    return "cuda", "its engines are built first, which takes minutes" if missing else ""


def describe() -> dict[str, Any]:
    """Versions of TensorRT and of the CUDA bindings, for doctor."""
    return dict(trt_library.versions())


def _may_build() -> bool:
    return os.environ.get(BUILD_VARIABLE) == "1"


def _search(manifest: Manifest, device: Device) -> Search:
    libraries = [
        each
        for each in trt_library.usable()
        if fit.version_obstacle(manifest, each.name, each.version) is None
    ]
    if not libraries:
        found = trt_library.usable()[:1]
        reason = fit.version_obstacle(manifest, found[0].name, found[0].version) if found else None
        return Search(None, obstacle=reason or trt_library.build_obstacle())
    return find_engines(manifest, device, libraries)


def open(
    manifest: Manifest,
    device: Device,
    *,
    threads: int | None = None,
    max_context: int | None = None,
) -> "Trt":
    """Load the engines of an artifact for this machine.

    ``threads`` changes nothing here; ``max_context``: most tokens of one conversation, default and
    at most the length of the KV cache. Errors: BackendUnavailable, also when the GPU has too little
    memory, and ArtifactError for damaged engines.
    """
    search = _search(manifest, device)
    if search.found is None and _may_build():
        make_engines(manifest, device)
        search = _search(manifest, device)
    if search.found is None or search.library is None:
        raise BackendUnavailable(search.obstacle or "no engine fits this machine")
    return Trt(manifest, device, search.found, search.library, max_context)


class Trt:
    """One loaded artifact; see ``Backend`` for the methods."""

    name = NAME

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        engines: Engines,
        library: trt_library.Library,
        max_context: int | None,
    ) -> None:
        self._facts = Facts.of(manifest)
        self._factor = Preprocessing.from_dict(manifest.preprocessing).factor
        self._end = START
        self._embeddings: Embeddings | None = Embeddings.of(manifest, self._facts)
        capacity = fit.Recipe.of(manifest).capacity
        self.max_cells = min(capacity, max_context or capacity)
        self.device = f"cuda ({device.cuda[0].name}, {library.name} {library.short_version})"
        self._hook: Callable[[], bool] | None = None
        self._gpu: Gpu | None = Gpu()
        try:
            self._decoder, self._vision = _load(manifest, engines, library, self._gpu)
        except BaseException:
            self._gpu.close()
            raise

    def set_interrupt(self, hook: Callable[[], bool] | None) -> None:
        """See ``Backend``; the hook is asked before every launch."""
        self._hook = hook
        self._decoder.hook = hook

    def mark(self) -> Mark:
        """See ``Backend``."""
        return self._end

    def rewind(self, mark: Mark) -> None:
        """See ``Backend``."""
        self._require_open()
        self._end = mark  # what lies behind it is overwritten by what comes next

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        """See ``Backend``."""
        span = text_span(len(ids))
        self._require_open()
        assert self._embeddings is not None
        return self._append(self._embeddings.rows(ids), span)

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        """See ``Backend``."""
        span = image_span(resized_HWC, self._factor)
        self._end_behind(span)  # before the tower works in vain
        self._append(self._see(resized_HWC), span)

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See ``Backend``."""
        return self._vision.rows(self._see(resized_HWC))

    def _see(self, resized_HWC: NDArray[np.uint8]) -> Features:
        self._require_open()
        if self._hook is not None and self._hook():
            raise Interrupted
        return self._vision.run(resized_HWC)

    def _append(self, source: NDArray[np.float32] | Features, span: Span) -> NDArray[np.float32]:
        """Evaluate rows behind the present end; the end moves once all of them are done."""
        end, positions = self._end_behind(span), span.offsets + self._end.position
        logits = self._decoder.evaluate(source, positions, self._end.cells)
        self._end = end
        return logits

    def _end_behind(self, span: Span) -> Mark:
        """Errors: GenerationError when there is no room."""
        return end_behind(
            self._end,
            span,
            max_cells=self.max_cells,
            max_positions=self._facts.max_positions,
            advice=_NO_ROOM,
        )

    def save(self) -> NDArray[np.uint8]:
        """See ``Backend``."""
        self._require_open()
        return self._decoder.save(self._end.cells)

    def restore(self, state: NDArray[np.uint8], mark: Mark) -> None:
        """See ``Backend``."""
        self._require_open()
        self._decoder.restore(state, mark.cells)
        self._end = mark

    def close(self) -> None:
        """See ``Backend``."""
        if self._gpu is None:
            return
        self._gpu.wait_quietly()
        self._decoder.close()
        self._vision.close()
        self._gpu.close()
        self._gpu = self._embeddings = None

    def _require_open(self) -> None:
        if self._gpu is None:
            raise GenerationError("the backend is closed: load the artifact again")


def _load(
    manifest: Manifest, engines: Engines, library: trt_library.Library, gpu: Gpu
) -> tuple[Decoder, Vision]:
    """Both engines with one memory for their activations: they never run at the same time."""
    _require_memory(manifest, engines, gpu)
    with ExitStack() as undo:
        opened = []
        for name in ("vision", "decoder"):
            opened.append(Engine(library, engines.path_of(name)))
            undo.callback(opened[-1].close)
        scratch_bytes = max(engine.scratch_bytes for engine in opened)
        try:
            scratch = gpu.allocate(scratch_bytes, "TensorRT's activations")
            vision = Vision(manifest, opened[0], gpu, scratch)
            decoder = Decoder(manifest, opened[1], gpu, scratch)
        except OutOfMemory as error:
            advice = fit.smaller(manifest, gpu.free_bytes())
            raise BackendUnavailable(f"{error}; or {advice}") from error
        undo.pop_all()
    return decoder, vision


def _require_memory(manifest: Manifest, engines: Engines, gpu: Gpu) -> None:
    """Errors: BackendUnavailable when weights and cache do not fit what is free now."""
    needed, free = engines.nbytes + fit.cache_bytes(manifest), gpu.free_bytes()
    if free < needed:
        raise BackendUnavailable(
            f"engines and KV cache need {needed / 1e9:.2f} GB, the GPU has {free / 1e9:.2f} GB "
            f"free: close other programs that use it, or {fit.smaller(manifest, free)}"
        )
