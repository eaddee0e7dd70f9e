"""From a benchmark's name and a folder to the questions that are asked.

Everything is read before the first question, so that missing pictures or labels end a run here and
not after an hour. Pictures are not decoded yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.benchmarks import BENCHMARKS, Benchmark
from medmo_edge.evaluation.cases import Case
from medmo_edge.evaluation.items import Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """A benchmark's cases, the number of items they come from, and the items that were broken."""

    benchmark: Benchmark
    cases: tuple[Case, ...]
    num_items: int
    broken: tuple[str, ...] = ()


def load_questions(
    name: str, data: Path | None, *, limit: int | None = None, skip_broken: bool = False
) -> Questions:
    """The questions of benchmark ``name`` on the first ``limit`` items of ``data``.

    Errors: UsageError for an unknown name or without data; SampleError for an empty split, and for
    broken items (missing pictures, missing gold) unless ``skip_broken``, with how many and which.
    """
    row = benchmark(name)
    folder = _folder(row, data)
    broken: list[SampleError] = []
    items = list(islice(row.read(folder, broken.append), limit))
    if broken and not (skip_broken and items):
        raise SampleError(_broken_line(row.name, len(items), broken))
    if not items:
        raise SampleError(f"{row.name}: {folder} holds no item of this benchmark: an empty split?")
    cases = [case for item in items for case in _asked(row, item)]
    if not cases:
        raise SampleError(f"{row.name}: none of {len(items)} items of {folder} can be asked about")
    lines = tuple(str(error) for error in broken)
    return Questions(benchmark=row, cases=tuple(cases), num_items=len(items), broken=lines)


def benchmark(name: str) -> Benchmark:
    """The row of the table. Errors: UsageError."""
    if name not in BENCHMARKS:
        raise UsageError(f"benchmark {name!r} is unknown: use one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _folder(row: Benchmark, data: Path | None) -> Path:
    if not row.needs_data:
        return Path(".")
    if data is None:
        raise UsageError(f"benchmark {row.name} needs --data: {row.describe}; it is not downloaded")
    if not data.exists():
        raise SampleError(f"{data} does not exist: give the folder of {row.name} with --data")
    return next((data / name for name in row.folders if (data / name).exists()), data)


def _broken_line(name: str, good: int, broken: list[SampleError]) -> str:
    missing = [str(error) for error in broken if "is missing below" in str(error)]
    what = f"{len(missing)} pictures are missing" if missing else f"{len(broken)} items are broken"
    shown = "; ".join((missing or [str(error) for error in broken])[:3])
    more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
    return (
        f"{name}: {what} of {good + len(broken)} items: {shown}{more}: complete the folder, or "
        "leave them out with --skip-broken"
    )


def _asked(row: Benchmark, item: Item) -> Iterator[Case]:
    groups = {key: str(item.meta[key]) for key in row.group_keys if item.meta.get(key)}
    for case in row.ask(item):
        yield replace(case, groups={**groups, **case.groups}) if groups else case
