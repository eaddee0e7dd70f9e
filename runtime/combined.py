"""Two artifacts of one checkpoint at work together: llama.cpp decodes, an ONNX vision tower sees.

On CPUs the 8-bit ONNX tower needs a fraction of the time of llama.cpp's. The embeddings are of the
same checkpoint, so nothing else changes; but what was certified for one artifact alone does not
cover the pair, and the pair has a name of its own.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.runtime import ort_native as native
from medmo_edge.runtime.backends import Mark
from medmo_edge.runtime.llamacpp import LlamaCpp
from medmo_edge.runtime.ort_vision import Vision
from medmo_edge.runtime.spans import grid_span

NAME = "llamacpp+ort"


class Combined:
    """llama.cpp with another vision tower; see ``Backend`` and ``Lanes`` for the methods."""

    name = NAME

    def __init__(self, decoder: LlamaCpp, tower: Manifest, *, threads: int) -> None:
        """Takes over ``decoder``; ``tower`` is an ONNX artifact of the same checkpoint.

        Errors: ArtifactError when the graph is refused or belongs to another checkpoint.
        """
        if tower.checkpoint.get("sha256") != decoder.manifest.checkpoint.get("sha256"):
            raise ArtifactError(
                f"{tower.folder} is not of the checkpoint of {decoder.manifest.folder}: its vision "
                "tower cannot serve this decoder"
            )
        self._decoder: LlamaCpp = decoder
        self._interrupt = native.Interrupt()  # of the tower
        self._hook: Callable[[], bool] | None = None
        settings = native.Settings(provider=native.CPU, threads=threads)
        self._tower: Vision | None = Vision(tower, settings, self._interrupt)
        self._factor = Preprocessing.from_dict(tower.preprocessing).factor
        self.tower_manifest = tower
        self.device = f"{decoder.device}, vision tower of {tower.target}"
        self.max_cells = decoder.max_cells

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See ``Backend``."""
        return self.encode_aside(resized_HWC, self._hook)

    def encode_aside(
        self, resized_HWC: NDArray[np.uint8], stop: Callable[[], bool] | None
    ) -> NDArray[np.float32]:
        """See ``Lanes``."""
        if self._tower is None:
            return self._decoder.encode_image(resized_HWC)  # says that it is closed
        self._interrupt.hook = stop
        return self._tower.encode(resized_HWC)

    def append_encoded(self, resized_HWC: NDArray[np.uint8], rows_NR: NDArray[np.float32]) -> None:
        """See ``Lanes``."""
        self._decoder.append_encoded(resized_HWC, rows_NR)

    @property
    def lanes(self) -> int:
        """See ``Lanes``."""
        return self._decoder.lanes

    @property
    def rows(self) -> int:
        """See ``Lanes``."""
        return self._decoder.rows

    @rows.setter
    def rows(self, most: int) -> None:
        self._decoder.rows = most

    def select(self, lane: int) -> None:
        """See ``Lanes``."""
        self._decoder.select(lane)

    def fits(self, lanes: int, cells: int) -> bool:
        """See ``Lanes``."""
        return self._decoder.fits(lanes, cells)

    def hold(self, lanes: int) -> None:
        """See ``Lanes``."""
        self._decoder.hold(lanes)

    def decode_lanes(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """See ``Lanes``."""
        return self._decoder.decode_lanes(tokens)

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        """See ``Backend``."""
        height, width = (side // self._factor for side in resized_HWC.shape[:2])
        self._decoder.reserve(grid_span(height, width))  # before the tower works in vain
        self._decoder.append_rows(self.encode_image(resized_HWC), height, width)

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        """See ``Backend``."""
        return self._decoder.decode_tokens(ids)

    def mark(self) -> Mark:
        """See ``Backend``."""
        return self._decoder.mark()

    def rewind(self, mark: Mark) -> None:
        """See ``Backend``."""
        self._decoder.rewind(mark)

    def save(self) -> NDArray[np.uint8]:
        """See ``Backend``."""
        return self._decoder.save()

    def restore(self, state: NDArray[np.uint8], mark: Mark) -> None:
        """See ``Backend``."""
        self._decoder.restore(state, mark)

    def set_interrupt(self, hook: Callable[[], bool] | None) -> None:
        """See ``Backend``."""
        self._hook = hook
        self._decoder.set_interrupt(hook)

    def close(self) -> None:
        """See ``Backend``."""
        self._tower = None
        self._decoder.close()
