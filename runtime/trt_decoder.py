"""The TensorRT decoder: prefill in chunks, decode in a captured CUDA graph, one KV cache.

Two contexts of one engine, one per profile, read and write the same cache. Input and output names
are those of ``medmo_edge.export.onnx_decoder``, form ``scatter``. Tokens, pictures and rope
positions of a conversation are the caller's business.

A decode step is captured once its addresses have been seen twice: the first launch lets TensorRT
finish what it puts off. New addresses, as those of two caches that change places, are captured
anew. Where capturing fails, steps are launched one by one.

Shape suffixes: S rows of one call, R values of a row of embeddings, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError, GenerationError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.backends import Interrupted
from medmo_edge.runtime.graph_inputs import Rope
from medmo_edge.runtime.model_facts import Facts
from medmo_edge.runtime.ort_values import NUMBERS, Number
from medmo_edge.runtime.trt_build import DECODE, PREFILL
from medmo_edge.runtime.trt_cache import CacheShape, KvCache
from medmo_edge.runtime.trt_cuda import Block, Gpu, aligned
from medmo_edge.runtime.trt_fit import Recipe
from medmo_edge.runtime.trt_session import STORAGE, Context, Engine

Hook = Callable[[], bool]
Angles = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Vision embeddings of one picture on the GPU: the address of each set of ``tokens`` rows.

    The first set are the embeddings, then one per deepstack level.
    """

    tokens: int
    addresses: tuple[int, ...]


class Staging:
    """Inputs of one context: pinned bytes here, and their place on the GPU."""

    def __init__(self, gpu: Gpu, fields: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        """``fields``: name -> largest shape and numpy type. Errors: OutOfMemory."""
        sizes = {
            name: int(np.prod(shape)) * np.dtype(kind).itemsize
            for name, (shape, kind) in fields.items()
        }
        total = sum(map(aligned, sizes.values()))
        self._gpu = gpu
        self._pinned = gpu.pin(total)
        self.block: Block = gpu.allocate(total, "the inputs of the decoder")
        self.arrays: dict[str, NDArray[Any]] = {}
        self.addresses: dict[str, int] = {}
        start = 0
        for name, (shape, kind) in fields.items():
            bytes_here = self._pinned[start : start + sizes[name]]
            self.arrays[name] = bytes_here.view(kind).reshape(shape)
            self.addresses[name] = self.block.address + start
            start += aligned(sizes[name])
        self._pinned[:] = 0

    def send(self, name: str, rows: int) -> None:
        """Copy the first rows of one field."""
        self._gpu.to_device(self.addresses[name], self.arrays[name][:rows])

    def send_all(self) -> None:
        """Copy everything at once."""
        self._gpu.to_device(self.block.address, self._pinned)


class Decoder:
    """The language model of one artifact on one GPU."""

    def __init__(
        self, manifest: Manifest, engine: Engine, gpu: Gpu, scratch: Block, *, graphs: bool = True
    ) -> None:
        """Errors: ArtifactError for an engine of another model, OutOfMemory."""
        self._facts, self._rope, self._recipe = (
            Facts.of(manifest),
            Rope.of(manifest),
            Recipe.of(manifest),
        )
        self._engine, self._gpu = engine, gpu
        self._levels = [f"deepstack_{level}" for level in range(self._facts.deepstack_levels)]
        parts = [f"{part}_{layer}" for layer in range(self._facts.num_layers) for part in "kv"]
        self._pairs = [(f"past_{part}", f"present_{part}") for part in parts]
        self._check_engine()
        self._number: Number = NUMBERS[engine.number("inputs_embeds")]
        self.hook: Hook | None = None
        self._cache = self._open_cache()
        self._prefill = self._open_prefill()
        self._decode = self._open_decode()
        self._zeros = gpu.allocate(self._row_bytes * self.chunk, "the inputs of the decoder")
        gpu.clear(self._zeros)
        self._logits_here = gpu.pin(4 * self._facts.vocab_size).view(np.float32)
        self._logits = gpu.allocate(self._logits_here.nbytes, "the logits")
        self._contexts = [
            engine.open_context(gpu, scratch, profile) for profile in (PREFILL, DECODE)
        ]
        self._bind_fixed()
        self._steps = _Steps(gpu, self._contexts[DECODE], self._enqueue_decode, enabled=graphs)
        gpu.wait()

    @property
    def chunk(self) -> int:
        """Most rows of one call."""
        return self._recipe.chunk

    @property
    def _row_bytes(self) -> int:
        return self._facts.hidden_size * int(np.dtype(self._number.storage).itemsize)

    def _check_engine(self) -> None:
        expected = {"inputs_embeds", "rope_cos", "rope_sin", "write_indices", "last_index"}
        expected |= {*self._levels, *(past for past, _ in self._pairs)}
        odd = sorted(expected ^ set(self._engine.inputs))
        if odd:
            self._refuse(f"does not have the inputs that its manifest implies (see {odd[0]})")
        if self._engine.num_profiles != 2:
            self._refuse(f"has {self._engine.num_profiles} profiles, not prefill and decode")
        facts, recipe = self._facts, self._recipe
        cache = (1, facts.num_kv_heads, recipe.capacity, facts.head_dim)
        found = self._engine.shape("past_k_0")
        if found[1:] != cache[1:] or found[0] not in (1, -1):
            self._refuse(f"has a cache of shape {list(found)}, the manifest says {list(cache)}")
        most = self._engine.profile("inputs_embeds", PREFILL)[2]
        if most != (1, recipe.chunk, facts.hidden_size):
            self._refuse(f"takes prompts of shape {list(most)}, not {recipe.chunk} tokens at once")
        if self._engine.shape("logits")[-1] != facts.vocab_size:
            self._refuse(f"does not have the {facts.vocab_size} logits that the manifest says")

    def _refuse(self, what: str) -> None:
        raise ArtifactError(f"{self._engine.path} {what}: run `medmo-edge build` again")

    def _open_cache(self) -> KvCache:
        shape = CacheShape(
            heads=self._facts.num_kv_heads,
            cells=self._recipe.capacity,
            width=self._facts.head_dim,
            storage=self._number.storage,
        )
        aliases = [self._engine.aliased_input(present) == past for past, present in self._pairs]
        if any(aliases) and not all(aliases):
            self._refuse("writes only some of its caches in place")
        return KvCache(self._gpu, self._pairs, shape, in_place=all(aliases))

    def _rows_of(self, rows: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        half, kind = self._facts.head_dim // 2, self._number.storage
        return {
            "write_indices": ((1,), STORAGE[self._engine.dtype("write_indices")]),
            "rope_cos": ((rows, half), kind),
            "rope_sin": ((rows, half), kind),
            "inputs_embeds": ((rows, self._facts.hidden_size), kind),
        }

    def _open_prefill(self) -> Staging:
        level = ((self.chunk, self._facts.hidden_size), self._number.storage)
        last = {"last_index": ((1, 1), STORAGE[self._engine.dtype("last_index")])}
        fields = last | self._rows_of(self.chunk) | dict.fromkeys(self._levels, level)
        return Staging(self._gpu, fields)

    def _open_decode(self) -> Staging:
        return Staging(self._gpu, self._rows_of(1))

    def _bind_fixed(self) -> None:
        """Everything whose address never changes, and the shapes of the decode context."""
        for context, staging in zip(self._contexts, (self._prefill, self._decode), strict=True):
            for name, address in staging.addresses.items():
                if name not in self._levels:
                    context.bind(name, address)
            context.bind("logits", self._logits.address)
            context.set_shape("write_indices", (1,))
            context.set_shape("last_index", (1, 1))
            for past, _ in self._pairs:
                context.set_shape(past, self._cache.shape)
        decode = self._contexts[DECODE]
        for name in ("last_index", *self._levels):
            decode.bind(name, self._zeros.address)
        self._set_rows(decode, 1)

    def _set_rows(self, context: Context, rows: int) -> None:
        for name in ("inputs_embeds", *self._levels):
            context.set_shape(name, (1, rows, self._facts.hidden_size))
        for name in ("rope_cos", "rope_sin"):
            context.set_shape(name, (1, rows, self._facts.head_dim // 2))

    def evaluate(
        self,
        source: NDArray[np.float32] | Features,
        positions: NDArray[np.int64],
        used: int,
    ) -> NDArray[np.float32]:
        """Logits [V] after the rows of ``source``, which follow ``used`` cells.

        ``source``: embeddings [S, hidden] or a picture's features; ``positions`` [3, S]. Errors:
        GenerationError, Interrupted; nothing before is lost.
        """
        total = positions.shape[1]
        for first in range(0, total, self.chunk):
            self._check_interrupt()
            rows = min(self.chunk, total - first)
            angles = self._rope.angles(positions[:, first : first + rows])
            if rows == 1 and isinstance(source, np.ndarray):
                self._step(source[first : first + 1], angles, used + first)
            else:
                self._chunk(source, first, rows, angles, used + first)
        copy: NDArray[np.float32] = self._logits_here.copy()
        return copy

    def _check_interrupt(self) -> None:
        if self.hook is not None and self.hook():
            raise Interrupted

    def _chunk(
        self,
        source: NDArray[np.float32] | Features,
        first: int,
        rows: int,
        angles: Angles,
        used: int,
    ) -> None:
        context = self._contexts[PREFILL]
        self._fill(self._prefill, angles, used, rows)
        self._prefill.arrays["last_index"][0, 0] = rows - 1
        self._prefill.send("last_index", 1)
        if isinstance(source, Features):
            self._copy_features(source, first, rows)
        else:
            encoded = self._number.encode(source[first : first + rows])
            self._prefill.arrays["inputs_embeds"][:rows] = encoded
            self._prefill.send("inputs_embeds", rows)
        for name in self._levels:
            has_level = isinstance(source, Features)
            context.bind(name, self._prefill.addresses[name] if has_level else self._zeros.address)
        self._set_rows(context, rows)
        self._cache.bind(context)
        context.launch()
        self._gpu.to_host(self._logits_here, self._logits.address)
        self._gpu.wait()
        self._cache.advance()

    def _fill(self, staging: Staging, angles: Angles, used: int, rows: int) -> None:
        """Position inputs of a call; those of prefill are sent here, a step sends all at once."""
        staging.arrays["write_indices"][0] = used
        for name, values in zip(("rope_cos", "rope_sin"), angles, strict=True):
            staging.arrays[name][:rows] = self._number.encode(values)
        if staging is self._prefill:
            for name in ("write_indices", "rope_cos", "rope_sin"):
                staging.send(name, 1 if name == "write_indices" else rows)

    def _copy_features(self, source: Features, first: int, rows: int) -> None:
        names = ("inputs_embeds", *self._levels)
        for name, address in zip(names, source.addresses, strict=True):
            start = address + first * self._row_bytes
            self._gpu.on_device(self._prefill.addresses[name], start, rows * self._row_bytes)

    def _step(self, row: NDArray[np.float32], angles: Angles, used: int) -> None:
        self._fill(self._decode, angles, used, 1)
        self._decode.arrays["inputs_embeds"][:] = self._number.encode(row)
        self._cache.bind(self._contexts[DECODE])
        self._steps.run()
        self._gpu.wait()
        self._cache.advance()

    def _enqueue_decode(self) -> None:
        self._decode.send_all()
        self._contexts[DECODE].launch()
        self._gpu.to_host(self._logits_here, self._logits.address)

    def save(self, used: int) -> NDArray[np.uint8]:
        """The first ``used`` cells as bytes."""
        return self._cache.save(used)

    def restore(self, state: NDArray[np.uint8], used: int) -> None:
        """Bytes from ``save`` back into the cache."""
        self._cache.restore(state, used)

    def close(self) -> None:
        """Free the contexts and the engine; buffers are the GPU's to free."""
        for context in self._contexts:
            context.close()
        self._contexts = []
        self._engine.close()


class _Steps:
    """Launches of one decode step: plain at first, then as a captured graph."""

    def __init__(
        self, gpu: Gpu, context: Context, work: Callable[[], None], *, enabled: bool
    ) -> None:
        self._gpu, self._context, self._work, self._enabled = gpu, context, work, enabled
        #: by addresses; None where they have been launched once and not captured yet
        self._graphs: dict[Any, Any] = {}

    def run(self) -> None:
        """Enqueue one step."""
        key = self._context.addresses
        if not self._enabled or key not in self._graphs:
            self._work()
            self._graphs.setdefault(key, None)
            return
        if self._graphs[key] is None:
            self._graphs[key] = self._capture()
        if self._graphs[key] is None:
            self._work()
        else:
            self._gpu.launch(self._graphs[key])

    def _capture(self) -> Any:
        """The graph, or None, for good, where it cannot be captured."""
        try:
            if self._context.is_capturable:
                return self._gpu.capture(self._work)
            reason = "TensorRT does not allow it"
        except GenerationError as error:
            reason = str(error)
        getLogger("medmo_edge").warning("decoding without a CUDA graph, so slower: %s", reason)
        self._enabled = False
        return None
