"""The ONNX vision tower: one session that turns a resized picture into rows of embeddings.

One picture per run, as transformers attends within one image only. Position tables and rotary
angles come from ``medmo_edge.vision_inputs``.

Shape suffixes: H W pixels, C channels, N vision tokens, R values of one row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing, grid_thw, num_vision_tokens, patchify
from medmo_edge.runtime import ort_native as native
from medmo_edge.runtime.graph_inputs import vision_geometry
from medmo_edge.runtime.model_facts import Facts
from medmo_edge.runtime.ort_values import bind, decode_rows, number_of
from medmo_edge.vision_inputs import vision_inputs

_INPUTS = {"pixel_values", "pos_idx", "pos_weight", "cos", "sin"}


class Vision:
    """The vision tower of one artifact."""

    def __init__(
        self, manifest: Manifest, settings: native.Settings, interrupt: native.Interrupt
    ) -> None:
        """Errors: ArtifactError when the graph is refused or the manifest lacks its sizes."""
        self._preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        self._facts, self._geometry = Facts.of(manifest), vision_geometry(manifest)
        self._interrupt = interrupt
        path = manifest.path_of("vision")
        self._session = native.open_session(path, settings, interrupt)
        self._number = number_of(self._session, "pixel_values")
        found = {each.name for each in self._session.get_inputs()}
        if found != _INPUTS:
            odd = sorted(found ^ _INPUTS)[0]
            raise ArtifactError(f"{path} is no vision tower of ours (see {odd}): export again")

    def encode(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows [N, R]: the main embedding of a token, then one per deepstack level.

        Errors: GenerationError, Interrupted.
        """
        height, width = resized_HWC.shape[:2]
        grid = grid_thw(height, width, self._preprocessing)
        tokens = num_vision_tokens(grid, self._preprocessing)
        levels, size = self._facts.deepstack_levels, self._facts.hidden_size
        features = np.empty((1, tokens, size), self._number.storage)
        deepstack = np.empty((levels, 1, tokens, size), self._number.storage)
        binding, kept = self._bind(patchify(resized_HWC, self._preprocessing), grid)
        for name, array in (("image_features", features), ("deepstack_features", deepstack)):
            shape, pointer = list(array.shape), array.ctypes.data
            binding.bind_output(name, "cpu", 0, self._number.element_type, shape, pointer)
        native.run(self._session, binding, self._interrupt, long=True)
        del kept
        parts = [features[0], *deepstack[:, 0]]
        return np.concatenate([decode_rows(part, self._number.name) for part in parts], axis=1)

    def _bind(
        self, patches: NDArray[np.float32], grid: tuple[int, int, int]
    ) -> tuple[Any, list[NDArray[Any]]]:
        """The binding of all inputs, and the arrays that must outlive the run."""
        places = vision_inputs(grid, self._geometry)
        inputs: dict[str, tuple[NDArray[Any], Any]] = {
            "pixel_values": (self._number.encode(patches)[None], self._number.element_type),
            "pos_idx": (places.pos_idx, np.int64),
            "pos_weight": (places.pos_weight, np.float32),
            "cos": (places.cos, np.float32),
            "sin": (places.sin, np.float32),
        }
        binding = self._session.io_binding()
        kept = []
        for name, (array, element_type) in inputs.items():
            array = np.ascontiguousarray(array)
            kept.append(array)
            bind(binding, name, array, element_type)
        return binding, kept
