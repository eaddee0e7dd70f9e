"""A publisher's data set as sample files: read, put right, split, written by atomic rename.

Embedded pictures are written once each, beside the samples; picture files stay where they are.
Broken items stop the conversion unless the caller skips them. Nothing is downloaded.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.formats import read_items
from medmo_edge.evaluation.items import Embedded, Item, Picture, per_label
from medmo_edge.evaluation.retrieval import retrieval_samples
from medmo_edge.evaluation.splitting import Groups, Key, choose, item_keys
from medmo_edge.samples import Sample, parse_sample, to_dict

MAX_BROKEN = 1000  # a set with more is another format; reading on would only take time
_PLAIN = re.compile(r"[^A-Za-z0-9._-]+")

Progress = Callable[[int], None]


class BrokenItems(SampleError):
    """The set has broken items and they were not to be skipped; ``reasons`` has a line for each."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        more = f" of which the first is {reasons[0]}" if len(reasons) > 1 else f": {reasons[0]}"
        super().__init__(
            f"{len(reasons)} broken {'items' if more[0] != ':' else 'item'}{more} "
            "(put right what is wrong, or leave them out with --skip-broken)"
        )


@dataclass(slots=True, kw_only=True)
class Report:
    """What a conversion did: samples per file, per task, pictures written, what was put right."""

    files: dict[str, int] = field(default_factory=dict)
    tasks: Counter[str] = field(default_factory=Counter)
    images_written: int = 0
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "files": self.files,
            "tasks": dict(self.tasks),
            "images_written": self.images_written,
            "notes": self.notes,
            "broken": self.broken,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How to convert. ``fractions``: our own splits by picture; ``split``: the publisher's.

    ``by_label``: one question per picture and label; ``absent``: also for labels a picture lacks.
    ``retrieval``: candidates of added retrieval questions, 0 for none.
    """

    split: str | None = None
    fractions: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    by_label: bool = True
    absent: bool = False
    retrieval: int = 0
    skip_broken: bool = False


def convert(
    name: str,
    source: Path,
    output: Path,
    wishes: Wishes | None = None,
    *,
    progress: Progress = lambda done: None,
) -> Report:
    """Write ``source`` in format ``name`` as samples to ``output``, or to ``output-SPLIT`` files.

    Embedded pictures go to the folder ``STEM.images``. ``progress`` hears the number of items read.
    Errors: BrokenItems, SampleError for a set that gives nothing, UsageError when an output exists.
    """
    wishes = wishes or Wishes()
    targets = _targets(output, wishes)
    with _staging(output) as folder, closing(_Draft(folder, output, wishes)) as draft:
        for done, item in enumerate(_items(name, source, wishes, draft.report), start=1):
            draft.take(item)
            progress(done)
        if draft.report.broken and not wishes.skip_broken:
            raise BrokenItems(draft.report.broken)
        draft.finish(targets)
    return draft.report


def _targets(output: Path, wishes: Wishes) -> dict[str, Path]:
    """The file of every split ("" without fractions). Errors: UsageError when something exists."""
    suffix = output.suffix or ".jsonl"
    targets = {
        split: output.with_name(f"{output.stem}-{split}{suffix}") for split in wishes.fractions
    } or {"": output}
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is not a folder: create it first")
    for path in (*targets.values(), _images_folder(output)):
        if os.path.lexists(path):
            raise UsageError(f"{path} exists already: choose another output or remove it")
    return targets


def _images_folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}.images")


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder beside the output, gone afterwards whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{output.stem}.", dir=output.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _items(name: str, source: Path, wishes: Wishes, report: Report) -> Iterator[Item]:
    """The items as they become samples; broken ones end up in the report."""

    def broken(error: SampleError) -> None:
        report.broken.append(str(error))
        if len(report.broken) >= MAX_BROKEN and not wishes.skip_broken:
            raise BrokenItems(report.broken)

    labels = _labels(name, source, wishes) if wishes.absent else ()
    for item in read_items(name, source, split=wishes.split, broken=broken):
        report.notes += [f"{item.where}: {note}" for note in item.notes]
        yield from per_label(item, labels) if wishes.by_label else (item,)


def _labels(name: str, source: Path, wishes: Wishes) -> list[str]:
    """Every box label of the set: a reading of its own, since any item may bring a new one."""
    items = read_items(name, source, split=wishes.split, broken=lambda error: None)
    return sorted({box.label for item in items for box in item.boxes})


class _Draft:
    """The samples on their way: lines in one file, with the key that will choose their split."""

    def __init__(self, folder: Path, output: Path, wishes: Wishes) -> None:
        self.folder, self.output, self.wishes = folder, output, wishes
        self.report = Report()
        self._groups = Groups()
        self._digests: dict[Path, Key] = {}
        self._written: dict[bytes, str] = {}
        self._names: set[str] = set()
        self._ids: set[str] = set()
        self._keys: list[Key] = []
        self._images = folder / "images"
        self._lines: IO[str] = (folder / "all").open("w", encoding="utf-8", newline="\n")

    def take(self, item: Item) -> None:
        """Write one item as a line; an id used before makes it broken."""
        try:
            if item.id in self._ids:
                raise SampleError(f"{item.where}: id {item.id!r} was used before")
            keys = item_keys(item, self._digests) if self.wishes.fractions else []
        except SampleError as error:
            self.report.broken.append(str(error))
            return
        self._ids.add(item.id)
        if keys:
            self._keys.append(self._groups.join(keys))
        images = tuple(self._place(picture) for picture in item.images)
        sample = Sample(
            id=item.id,
            task=item.task,
            images=images,
            messages=item.messages,
            boxes=item.boxes,
            answer=item.answer,
            choices=item.choices,
            meta=item.meta,
        )
        self._lines.write(_line(sample, self.output.parent))

    def _place(self, picture: Picture) -> Path:
        """Where the picture will be once everything is done; embedded ones are written now."""
        if not isinstance(picture, Embedded):
            return picture.absolute()
        digest = hashlib.sha256(picture.data).digest()
        if digest not in self._written:
            self._images.mkdir(exist_ok=True)
            name = _PLAIN.sub("_", picture.name) or "picture"
            if name.lower() in self._names:
                name = f"{Path(name).stem}-{digest.hex()[:12]}{Path(name).suffix}"
            (self._images / name).write_bytes(picture.data)
            self._names.add(name.lower())
            self._written[digest] = name
        return _images_folder(self.output.resolve()) / self._written[digest]

    def close(self) -> None:
        """No more items."""
        self._lines.close()

    def finish(self, targets: Mapping[str, Path]) -> None:
        """Split, add retrieval questions, and let everything appear."""
        self.close()
        if not self._ids:
            raise SampleError(f"no sample for {self.output}: the set is empty or all of it broken")
        drafts = {split: self.folder / f"split-{split}" for split in targets}
        self._divide(drafts)
        for split, path in targets.items():
            self.report.files[str(path)] = self._complete(drafts[split], path)
        self.report.images_written = len(self._written)
        moves = [(drafts[split], path) for split, path in targets.items()]
        if self._written:
            moves.insert(0, (self._images, _images_folder(self.output)))
        _appear(moves)

    def _divide(self, drafts: Mapping[str, Path]) -> None:
        """Give every line to its split. Errors: SampleError when a split stays empty."""
        counts: Counter[str] = Counter()
        with ExitStack() as stack:
            lines = stack.enter_context((self.folder / "all").open(encoding="utf-8"))
            files = {
                split: stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for split, path in drafts.items()
            }
            for number, line in enumerate(lines):
                split = ""
                if self.wishes.fractions:
                    root = self._groups.root(self._keys[number])
                    split = choose(root, self.wishes.fractions, self.wishes.seed)
                files[split].write(line)
                counts[split] += 1
        if empty := [split for split in drafts if not counts[split]]:
            raise SampleError(
                f"split {empty[0]!r} would be empty: the set has too few pictures or patients for "
                "these fractions, or another --seed is needed"
            )

    def _complete(self, draft: Path, target: Path) -> int:
        """Add the retrieval questions of one split and count its samples by task."""
        with draft.open(encoding="utf-8") as lines:
            samples = (parse_sample(line, target, n) for n, line in enumerate(lines, start=1))
            kept = []
            for sample in samples:
                self.report.tasks[sample.task] += 1
                kept += [sample] if self.wishes.retrieval and sample.images else []
                count = sample.line
        if self.wishes.retrieval:
            with draft.open("a", encoding="utf-8", newline="\n") as file:
                for sample in retrieval_samples(
                    kept, candidates=self.wishes.retrieval, seed=self.wishes.seed
                ):
                    file.write(_line(sample, target.parent))
                    self.report.tasks["retrieval"] += 1
                    count += 1
        return count


def _line(sample: Sample, folder: Path) -> str:
    return json.dumps(to_dict(sample, folder), ensure_ascii=False) + "\n"


def _appear(moves: list[tuple[Path, Path]]) -> None:
    """Rename all or nothing."""
    done: list[tuple[Path, Path]] = []
    try:
        for draft, target in moves:
            os.replace(draft, target)
            done.append((draft, target))
    except OSError:
        for draft, target in reversed(done):
            os.replace(target, draft)
        raise
