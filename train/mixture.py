"""Which samples a stage learns from in which step, packed into rows for every process.

A pure function of the seed and the step: a resumed run needs no cursor, and one process draws what
many draw together. Tasks come in the parts of the stage's mixture (exact to one sample a step), the
files of a task by their weights; every sample of a file is drawn once before any comes again.
Nothing is learned here, and no sample is ever cut to fit.
"""

import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Coords
from medmo_edge.errors import ImageError, RecipeError, SampleError
from medmo_edge.evaluation.models import geometry_of
from medmo_edge.images import Frame, read_image
from medmo_edge.preprocess import Preprocessing
from medmo_edge.samples import TASKS, Sample
from medmo_edge.train.packing import (
    Chat,
    Encoded,
    PackedRow,
    check_boxes,
    idle_row,
    named,
    outline_sample,
    pack,
    see,
)
from medmo_edge.train.picture_files import hollow_frame
from medmo_edge.train.retrieval import DIRECTIONS, captioned, retrieval_sample
from medmo_edge.train.sample_index import SampleIndex, index_samples
from medmo_edge.train.stages import DataSource, RlStage, Stage
from medmo_edge.train.views import view

if TYPE_CHECKING:
    from medmo_edge.train.vision_cache import VisionCache

_CHUNK = 1024  # steps whose composition is drawn at once
_COUNTS, _ORDER, _VIEW, _RIVALS = range(4)  # what a random stream is for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stream:
    """The samples of one task in one file. ``share`` is its part of all draws, 0..1.

    ``is_made``: retrieval questions made of captioned samples, ``size`` of them.
    """

    source: DataSource
    task: str
    index: SampleIndex
    rows: NDArray[np.int64]
    share: float
    is_made: bool

    @property
    def size(self) -> int:
        """How many different samples it has."""
        return len(self.rows) * (DIRECTIONS if self.is_made else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Draw number ``count`` (from 0) of stream number ``stream``."""

    stream: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class _Outlined:
    """A drawn sample as its text will be, without pixels; ``sample`` is as it is in the file."""

    draw: Draw
    sample: Sample
    outline: Encoded


class Mixture:
    """The samples of one stage. Safe to ask from several threads."""

    def __init__(
        self,
        stage: Stage,
        seed: int,
        chat: Chat,
        limits: Preprocessing,
        coords: Coords,
        *,
        folder: Path,
        devices: int,
        skip_broken: bool = False,
    ) -> None:
        """``limits`` are the checkpoint's; the stage narrows them. ``folder`` holds its files.

        A step draws what ``devices`` devices take together by the stage's rows and accumulation,
        on however many it runs; in reinforcement learning that many completions.
        Errors: SampleError for a file that cannot be read, RecipeError for a mixture that the
        files cannot serve.
        """
        self.limits = replace(limits, min_pixels=stage.min_pixels, max_pixels=stage.max_pixels)
        self.skipped: dict[str, str] = {}
        self._stage, self._chat, self._coords = stage, chat, coords
        self._seed = [
            seed % 2**64,
            int.from_bytes(hashlib.sha256(stage.name.encode()).digest()[:4], "big"),
        ]
        self._skip_broken = skip_broken
        self._cache: VisionCache | None = None
        group = stage.rollouts.num_generations if isinstance(stage, RlStage) else 1
        #: samples drawn in one step by all processes together
        self.batch: int = stage.rows * stage.accumulation * devices // group
        #: steps of the stage, as its plan counts them
        self.steps: int = math.ceil(stage.samples * stage.epochs / self.batch)
        self.streams: tuple[Stream, ...] = tuple(find_streams(stage, self._open(folder)))
        self._edges = np.cumsum([0.0, *(stream.share for stream in self.streams)])
        self._edges[-1] = 1.0
        self._totals = [np.zeros(len(self.streams), np.int64)]  # draws before each chunk
        self._lock = Lock()
        self._order = lru_cache(maxsize=2 * len(self.streams))(self._shuffled)

    def _open(self, folder: Path) -> dict[str, SampleIndex]:
        indices: dict[str, SampleIndex] = {}
        for source in self._stage.data:
            if source.path not in indices:
                indices[source.path] = index_samples(folder / source.path, self._broken)
        return indices

    def use(self, cache: "VisionCache") -> None:
        """From here on rows hold vision features of ``cache`` instead of pixels.

        Errors: RecipeError when a file's pictures are augmented.
        """
        _require_plain(self._stage)
        self._cache = cache

    def _broken(self, error: SampleError) -> None:
        if not self._skip_broken:
            raise SampleError(f"{error} (--skip-broken leaves such samples out)") from error
        text = str(error)
        self.skipped[text.partition(": ")[0]] = text

    def rows(self, step: int, rank: int, world: int) -> list[PackedRow]:
        """The rows that process ``rank`` of ``world`` learns from in ``step`` (from 0).

        Every process has the same number of rows in a step, at least one; one that has no sample
        left has an ``idle_row``. Rows of a step are about equally long and hold ``row_tokens`` at
        most. Errors: SampleError for the first broken sample, unless they are skipped: then they
        are in ``skipped``, under "file:line".
        """
        found = [one for draw in self.draws(step) if (one := self._outlined(draw)) is not None]
        sizes = [one.outline.tokens for one in found]
        mine = share_out(sizes, self._stage.row_tokens, world)[rank::world]
        return [self._row([found[place] for place in places]) for places in mine]

    def samples(self, step: int, rank: int, world: int) -> list[Sample]:
        """The samples of ``rank`` in ``step``, for prompts: as in their file, pictures checked.

        Their numbers differ by one at most between processes. Errors: as of ``rows``.
        """
        found = (self._outlined(draw, answered=False) for draw in self.draws(step))
        kept = [one.sample for one in found if one is not None]
        return kept[rank::world]

    def draws(self, step: int) -> list[Draw]:
        """What is drawn in ``step`` by all processes together, stream by stream."""
        chunk, place = divmod(step, _CHUNK)
        with self._lock:
            while len(self._totals) <= chunk:
                before = len(self._totals) - 1
                self._totals.append(self._totals[before] + self._composition(before).sum(axis=0))
        counts = self._composition(chunk)
        first = self._totals[chunk] + counts[:place].sum(axis=0)
        return [
            Draw(stream=stream, count=int(first[stream]) + extra)
            for stream, number in enumerate(counts[place])
            for extra in range(number)
        ]

    def _composition(self, chunk: int) -> NDArray[np.int64]:
        """Samples per step and stream of ``_CHUNK`` steps: each row sums to the batch.

        Systematic sampling: a stream's number is its share of the batch, rounded up or down at
        random so that the mean is exact.
        """
        offsets = self._random(_COUNTS, chunk).random((_CHUNK, 1))
        counts = np.diff(np.floor(self.batch * self._edges + offsets), axis=1)
        return counts.astype(np.int64)

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([*self._seed, *numbers])

    def _shuffled(self, stream: int, epoch: int) -> NDArray[np.int64]:
        return self._random(_ORDER, stream, epoch).permutation(self.streams[stream].size)

    def _read(self, draw: Draw) -> Sample:
        stream = self.streams[draw.stream]
        epoch, count = divmod(draw.count, stream.size)
        place = int(self._order(draw.stream, epoch)[count])
        if not stream.is_made:
            return stream.index.read(int(stream.rows[place]))
        random = self._random(_RIVALS, draw.stream, draw.count)
        return retrieval_sample(stream.index, stream.rows, place, random)

    def _outlined(self, draw: Draw, answered: bool = True) -> _Outlined | None:
        """None for a broken sample that is skipped. Errors: SampleError."""
        path = self.streams[draw.stream].index.path
        try:
            sample = self._read(draw)
            with named(sample, path):
                frames = [hollow_frame(image) for image in sample.images]
                check_boxes(sample, [frame.source for frame in frames])
                seen, frames = self._view(draw, sample, frames) if answered else (sample, frames)
                geometries = [geometry_of(frame, self.limits) for frame in frames]
            outline = outline_sample(
                seen,
                geometries,
                self._chat,
                self.limits,
                self._coords,
                row_tokens=self._stage.row_tokens,
                source=path,
                answered=answered,
            )
        except SampleError as error:
            self._broken(error)
            return None
        return _Outlined(draw, sample, outline)

    def _view(self, draw: Draw, sample: Sample, frames: list[Frame]) -> tuple[Sample, list[Frame]]:
        if self.streams[draw.stream].source.augment == "none":
            return sample, frames
        return view(sample, frames, self._random(_VIEW, draw.stream, draw.count))

    def _row(self, outlined: Sequence[_Outlined]) -> PackedRow:
        encoded = [one for each in outlined if (one := self._completed(each)) is not None]
        # With features no device runs the tower, so none may wait for the others to run it.
        runs_tower = self._cache is None
        if not encoded:
            return idle_row(self._chat, self.limits, dummy_image=runs_tower)
        return pack(encoded, dummy_image=runs_tower)

    def _completed(self, outlined: _Outlined) -> Encoded | None:
        """The outline with its pixels; None for a broken picture that is skipped."""
        draw, sample, outline = outlined.draw, outlined.sample, outlined.outline
        try:
            if self._cache is not None and sample.images:
                with named(sample, self.streams[draw.stream].index.path):
                    return replace(outline, features=self._cache.read(sample.images))
            with named(sample, self.streams[draw.stream].index.path):
                frames = [read_image(image) for image in sample.images]
                _, frames = self._view(draw, sample, frames)
                if tuple(geometry_of(frame, self.limits) for frame in frames) != outline.geometries:
                    raise ImageError("its pictures have another size than their headers say")
                return replace(outline, patches=see(frames, self.limits))
        except SampleError as error:
            self._broken(error)
            return None

    def pictures(self) -> Iterator[Path]:
        """Every picture of every stream, broken samples left out; some come more than once."""
        for stream in self.streams:
            for row in stream.rows:
                try:
                    yield from stream.index.read(int(row)).images
                except SampleError as error:
                    self._broken(error)

    def identity(self) -> dict[str, str]:
        """sha256 of every file that is drawn from, by its path in the recipe."""
        paths = {stream.source.path: stream.index.path for stream in self.streams}
        hashes = {}
        for name, path in paths.items():
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashes


def _require_plain(stage: Stage) -> None:
    for source in stage.data:
        if source.augment != "none":
            raise RecipeError(
                f"stage {stage.name!r}: kept vision features are of whole pictures: set augment = "
                f'"none" for {source.path}, or train without a vision cache'
            )


def find_streams(stage: Stage, indices: dict[str, SampleIndex]) -> list[Stream]:
    """The streams of a stage from the index of every path in its data.

    Errors: RecipeError for a task that no file has, or a file that has none of the tasks.
    """
    weights = {task: weight for task, weight in stage.mixture.items() if weight > 0}
    found: list[Stream] = []
    for task in weights:
        having = [stream for source in stage.data if (stream := _stream(source, task, indices))]
        if not having:
            raise RecipeError(
                f"stage {stage.name!r}: its mixture has {task!r}, which none of its data files "
                "holds: add one under [[stages.data]] or take the task out of [stages.mixture]"
            )
        total = sum(weights.values()) * sum(stream.source.weight for stream in having)
        found += [replace(s, share=weights[task] * s.source.weight / total) for s in having]
    for source in stage.data:
        if not any(stream.source is source for stream in found):
            held = [task for task in TASKS if len(indices[source.path].rows(task))]
            raise RecipeError(
                f"stage {stage.name!r}: {source.path} serves no task of the mixture "
                f"({', '.join(weights)}): it holds {', '.join(held)}"
            )
    return found


def _stream(source: DataSource, task: str, indices: dict[str, SampleIndex]) -> Stream | None:
    """What ``source`` has of ``task``; captioned files also have retrieval."""
    if source.tasks and task not in source.tasks:
        return None
    index = indices[source.path]
    rows = index.rows(task)
    is_made = task == "retrieval" and not len(rows)
    rows = captioned(index) if is_made else rows
    if not len(rows):
        return None
    return Stream(source=source, task=task, index=index, rows=rows, share=0.0, is_made=is_made)


def share_out(sizes: Sequence[int], capacity: int, world: int) -> list[list[int]]:
    """Things of ``sizes`` (none above ``capacity``) in bins, as places in ``sizes``.

    The number of bins is a multiple of ``world``; they are about equally full, some may be empty.
    The largest go first, each into the emptiest bin.
    """
    bins = world * max(1, math.ceil(sum(sizes) / (capacity * world)))
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    while True:
        heap: list[tuple[int, int]] = [(0, number) for number in range(bins)]
        places: list[list[int]] = [[] for _ in range(bins)]
        for place in order:
            full, number = heap[0]
            if full + sizes[place] > capacity:
                break
            heapq.heapreplace(heap, (full + sizes[place], number))
            places[number].append(place)
        else:
            return places
        bins += world
