"""The ONNX decoder: one session, its KV cache, and bound input buffers for each call length.

It evaluates rows of embeddings at given rope positions behind the cells used so far. Tokens,
pictures and rope positions of a conversation are the caller's business. Input and output names are
those of ``medmo_edge.export.onnx_decoder``, form ``gqa``.

Shape suffixes: S rows of one call, R values of a row of embeddings, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError, GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime import ort_native as native
from medmo_edge.runtime.graph_inputs import Rope
from medmo_edge.runtime.model_facts import Facts
from medmo_edge.runtime.ort_cache import KvCache
from medmo_edge.runtime.ort_fit import Place
from medmo_edge.runtime.ort_values import Number, bind, number_of

CHUNK = 512  # rows evaluated at once; more costs memory without being faster on CPUs


class Decoder:
    """The language model of one artifact; ``used`` cells of the cache hold its past."""

    def __init__(
        self,
        manifest: Manifest,
        settings: native.Settings,
        interrupt: native.Interrupt,
        *,
        cells: int,
    ) -> None:
        """Errors: ArtifactError when the graph is refused or is not what the manifest says."""
        self._facts, self._rope = Facts.of(manifest), Rope.of(manifest)
        self._interrupt = interrupt
        path = manifest.path_of("decoder")
        self._session = native.open_session(path, settings, interrupt)
        #: where it really runs: a CUDA provider that cannot start leaves the session to the CPU
        self.place: Place = "cuda" if self._session.get_providers()[0] == native.CUDA else "cpu"
        self._number = number_of(self._session, "inputs_embeds")
        self._levels = [f"deepstack_{level}" for level in range(self._facts.deepstack_levels)]
        self._pairs = [
            (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}")
            for layer in range(self._facts.num_layers)
            for part in ("key", "value")
        ]
        self._check_names(path)
        self._cache = self._open_cache(cells)
        self._calls: dict[int, _Call] = {}

    @property
    def cells(self) -> int:
        """Tokens that the cache can hold now."""
        return self._cache.cells

    def _check_names(self, path: Path) -> None:
        expected = {
            "inputs_embeds",
            "rope_cos",
            "rope_sin",
            "seqlens_k",
            "total_sequence_length",
            "last_index",
            *self._levels,
            *(past for past, _ in self._pairs),
        }
        found = {each.name for each in self._session.get_inputs()}
        if found != expected:
            odd = sorted(found ^ expected)
            raise ArtifactError(
                f"{path} does not have the inputs that its manifest implies (first difference: "
                f"{odd[0]}): export again"
            )
        vocabulary = self._session.get_outputs()[0].shape[-1]
        if vocabulary != self._facts.vocab_size:
            raise ArtifactError(
                f"{path} has {vocabulary} logits, the manifest says {self._facts.vocab_size}: "
                "export again"
            )

    def _open_cache(self, cells: int) -> KvCache:
        shape = (self._facts.num_kv_heads, self._facts.head_dim)
        try:
            return KvCache(self._pairs, shape, self._number, self.place, cells)
        except Exception as error:  # MemoryError, or the library's own for a GPU
            raise GenerationError(
                f"memory does not suffice for a context of {cells} tokens: use smaller or fewer "
                f"images ({native.one_line(error) or 'out of memory'})"
            ) from error

    def grow(self, cells: int, used: int) -> None:
        """A cache for ``cells`` tokens that holds the first ``used`` of the present one.

        Errors: GenerationError; the cache stays as it was.
        """
        state = self._cache.save(used)
        larger = self._open_cache(cells)
        larger.restore(state, used)
        self._cache = larger
        self._calls.clear()

    def evaluate(
        self, rows_SR: NDArray[np.float32], positions: NDArray[np.int64], used: int
    ) -> NDArray[np.float32]:
        """Logits [V] after ``rows_SR``, which follow ``used`` cells; at most CHUNK rows.

        A row holds an embedding, and for vision tokens one per deepstack level after it;
        ``positions`` [3, S]. Errors: GenerationError, Interrupted; nothing before is lost.
        """
        length = len(rows_SR)
        call = self._calls.get(length) or self._open_call(length)
        call.fill(rows_SR, self._rope.angles(positions), used)
        long = length > 1
        native.run(self._session, call.binding(), self._interrupt, long=long)
        return call.logits()

    def _open_call(self, length: int) -> "_Call":
        call = _Call(self._session, self._facts, self._number, self.place, self._levels, length)
        self._cache.bind(call.bound)
        if length in (1, CHUNK):  # the lengths that come again and again
            self._calls[length] = call
        return call

    def save(self, used: int) -> NDArray[np.uint8]:
        """The first ``used`` cells as bytes."""
        return self._cache.save(used)

    def restore(self, state: NDArray[np.uint8], used: int) -> None:
        """Bytes from ``save`` back into the cache, which must be large enough."""
        self._cache.restore(state, used)


class _Call:
    """Buffers of all inputs but the cache for calls with ``length`` rows, bound once."""

    def __init__(
        self,
        session: Any,
        facts: Facts,
        number: Number,
        place: Place,
        levels: Sequence[str],
        length: int,
    ) -> None:
        self._number, self._place, self._width = number, place, facts.hidden_size
        floats = {
            "inputs_embeds": (1, length, facts.hidden_size),
            "rope_cos": (1, length, facts.head_dim // 2),
            "rope_sin": (1, length, facts.head_dim // 2),
            **dict.fromkeys(levels, (1, length, facts.hidden_size)),
        }
        self._floats = {name: np.zeros(shape, number.storage) for name, shape in floats.items()}
        self._levels = tuple(levels)
        self._silent = True  # the deepstack inputs are all zero
        self._integers: dict[str, NDArray[Any]] = {
            "seqlens_k": np.zeros(1, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "last_index": np.full((1, 1), length - 1, np.int64),
        }
        self._logits = np.empty((1, 1, facts.vocab_size), np.float32)
        self.bound = session.io_binding()
        pointer = self._logits.ctypes.data
        self.bound.bind_output("logits", "cpu", 0, np.float32, list(self._logits.shape), pointer)
        self._bind_inputs()

    def _bind_inputs(self) -> None:
        for name, array in self._floats.items():
            bind(self.bound, name, array, self._number.element_type)
        for name, array in self._integers.items():
            bind(self.bound, name, array, array.dtype.type)

    def fill(
        self,
        rows_SR: NDArray[np.float32],
        angles: tuple[NDArray[np.float32], NDArray[np.float32]],
        used: int,
    ) -> None:
        """Put one call's values into the buffers."""
        width, encode = self._width, self._number.encode
        self._floats["inputs_embeds"][0] = encode(rows_SR[:, :width])
        self._floats["rope_cos"][0], self._floats["rope_sin"][0] = map(encode, angles)
        has_features = rows_SR.shape[1] > width
        if has_features or not self._silent:
            for level, name in enumerate(self._levels, start=1):
                part = rows_SR[:, level * width : (level + 1) * width]
                self._floats[name][0] = encode(part) if has_features else 0
            self._silent = not has_features
        total = used + len(rows_SR)
        self._integers["seqlens_k"][0] = total - 1
        self._integers["total_sequence_length"][()] = total

    def binding(self) -> Any:
        """The binding with the present values: a GPU got copies of the values of last time."""
        if self._place == "cuda":
            self._bind_inputs()
        return self.bound

    def logits(self) -> NDArray[np.float32]:
        """A copy [V] of what the last run wrote."""
        copy: NDArray[np.float32] = self._logits[0, 0].copy()
        return copy
