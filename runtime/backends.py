"""Backends: the table of runtime libraries, what each must offer, and the choice between them.

A backend evaluates token ids and resized pixels and returns logits, nothing else: prompts,
sampling, stopping and boxes are ours and the same for all. Nothing is discovered: a backend that is
not in the table does not exist. Backend modules are imported only when they are asked about.

Every backend module offers five functions:

    unavailable() -> str | None                     why the library cannot be used on this machine
    unsuited(manifest, device) -> str | None        why it cannot run this artifact here
    place(manifest, device) -> (str, str)           "cuda" or "cpu", and why not on the better one
    describe() -> dict                              library versions, for doctor
    open(manifest, device, *, threads, max_context) -> Backend
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import BackendUnavailable, UsageError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.device import Device

#: name -> module, in order of preference
BACKENDS: dict[str, str] = {
    "trt": "medmo_edge.runtime.trt",
    "ort": "medmo_edge.runtime.ort",
    "llamacpp": "medmo_edge.runtime.llamacpp",
    "fake": "medmo_edge.runtime.fake",
}


class Interrupted(Exception):
    """Native work stopped because the interrupt hook said so; the backend rolled it back."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in the evaluated prompt: KV cache cells used, and the next rope position.

    They differ after an image: its tokens take one cell each but share few positions.
    """

    cells: int
    position: int


START = Mark(0, 0)


class Backend(Protocol):
    """One loaded artifact. Not thread-safe; calls either finish or leave the state as it was.

    Errors of the evaluating methods: GenerationError when the context is full or the library
    fails, Interrupted when the hook of ``set_interrupt`` answered True.
    """

    name: str
    device: str
    max_cells: int  # tokens, vision tokens included, that one conversation can hold

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        """Append text tokens; returns the logits [V] after the last one."""

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        """Append the vision tokens of one image, without vision_start and vision_end."""

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Vision embeddings [tokens, (1 + deepstack levels) * hidden]; leaves the state alone.

        A row holds the main embedding, then one per deepstack level: to verify a vision tower,
        or to feed another backend's decoder.
        """

    def mark(self) -> Mark:
        """The present end."""

    def rewind(self, mark: Mark) -> None:
        """Forget everything after ``mark``, which must not lie inside an image."""

    def save(self) -> NDArray[np.uint8]:
        """The state as bytes; the caller keeps the mark that belongs to it."""

    def restore(self, state: NDArray[np.uint8], mark: Mark) -> None:
        """Replace the state by one from ``save``."""

    def set_interrupt(self, hook: Callable[[], bool] | None) -> None:
        """Ask ``hook`` again and again during native work; True stops it."""

    def close(self) -> None:
        """Free the native memory; calling it twice is harmless."""


class Lanes(Backend, Protocol):
    """What a backend may offer beside: several conversations side by side, each in a lane.

    Every method of ``Backend`` means the lane of the last ``select``; a new backend has one, 0.
    Lanes never change what the others hold. Backends without these methods answer one question
    after the other.
    """

    @property
    def lanes(self) -> int:
        """Number of lanes there are now."""

    @property
    def rows(self) -> int:
        """Most tokens that ``decode_lanes`` evaluates at once."""

    @rows.setter
    def rows(self, most: int) -> None: ...

    def select(self, lane: int) -> None:
        """From now on, ``lane`` is meant."""

    def fits(self, lanes: int, cells: int) -> bool:
        """Whether memory allows for ``lanes`` lanes of ``cells`` tokens each."""

    def hold(self, lanes: int) -> None:
        """Have exactly ``lanes`` lanes; what is in higher ones is lost.

        Errors: GenerationError when memory does not suffice; then everything is as before.
        """

    def decode_lanes(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """Append one token to each of several lanes; the logits [V] after it, by lane.

        Errors: GenerationError; then all lanes are as before.
        """

    def append_encoded(self, resized_HWC: NDArray[np.uint8], rows_NR: NDArray[np.float32]) -> None:
        """``append_image`` of an image that was encoded before."""

    def encode_aside(
        self, resized_HWC: NDArray[np.uint8], stop: Callable[[], bool]
    ) -> NDArray[np.float32]:
        """``encode_image`` from a second thread while other methods run; ``stop`` interrupts it."""


def lanes_of(backend: Backend) -> Lanes | None:
    """``backend`` with its lanes, or None when it has none."""
    return cast(Lanes, backend) if hasattr(backend, "decode_lanes") else None


@dataclass(frozen=True, slots=True)
class Choice:
    """One backend's verdict: ``obstacle`` is None when it can run, ``reason`` is for people.

    ``place``: "cuda" or "cpu", where an artifact would run; ``remark``: why not on a better one.
    """

    name: str
    obstacle: str | None
    reason: str
    place: str = ""
    remark: str = ""


def choose(manifest: Manifest | None, device: Device, wanted: str = "auto") -> list[Choice]:
    """Every backend with its reason, those that can run first; ``manifest`` None: any artifact.

    Errors: UsageError when ``wanted`` is neither "auto" nor a known backend.
    """
    if wanted != "auto" and wanted not in BACKENDS:
        raise UsageError(f"no backend is called {wanted!r}: use auto, {', '.join(BACKENDS)}")
    choices = [_judge(name, manifest, device, wanted) for name in BACKENDS]
    return sorted(choices, key=lambda choice: choice.obstacle is not None)


def _judge(name: str, manifest: Manifest | None, device: Device, wanted: str) -> Choice:
    if wanted not in ("auto", name):
        return _refuse(name, f"--backend {wanted} was asked for")
    if manifest is not None and manifest.backend != name:
        return _refuse(name, f"cannot read {manifest.target} artifacts ({manifest.backend} can)")
    module = import_module(BACKENDS[name])
    obstacle = module.unavailable()
    if obstacle is None and manifest is not None:
        obstacle = module.unsuited(manifest, device)
    if obstacle is not None:
        return _refuse(name, obstacle)
    if manifest is None:
        return Choice(name, None, "can run here")
    place, remark = module.place(manifest, device)
    reason = f"reads {manifest.target}, runs on {place}" + (f" ({remark})" if remark else "")
    return Choice(name, None, reason, place, remark)


def _refuse(name: str, obstacle: str) -> Choice:
    return Choice(name, obstacle, obstacle)


def open_backend(
    manifest: Manifest,
    device: Device,
    wanted: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Backend:
    """Open the first backend that can run the artifact.

    Errors: BackendUnavailable with every backend's reason; ArtifactError for damaged weights.
    """
    choices = choose(manifest, device, wanted)
    if choices[0].obstacle is not None:
        reasons = {choice.name: choice.reason for choice in choices}
        raise BackendUnavailable(f"no backend can run {manifest.folder} here", reasons)
    backend: Backend = import_module(BACKENDS[choices[0].name]).open(
        manifest, device, **(options or {})
    )
    return backend
