"""Vision features kept on disk, for stages whose vision tower and mergers learn nothing.

A picture's features are those of one pass of the tower over it: the main set and the deepstack
sets. They are found by the content of its file; the folder they lie in is named by the tower's
weights, its number format and the preprocessing, so that other ones are never read by mistake.
Nothing is forgotten or replaced, and no picture is augmented.

A file grows at its end, features before their entry, so a killed run leaves a usable cache. One
process fills it; any number read it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ImageError, UsageError
from medmo_edge.images import read_image
from medmo_edge.preprocess import Preprocessing, grid_thw, patchify, resize, smart_resize
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.parallel import Group, arithmetic
from medmo_edge.train.picture_files import digest, hollow_frame
from medmo_edge.train.stages import RlStage, Stage

if TYPE_CHECKING:
    import torch

MOST_SAMPLES = 1_000_000  # of more, finding the different pictures takes longer than it saves
DISK_PART = 0.25  # of what is free: features are a convenience, checkpoints are not
PATCHES = 4096  # of several pictures in one pass of the tower; one picture may have more
_ALIGNED = 64  # bytes; where the first of several features begins
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def reason_against(stage: Stage) -> str | None:
    """Why a stage cannot use kept features, or None when it can."""
    if isinstance(stage, RlStage):
        return f"stage {stage.name!r} samples answers, which look at pictures themselves"
    learning = [module for module in ("vision", "merger") if module in stage.trainable]
    if learning:
        return f"stage {stage.name!r} trains the {learning[0]}, so its features change"
    if any(source.augment != "none" for source in stage.data):
        return f"stage {stage.name!r} augments pictures, so no view comes twice"
    return None


def keep_features(
    mixture: Mixture, stage: Stage, model: Any, folder: Path, group: Group, precision: str
) -> "VisionCache | None":
    """Let ``mixture`` read features from a cache below ``folder``, where that is possible and pays.

    It pays when pictures come twice or more on average and their features take no more than
    ``DISK_PART`` of the free disk. All processes call it, before the model is spread over them, and
    decide alike; one computes. Gives the cache, or None when pictures stay pixels.
    """
    samples = sum(stream.size for stream in mixture.streams)
    if reason_against(stage) is not None or samples > MOST_SAMPLES:
        return None
    cache = VisionCache.open(folder, model, mixture.limits)
    missing = cache.missing(mixture.pictures())
    count = len(missing) + len(cache)
    pays = count > 0 and stage.samples * stage.epochs >= 2 * count
    fits = cache.size(missing) <= DISK_PART * shutil.disk_usage(folder).free
    if group.total([float(pays and fits)]) != [group.world]:
        return None
    if group.leads and missing:
        _fill_on(group.device, cache, model, missing, arithmetic(model, group, precision))
    group.wait()
    whole = VisionCache.open(folder, model, mixture.limits)
    found, squared = group.total([len(whole), len(whole) ** 2])
    if found**2 != group.world * squared:  # not equal everywhere: machines do not share the folder
        return None
    mixture.use(whole)
    return whole


def _fill_on(
    device: str,
    cache: "VisionCache",
    model: Any,
    missing: Mapping[Path, int],
    context: AbstractContextManager[Any],
) -> None:
    """Fill with the tower on ``device`` for as long as that takes."""
    tower = model.model.visual
    home = next(tower.parameters()).device
    with context:
        tower.to(device)
        cache.fill(model, missing)
        tower.to(home)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a picture's features begin, in bytes, and how many vision tokens they are of."""

    offset: int
    tokens: int


class VisionCache:
    """Features [D, T, W] by picture; see ``open``."""

    def __init__(self, folder: Path, limits: Preprocessing, shape: tuple[int, int], dtype: str):
        self.folder, self.limits = folder, limits
        self._levels, self._width = shape
        self._dtype = dtype
        self._values, self._index = folder / "features.bin", folder / "index.jsonl"
        self._entries = dict(self._read_index())

    @classmethod
    def open(cls, folder: str | Path, model: Any, limits: Preprocessing) -> "VisionCache":
        """The cache below ``folder`` for this model's tower, made when it is new.

        ``limits`` are those of the stage. Errors: UsageError for a folder that cannot be written.
        """
        tower = model.model.visual
        dtype = str(tower.dtype).removeprefix("torch.")
        shape = (1 + len(tower.deepstack_merger_list), tower.config.out_hidden_size)
        key = f"{tower_sha256(tower)} {limits.sha256} {dtype} {shape}"
        inner = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:24]
        try:
            inner.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"vision cache {inner} cannot be made: {error.strerror}") from error
        return cls(inner, limits, shape, dtype)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, image: Path) -> bool:
        return digest(image).hex() in self._entries

    def read(self, images: Sequence[Path]) -> "torch.Tensor":
        """Features [D, T, W] of pictures in their order, mapped from disk.

        Errors: ImageError for a picture that is not in the cache or cannot be read.
        """
        import torch

        return torch.cat([self._one(image) for image in images], dim=1)

    def _one(self, image: Path) -> "torch.Tensor":
        import torch

        entry = self._entries.get(digest(image).hex())
        if entry is None:
            raise ImageError(f"{image} is not in the vision cache {self.folder}: fill it first")
        shape = (self._levels, entry.tokens, self._width)
        count = self._size(entry.tokens)
        values = np.memmap(self._values, np.uint8, mode="c", offset=entry.offset, shape=(count,))
        return torch.from_numpy(values).view(getattr(torch, self._dtype)).view(shape)

    def _size(self, tokens: int) -> int:
        """Bytes of the features of ``tokens`` vision tokens."""
        return self._levels * tokens * self._width * _BYTES[self._dtype]

    def fill(self, model: Any, images: Iterable[Path]) -> int:
        """Add what is missing of ``images``; gives how many pictures that were.

        Pictures that cannot be read are left out. Errors: UsageError when the disk is too small.
        """
        missing = self.missing(images)
        self._require_space(missing)
        before = len(self)
        for batch in _batches(missing):
            seen = {image: pixels for image in batch if (pixels := self._see(image)) is not None}
            if seen:
                self._append(list(seen), self._compute(model, list(seen.values())))
        return len(self) - before

    def missing(self, images: Iterable[Path]) -> dict[Path, int]:
        """Pictures of different content that are not in the cache, with their patches."""
        found: dict[bytes, tuple[Path, int]] = {}
        for image in images:
            try:
                if image not in self and digest(image) not in found:
                    height, width = hollow_frame(image).pixels.shape[:2]
                    height, width = smart_resize(height, width, self.limits)
                    patches = int(np.prod(grid_thw(height, width, self.limits)))
                    found[digest(image)] = (image, patches)
            except ImageError:
                continue  # the mixture names it, with the line of its sample
        return dict(found.values())

    def size(self, images: Mapping[Path, int]) -> int:
        """Bytes that the features of pictures of so many patches take."""
        return self._size(sum(images.values()) // self.limits.merge_size**2)

    def _require_space(self, images: Mapping[Path, int]) -> None:
        needed = self.size(images)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UsageError(
                f"vision cache {self.folder} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                "are free: choose another folder, lower max_pixels, or train without it"
            )

    def _see(self, image: Path) -> NDArray[np.uint8] | None:
        """The picture as the tower sees it, or None when it cannot be decoded."""
        try:
            return resize(read_image(image).pixels, self.limits)
        except ImageError:
            return None

    def _compute(
        self, model: Any, pictures: Sequence[NDArray[np.uint8]]
    ) -> "tuple[torch.Tensor, ...]":
        """Features of some pictures by one pass of the tower."""
        import torch

        tower, merge = model.model.visual, self.limits.merge_size
        grids = [grid_thw(one.shape[0], one.shape[1], self.limits) for one in pictures]
        patches = np.concatenate([patchify(one, self.limits) for one in pictures])
        device = next(tower.parameters()).device
        with torch.no_grad():
            seen = tower(
                torch.from_numpy(patches).to(device, tower.dtype),
                grid_thw=torch.tensor(grids, device=device),
                return_dict=True,
            )
        sets = torch.stack([seen.pooler_output, *seen.deepstack_features]).to(tower.dtype).cpu()
        return torch.split(sets, [int(np.prod(grid)) // merge**2 for grid in grids], dim=1)

    def _append(self, images: list[Path], features: "Sequence[torch.Tensor]") -> None:
        """Begins on a new line and a whole number, whatever a killed run has left."""
        import torch

        lines = ["\n"]
        with self._values.open("ab") as file:
            file.write(bytes(-file.tell() % _ALIGNED))
            for image, one in zip(images, features, strict=True):
                entry = _Entry(file.tell(), one.shape[1])
                file.write(one.contiguous().view(torch.uint8).numpy().tobytes())
                key = digest(image).hex()
                self._entries[key] = entry
                lines.append(json.dumps([key, entry.offset, entry.tokens]) + "\n")
        with self._index.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _read_index(self) -> Iterator[tuple[str, _Entry]]:
        """Entries whose features are on the disk whole."""
        if not self._index.is_file() or not self._values.is_file():
            return
        size = self._values.stat().st_size
        for line in self._index.read_text(encoding="utf-8").splitlines():
            try:
                key, offset, tokens = json.loads(line)
            except ValueError:
                continue  # empty, or being written when a run was killed
            if offset + self._size(tokens) <= size:
                yield key, _Entry(offset, tokens)


def _batches(images: Mapping[Path, int]) -> Iterator[dict[Path, int]]:
    """Pictures with their patches, about ``PATCHES`` at a time."""
    batch: dict[Path, int] = {}
    for image, patches in images.items():
        if batch and sum(batch.values()) + patches > PATCHES:
            yield batch
            batch = {}
        batch[image] = patches
    if batch:
        yield batch


def tower_sha256(tower: Any) -> str:
    """Hash of the weights of a vision tower and its mergers, names and number formats included."""
    import torch

    state = hashlib.sha256()
    for name, weight in sorted(tower.state_dict().items()):
        state.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        state.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()
