"""The TensorRT vision tower: one engine that turns a resized picture into features on the GPU.

One picture per run. The features stay on the GPU, from where the decoder takes them; rows for other
uses are copied here on request. Position tables and rotary angles come from
``medmo_edge.vision_inputs``. Buffers grow with the largest picture seen.

Shape suffixes: H W pixels, C channels, N vision tokens, R values of one row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError, GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing, grid_thw, num_vision_tokens, patchify
from medmo_edge.runtime.graph_inputs import vision_geometry
from medmo_edge.runtime.model_facts import Facts
from medmo_edge.runtime.ort_values import NUMBERS, decode_rows
from medmo_edge.runtime.trt_cuda import Block, Gpu
from medmo_edge.runtime.trt_decoder import Features
from medmo_edge.runtime.trt_fit import Recipe
from medmo_edge.runtime.trt_session import Engine
from medmo_edge.vision_inputs import vision_inputs

_INPUTS = {"pixel_values", "pos_idx", "pos_weight", "cos", "sin"}
_OUTPUTS = ("image_features", "deepstack_features")


class Vision:
    """The vision tower of one artifact on one GPU."""

    def __init__(self, manifest: Manifest, engine: Engine, gpu: Gpu, scratch: Block) -> None:
        """Errors: ArtifactError for an engine of another model."""
        self._preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        self._facts, self._geometry = Facts.of(manifest), vision_geometry(manifest)
        self._recipe = Recipe.of(manifest)
        self._engine, self._gpu = engine, gpu
        if set(engine.inputs) != _INPUTS or not {*_OUTPUTS} <= {*engine.names}:
            raise ArtifactError(
                f"{engine.path} is no vision tower of ours: run `medmo-edge build` again"
            )
        self._number = NUMBERS[engine.number("pixel_values")]
        self._context = engine.open_context(gpu, scratch, 0)
        self._inputs: dict[str, Block] = {}
        self._outputs: dict[str, Block] = {}

    def run(self, resized_HWC: NDArray[np.uint8]) -> Features:
        """Features of a picture; they are there until the next run.

        Errors: GenerationError, also for a picture that the engine was not built for.
        """
        height, width = resized_HWC.shape[:2]
        grid = grid_thw(height, width, self._preprocessing)
        tokens = num_vision_tokens(grid, self._preprocessing)
        patches = patchify(resized_HWC, self._preprocessing)
        self._check_size(len(patches))
        places = vision_inputs(grid, self._geometry)
        arrays: dict[str, NDArray[Any]] = {
            "pixel_values": self._number.encode(patches)[None],
            "pos_idx": places.pos_idx,
            "pos_weight": places.pos_weight,
            "cos": places.cos,
            "sin": places.sin,
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        addresses = self._make_room(arrays, tokens)
        for name, array in arrays.items():
            self._gpu.to_device(self._inputs[name].address, array)
        self._context.launch()
        self._gpu.wait()
        return Features(tokens=tokens, addresses=addresses)

    def rows(self, features: Features) -> NDArray[np.float32]:
        """Rows [N, R]: the main embedding of a token, then one per deepstack level."""
        shape = (len(features.addresses), features.tokens, self._facts.hidden_size)
        stored = np.empty(shape, self._number.storage)
        for part, address in zip(stored, features.addresses, strict=True):
            self._gpu.to_host(part, address)
        self._gpu.wait()
        return np.concatenate([decode_rows(part, self._number.name) for part in stored], axis=1)

    def _check_size(self, patches: int) -> None:
        fewest, _, most = self._recipe.patches
        if not fewest <= patches <= most:
            raise GenerationError(
                f"the picture has {patches} patches, the engine was built for {fewest} to {most}: "
                "use a smaller picture, or export with other pixel limits and build again"
            )

    def _make_room(self, arrays: Mapping[str, NDArray[Any]], tokens: int) -> tuple[int, ...]:
        """Bind buffers that are large enough; the address of each set of rows that will come.

        Before anything is enqueued: a buffer may have to be freed.
        """
        for name, array in arrays.items():
            block = self._room(self._inputs, name, array.nbytes)
            self._context.set_shape(name, array.shape)
            self._context.bind(name, block.address)
        size = tokens * self._facts.hidden_size * int(np.dtype(self._number.storage).itemsize)
        levels = self._facts.deepstack_levels
        for name, nbytes in zip(_OUTPUTS, (size, levels * size), strict=True):
            self._context.bind(name, self._room(self._outputs, name, nbytes).address)
        first, more = (self._outputs[name].address for name in _OUTPUTS)
        return (first, *(more + level * size for level in range(levels)))

    def _room(self, blocks: dict[str, Block], name: str, nbytes: int) -> Block:
        """A buffer of at least ``nbytes``; the one that was too small is freed."""
        block = blocks.get(name)
        if block is None or block.nbytes < nbytes:
            if block is not None:
                del blocks[name]
                self._gpu.free(block)
            block = blocks[name] = self._gpu.allocate(nbytes, "the vision tower")
        return block

    def close(self) -> None:
        """Free the context and the engine; buffers are the GPU's to free."""
        self._context.close()
        self._engine.close()
