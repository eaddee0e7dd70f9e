"""The ONNX Runtime backend: ONNX artifacts on the CPU or a CUDA GPU.

Embeddings are looked up here, in a mapped file; pictures go through the vision graph once and then
take the places of their tokens. The KV cache stays in place between steps and questions. It does
not batch conversations, and it does not use ONNX Runtime's TensorRT provider.
"""

from collections.abc import Callable
from logging import getLogger
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.runtime import ort_fit as fit
from medmo_edge.runtime import ort_native as native
from medmo_edge.runtime.backends import START, Mark
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.graph_inputs import Embeddings
from medmo_edge.runtime.model_facts import FIRST_CELLS, Facts
from medmo_edge.runtime.ort_decoder import CHUNK, Decoder
from medmo_edge.runtime.ort_vision import Vision
from medmo_edge.runtime.spans import Span, end_behind, image_span, text_span

NAME = "ort"


def unavailable() -> str | None:
    """Why ONNX Runtime cannot be used on this machine, else None."""
    return native.obstacle()


def unsuited(manifest: Manifest, device: Device) -> str | None:
    """Why this artifact does not fit this machine, else None."""
    found = fit.obstacles(manifest, device, native.has_cuda())
    return found.cpu if found.place is None else None


def place(manifest: Manifest, device: Device) -> tuple[str, str]:
    """The GPU where it can be used, else the CPU and why."""
    found = fit.obstacles(manifest, device, native.has_cuda())
    if found.cuda is None:
        return "cuda", ""
    return "cpu", f"not on the GPU: {found.cuda}" if device.cuda else ""


def describe() -> dict[str, Any]:
    """Version of the library in both flavours, for doctor."""
    return dict(native.versions())


def open(
    manifest: Manifest,
    device: Device,
    *,
    threads: int | None = None,
    max_context: int | None = None,
) -> "Ort":
    """Load an artifact.

    ``threads``: default the physical cores, or one for a small model. ``max_context``: most tokens
    of one conversation, default what memory allows up to 32768. Errors: ArtifactError when
    ONNX Runtime refuses a file, BackendUnavailable when the library is missing.
    """
    native.load_library()
    place = fit.obstacles(manifest, device, native.has_cuda()).place or "cpu"
    return Ort(
        manifest, device, place, threads or fit.default_threads(manifest, device), max_context
    )


class Ort:
    """One loaded ONNX artifact; see ``Backend`` for the methods."""

    name = NAME

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        place: fit.Place,
        threads: int,
        max_context: int | None,
        *,
        optimise: bool = True,
    ) -> None:
        self._interrupt = native.Interrupt()
        self._facts = Facts.of(manifest)
        self._factor = Preprocessing.from_dict(manifest.preprocessing).factor
        self._end = START
        self._embeddings: Embeddings | None = Embeddings.of(manifest, self._facts)
        provider = native.CUDA if place == "cuda" else native.CPU
        settings = native.Settings(provider=provider, threads=threads, optimise=optimise)
        self._decoder: Decoder | None = Decoder(
            manifest,
            settings,
            self._interrupt,
            cells=min(FIRST_CELLS, max_context or FIRST_CELLS),
        )
        # By where it really runs: a GPU's memory says nothing about the computer's.
        self.max_cells = fit.max_cells(manifest, device, self._decoder.place, max_context)
        self._vision: Vision | None = Vision(manifest, settings, self._interrupt)
        self.device = _describe(device, place, self._decoder.place, threads)

    def set_interrupt(self, hook: Callable[[], bool] | None) -> None:
        """See ``Backend``."""
        self._interrupt.hook = hook

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
        self._reserve(span)  # before the tower works in vain
        self._append(self.encode_image(resized_HWC), span)

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See ``Backend``."""
        self._require_open()
        assert self._vision is not None
        return self._vision.encode(resized_HWC)

    def _append(self, rows_SR: NDArray[np.float32], span: Span) -> NDArray[np.float32]:
        """Evaluate rows behind the present end; the end moves once all of them are done."""
        end, used = self._reserve(span), self._end.cells
        decoder, positions = self._require_open(), span.offsets + self._end.position
        for first in range(0, span.cells, CHUNK):
            part = slice(first, first + CHUNK)
            logits = decoder.evaluate(rows_SR[part], positions[:, part], used + first)
        self._end = end
        return logits

    def _reserve(self, span: Span) -> Mark:
        """Make room, by a larger cache if needed. Errors: GenerationError when there is none."""
        end = end_behind(
            self._end, span, max_cells=self.max_cells, max_positions=self._facts.max_positions
        )
        self._grow(end.cells, self._end.cells)
        return end

    def _grow(self, needed: int, used: int) -> None:
        decoder = self._require_open()
        cells = decoder.cells
        while cells < needed:
            cells *= 2
        if cells > decoder.cells:
            decoder.grow(min(cells, self.max_cells), used)

    def save(self) -> NDArray[np.uint8]:
        """See ``Backend``."""
        return self._require_open().save(self._end.cells)

    def restore(self, state: NDArray[np.uint8], mark: Mark) -> None:
        """See ``Backend``."""
        self._grow(mark.cells, 0)
        self._require_open().restore(state, mark.cells)
        self._end = mark

    def close(self) -> None:
        """See ``Backend``."""
        self._decoder = self._vision = self._embeddings = None

    def _require_open(self) -> Decoder:
        if self._decoder is None:
            raise GenerationError("the backend is closed: load the artifact again")
        return self._decoder


def _describe(device: Device, wanted: fit.Place, got: fit.Place, threads: int) -> str:
    """What runs the artifact, by what the session really got."""
    if got == "cuda":
        return f"cuda ({device.cuda[0].name})"
    if wanted == "cuda":
        getLogger("medmo_edge").warning(
            "ONNX Runtime could not start CUDA and uses the CPU: see medmo-edge doctor"
        )
    return f"cpu ({device.cpu}, {threads} thread{'s' if threads > 1 else ''})"
