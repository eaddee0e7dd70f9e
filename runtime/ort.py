"""The ONNX Runtime backend: ONNX artifacts on the CPU or a CUDA GPU.

Embeddings are looked up here, in a mapped file; pictures go through the vision graph once and then
take the places of their tokens. The KV cache stays in place between steps and questions. It does
not batch conversations, and it does not use ONNX Runtime's TensorRT provider.

Cells and positions are counted apart: an image of n tokens takes n cells of the KV cache but
advances the position only by the longer side of its token grid.
"""

from collections.abc import Callable
from logging import getLogger
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing, mrope_positions
from medmo_edge.runtime import ort_fit as fit
from medmo_edge.runtime import ort_native as native
from medmo_edge.runtime.backends import START, Mark
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.graph_inputs import open_table
from medmo_edge.runtime.model_facts import FIRST_CELLS, Facts
from medmo_edge.runtime.ort_decoder import CHUNK, Decoder
from medmo_edge.runtime.ort_values import decode_rows
from medmo_edge.runtime.ort_vision import Vision

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
        self._table: NDArray[Any] | None = open_table(manifest, self._facts)
        self._table_dtype = str(manifest.weights.get("embeddings_dtype"))
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
        if not ids:
            raise ValueError("decode_tokens needs at least one token")
        rows = decode_rows(self._embeddings()[ids], self._table_dtype)
        positions = np.tile(np.arange(len(ids), dtype=np.int64), (3, 1)) + self._end.position
        return self._append(rows, positions, len(ids))

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        """See ``Backend``."""
        height, width = (side // self._factor for side in resized_HWC.shape[:2])
        self._reserve(height * width, max(height, width))
        rows = self.encode_image(resized_HWC)
        positions, _ = mrope_positions(
            [0] * len(rows), [(1, height, width)], image_token_id=0, merge_size=1
        )
        self._append(rows, positions + self._end.position, max(height, width))

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See ``Backend``."""
        self._require_open()
        assert self._vision is not None
        return self._vision.encode(resized_HWC)

    def _append(
        self, rows_SR: NDArray[np.float32], positions: NDArray[np.int64], advance: int
    ) -> NDArray[np.float32]:
        """Evaluate rows behind the present end; the end moves once all of them are done."""
        self._reserve(len(rows_SR), advance)
        decoder, used = self._require_open(), self._end.cells
        for first in range(0, len(rows_SR), CHUNK):
            part = slice(first, first + CHUNK)
            logits = decoder.evaluate(rows_SR[part], positions[:, part], used + first)
        self._end = Mark(used + len(rows_SR), self._end.position + advance)
        return logits

    def _reserve(self, cells: int, positions: int) -> None:
        """Make room, by a larger cache if needed. Errors: GenerationError when there is none."""
        needed = self._end.cells + cells
        if needed > self.max_cells:
            raise GenerationError(
                f"{needed} tokens do not fit the context of {self.max_cells}: use smaller or "
                "fewer images, or a shorter question"
            )
        if self._end.position + positions > self._facts.max_positions:
            raise GenerationError(
                f"the conversation is longer than the model's {self._facts.max_positions} positions"
            )
        self._grow(needed, self._end.cells)

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
        self._decoder = self._vision = self._table = None

    def _require_open(self) -> Decoder:
        if self._decoder is None:
            raise GenerationError("the backend is closed: load the artifact again")
        return self._decoder

    def _embeddings(self) -> NDArray[Any]:
        self._require_open()
        assert self._table is not None
        return self._table


def _describe(device: Device, wanted: fit.Place, got: fit.Place, threads: int) -> str:
    """What runs the artifact, by what the session really got."""
    if got == "cuda":
        return f"cuda ({device.cuda[0].name})"
    if wanted == "cuda":
        getLogger("medmo_edge").warning(
            "ONNX Runtime could not start CUDA and uses the CPU: see medmo-edge doctor"
        )
    return f"cpu ({device.cpu}, {threads} thread{'s' if threads > 1 else ''})"
