"""Faults put into ONNX artifacts and the ONNX Runtime backend; see ``sabotage``.

Weights are changed in the data files, where the graphs say they lie. Nothing here repairs anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint

SCALE = 1.05


def _weights(path: Path) -> dict[str, NDArray[Any]]:
    """Every external initializer of a graph, mapped so that it can be changed; bf16 as uint16."""
    import onnx

    sizes = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.UINT8: "uint8"}
    found: dict[str, NDArray[Any]] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            dtype = sizes.get(tensor.data_type, "float16")
            found[tensor.name] = np.memmap(
                path.parent / where["location"],
                dtype=dtype,
                mode="r+",
                offset=int(where.get("offset", 0)),
                shape=tuple(tensor.dims),
            )
    return found


def drop_deepstack(folder: Path) -> None:
    """Zeros for the last matrix and bias of every deepstack merger."""
    for name, values in _weights(folder / "vision.onnx").items():
        if "deepstack_merger_list." in name and ".linear_fc2." in name:
            values[...] = 0


@contextmanager
def deepstack_not_injected(_: Checkpoint) -> Iterator[None]:
    """Image rows reach the decoder with their main features alone."""
    from medmo_edge.runtime.ort import Ort

    real = Ort._append

    def append(self: Any, rows: NDArray[np.float32], *rest: Any) -> NDArray[np.float32]:
        main = self._facts.hidden_size
        return real(self, np.concatenate([rows[:, :main], 0 * rows[:, main:]], axis=1), *rest)

    with patch.object(Ort, "_append", append):
        yield


@contextmanager
def one_dimensional_rope(_: Checkpoint) -> Iterator[None]:
    """All frequencies follow the time axis, on which an image's tokens are all at one place."""
    from medmo_edge.runtime import graph_inputs
    from medmo_edge.vision_inputs import rope_cos_sin as real

    def flat(positions: NDArray[np.int64], **settings: Any) -> Any:
        return real(np.repeat(positions[:1], 3, axis=0), **settings)

    with patch.object(graph_inputs, "rope_cos_sin", flat):
        yield


@contextmanager
def loose_corners(_: Checkpoint) -> Iterator[None]:
    """Positions interpolated between pixel centres instead of corner on corner."""
    from medmo_edge import vision_inputs

    def taps(size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
        lower = np.floor(at)
        upper = np.minimum(lower + 1, side - 1)
        weights = np.stack([1 - (at - lower), at - lower]).astype(np.float32)
        return np.stack([lower, upper]).astype(np.int64), weights

    with patch.object(vision_inputs, "_axis_taps", taps):
        yield


def _swap(path: Path, first: str, second: str) -> None:
    weights = _weights(path)
    for name, values in weights.items():
        if name.startswith(first):
            other = weights[name.replace(first, second)]  # joined tensors name a layer repeatedly
            kept = values.copy()
            values[...] = other
            other[...] = kept


def swap_layers(folder: Path) -> None:
    """The first two layers of the language model."""
    prefix = "model.language_model.layers."
    _swap(folder / "decoder.onnx", f"{prefix}0.", f"{prefix}1.")


def swap_vision_layers(folder: Path) -> None:
    """The first two layers of the vision tower."""
    prefix = "model.visual.blocks."
    _swap(folder / "vision.onnx", f"{prefix}0.", f"{prefix}1.")


def scale_one_tensor(folder: Path) -> None:
    """The value projection of the last layer, its scales where it is quantised.

    Where q, k and v are one tensor, all of it.
    """
    weights = _weights(folder / "decoder.onnx")
    names = [name for name in weights if ".v_proj.weight" in name]
    last = [name for name in names if name.rpartition(".")[2] in ("weight", "scales")][-1]
    weights[last][...] = weights[last] * SCALE
