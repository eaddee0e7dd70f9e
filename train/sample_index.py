"""Where each sample of a JSONL file lies and of which task it is; samples are read one by one.

Building an index reads the file once and parses no line of the usual form, so files of millions of
samples open in minutes and take 17 bytes of memory a sample. Whether a sample is sound is found out
when it is read. Ids are not compared: a repeated one is trained on twice.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import SampleError
from medmo_edge.samples import TASKS, Sample, parse_sample

OnBroken = Callable[[SampleError], None]

_TASK = re.compile(rb'"task"\s*:\s*"([a-z_]*)"')
_CODES = {task.encode(): code for code, task in enumerate(TASKS)}


def refuse(error: SampleError) -> None:
    """What happens to a broken sample unless it may be skipped. Errors: the SampleError."""
    raise error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleIndex:
    """Byte offsets, line numbers (from 1) and task codes of the samples of ``path``, in order."""

    path: Path
    offsets: NDArray[np.int64] = field(repr=False)
    lines: NDArray[np.int64] = field(repr=False)
    codes: NDArray[np.uint8] = field(repr=False)

    def rows(self, *tasks: str) -> NDArray[np.int64]:
        """Which samples, counted from 0, are of one of ``tasks``."""
        return np.flatnonzero(np.isin(self.codes, [TASKS.index(task) for task in tasks]))

    def read(self, row: int) -> Sample:
        """One sample. Errors: SampleError with its line when it, or the file, has gone wrong."""
        number = int(self.lines[row])
        try:
            with self.path.open("rb") as file:
                file.seek(int(self.offsets[row]))
                text = file.readline().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SampleError(f"{self.path}:{number}: cannot be read ({error})") from error
        return parse_sample(text, self.path, number)


def index_samples(path: str | Path, broken: OnBroken = refuse) -> SampleIndex:
    """The index of a JSONL file; lines without a known task go to ``broken`` and are left out.

    Errors: SampleError when the file cannot be read or holds no sample.
    """
    path = Path(path)
    offsets, lines, codes = [], [], []
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        codes.append(_code(line, path, number))
                        offsets.append(offset)
                        lines.append(number)
                    except SampleError as error:
                        broken(error)
                offset += len(line)
    except OSError as error:
        raise SampleError(
            f"{path} cannot be read: {error.strerror}: see the stage's data"
        ) from error
    if not offsets:
        raise SampleError(f"{path} holds no sample: give a JSONL file, one sample a line")
    return SampleIndex(
        path=path,
        offsets=np.asarray(offsets, np.int64),
        lines=np.asarray(lines, np.int64),
        codes=np.asarray(codes, np.uint8),
    )


def _code(line: bytes, path: Path, number: int) -> int:
    """The code of a line's task. A line with one such key has it at the top, or is broken later."""
    found = _TASK.findall(line)
    if len(found) == 1 and found[0] in _CODES:
        return _CODES[found[0]]
    try:
        return TASKS.index(parse_sample(line.decode("utf-8"), path, number).task)
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}:{number}: not UTF-8 text: give a JSONL file") from error
