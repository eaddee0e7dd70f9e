"""Publishers' files as rows: text in the encodings that occur, CSV, JSON, Parquet, picture folders.

Every failure is a SampleError that names the file and, for rows, the line. Nothing is guessed: a
text that is neither UTF-8 nor marked UTF-16 is refused, because a wrong letter is a wrong label.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from medmo_edge.errors import SampleError, UsageError, one_line
from medmo_edge.evaluation.items import Embedded, Picture

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".dcm")
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp"}
_CELL = 1 << 24  # characters of one CSV cell; reports are longer than the module's default


def read_text(path: Path) -> str:
    """The text of a file: UTF-8 with or without mark, or UTF-16 with its mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SampleError(f"{path} cannot be read: {error.strerror}") from error
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SampleError(
            f"{path}:{line} is not UTF-8 text: convert the file, e.g. with iconv -t UTF-8"
        ) from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. Errors: SampleError with file and line."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SampleError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise SampleError(f"{path}: JSON nested too deeply") from error


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every entry of a JSON list or of every line of a JSONL file."""
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).splitlines(), start=1)
        values = ((f"{path}:{n}", _line_value(text, f"{path}:{n}")) for n, text in lines if text)
    else:
        whole = read_json(path)
        if not isinstance(whole, list):
            raise SampleError(f"{path}: expected a list of objects")
        values = ((f"{path}, entry {n}", value) for n, value in enumerate(whole, start=1))
    for where, value in values:
        if not isinstance(value, dict):
            raise SampleError(f"{where}: expected an object")
        yield where, value


def _line_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: not JSON ({error})") from error


def csv_rows(path: Path, needed: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """("file:line", row) of a CSV file with a header; names and cells lose outer white space.

    Errors: SampleError when one of the ``needed`` columns is missing or a row has other cells than
    the header.
    """
    text = io.StringIO(read_text(path), newline="")
    csv.field_size_limit(_CELL)
    reader = csv.reader(text, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in needed if name not in header]:
            raise SampleError(f"{path}: column {missing[0]!r} is missing: has {', '.join(header)}")
        last = reader.line_num
        for cells in reader:
            where = f"{path}:{last + 1}"  # where the row begins; cells may hold line ends
            last = reader.line_num
            if cells:
                if len(cells) != len(header):
                    raise SampleError(f"{where}: {len(cells)} cells under {len(header)} columns")
                values = (cell.strip() for cell in cells)
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise SampleError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def parquet_files(folder: Path, split: str | None) -> list[Path]:
    """The Parquet files of a Hugging Face copy in order, of one split when named."""
    found = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    kept = [path for path in found if split is None or path.name.split("-")[0] == split]
    kept = kept or [path for path in found if split is not None and split in path.parent.parts[-1:]]
    if not kept:
        names = sorted({path.name.split("-")[0] for path in found})
        has = f"has {', '.join(names)}" if names else "holds no Parquet file"
        raise SampleError(f"{folder}: no split {split!r}: it {has}")
    return kept


def parquet_rows(path: Path, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a Parquet file, a few rows in memory at a time.

    Errors: SampleError for a damaged file or a missing column, UsageError without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"{path} needs pyarrow: install it with pip install 'medmo-edge[data]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise SampleError(f"{path}: column {missing[0]!r} is missing: has {names}")
            for batch in file.iter_batches(batch_size=32):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise SampleError(f"{path} cannot be read as Parquet: {one_line(error)}") from error


def embedded(value: Any, name: str, where: str) -> Embedded:
    """The picture in a Parquet cell: bytes, or Hugging Face's ``{"bytes", "path"}``.

    ``name`` is used without ending, which follows from the bytes.
    """
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes) or not data:
        raise SampleError(f"{where}: the picture is not in the file")
    ending = next((end for mark, end in _MAGIC.items() if data.startswith(mark)), ".img")
    return Embedded(f"{name}{ending}", data)


class Pictures:
    """The picture files below a folder, found by the names that annotations use for them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Every picture under its lower-case name and its lower-case stem."""
        found: dict[str, list[Path]] = {}
        seen: set[str] = set()
        for folder, below, names in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back up
                below.clear()
                continue
            seen.add(real)
            for name in names:
                if name.lower().endswith(PICTURE_ENDINGS):
                    for key in {name.lower(), Path(name).stem.lower()}:
                        found.setdefault(key, []).append(Path(folder) / name)
        return found

    def find(self, name: str, where: str, near: tuple[str, ...] = ()) -> Path:
        """The file that ``name`` means: as a path below the root, else its one namesake.

        Letter case, backslashes and the ending may differ. Of several namesakes those in a folder
        named in ``near`` count. Errors: SampleError when there is none or there are several.
        """
        wanted = name.strip().replace("\\", "/")
        direct = self.root / wanted.lstrip("/")
        if wanted and ".." not in direct.parts[len(self.root.parts) :] and direct.is_file():
            return direct
        last = wanted.rpartition("/")[2].lower()
        stem = Path(last).stem if last.endswith(PICTURE_ENDINGS) else last
        matches = self._files.get(last) or self._files.get(stem, [])
        for narrower in (
            [path for path in matches if path.as_posix().lower().endswith(wanted.lower())],
            [path for path in matches if not set(near).isdisjoint(path.parts)],
        ):
            matches = narrower if len(matches) > 1 and narrower else matches
        if len(matches) == 1:
            return matches[0]
        problem = f"fits {len(matches)} files" if matches else "is missing"
        raise SampleError(f"{where}: picture {name!r} {problem} below {self.root}")


def existing(folder: Path, *names: str) -> Path:
    """The first of ``names`` that exists in ``folder``. Errors: SampleError naming all."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise SampleError(f"{folder} has no {' or '.join(names)}: is it a folder of this format?")


def text_cell(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text or number under ``key`` as a text that is not empty."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SampleError(f"{where}: {key!r} is missing")
    text = str(value).strip()
    if not text:
        raise SampleError(f"{where}: {key!r} is empty")
    return text


def four_numbers(values: Any, where: str) -> tuple[float, float, float, float]:
    """Four numbers of a list or of a text with commas. Errors: SampleError."""
    parts = values.split(",") if isinstance(values, str) else values
    try:
        a, b, c, d = (float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise SampleError(f"{where}: {values!r} is not four numbers") from error
    return a, b, c, d


def picture_or_embedded(
    row: Mapping[str, Any], key: str, name: str, pictures: Pictures, where: str
) -> Picture:
    """The cell's own picture, or the file that it names."""
    value = row.get(key)
    if isinstance(value, str):
        return pictures.find(value, where)
    return embedded(value, name, where)
