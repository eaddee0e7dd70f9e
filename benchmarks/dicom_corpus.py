"""Render every file of given folders as ``read_image`` does and say what happened.

Prints how many files render, how many are refused for which reason, and the slowest ones; with
``--contact-sheet`` also one picture of all rendered frames, to be looked at by a person. Without
folders it renders the test files that come with pydicom. It judges no picture by itself.

    python benchmarks/dicom_corpus.py [DIR...] [--pydicom] [--contact-sheet sheet.png]
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medmo_edge.errors import ImageError
from medmo_edge.images import Frame, read_image

TILE = 160
SHEET_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file: a thumbnail and its label, or the reason of the refusal."""

    path: Path
    seconds: float
    thumbnail: NDArray[np.uint8] | None
    label: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the survey and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", metavar="DIR", nargs="*", type=Path)
    parser.add_argument("--pydicom", action="store_true", help="add pydicom's own test files")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG")
    options = parser.parse_args(arguments)
    folders = list(options.folders)
    if options.pydicom or not folders:
        folders.append(pydicom_test_files())
    outcomes = [outcome for folder in folders for outcome in survey(folder)]
    print_tables(outcomes)
    if options.contact_sheet:
        draw_sheet(outcomes).save(options.contact_sheet)
        print(f"contact sheet: {options.contact_sheet}")


def pydicom_test_files() -> Path:
    """The folder of test files inside the installed pydicom."""
    import pydicom.data

    return Path(pydicom.data.__file__).parent


def survey(folder: Path) -> Iterator[Outcome]:
    """Read every file below ``folder`` that is not obviously something else than an image."""
    skipped = {".py", ".pyc", ".txt", ".json", ".md", ".dump"}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix.lower() not in skipped and path.name != "LICENSE":
            yield read_one(path)


def read_one(path: Path) -> Outcome:
    """Read the first frame of one file."""
    start = time.perf_counter()
    try:
        frame = read_image(path)
    except ImageError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return Outcome(path, time.perf_counter() - start, None, reason)
    return Outcome(path, time.perf_counter() - start, _thumbnail(frame), _label(frame))


def _label(frame: Frame) -> str:
    facts = frame.source.dicom or {}
    window = frame.source.window or {}
    return f"{facts.get('modality', '')} {facts.get('photometric', '')} {window.get('from', '')}"


def _thumbnail(frame: Frame) -> NDArray[np.uint8]:
    image = Image.fromarray(frame.pixels)
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def print_tables(outcomes: Sequence[Outcome]) -> None:
    """Print totals, refusals grouped by reason, and the slowest files."""
    rendered = [outcome for outcome in outcomes if outcome.thumbnail is not None]
    print(
        f"{len(outcomes)} files: {len(rendered)} rendered, {len(outcomes) - len(rendered)} refused"
    )
    groups: dict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.thumbnail is None:
            groups[re.sub(r"\d+", "N", outcome.label)].append(outcome.path.name)
    for reason, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        print(f"{len(names):5d}  {reason}\n       {shown}")
    milliseconds = sorted(1000 * outcome.seconds for outcome in outcomes)
    if milliseconds:
        print(f"median {milliseconds[len(milliseconds) // 2]:.0f} ms; slowest:")
    for outcome in sorted(outcomes, key=lambda one: -one.seconds)[:5]:
        print(f"{1000 * outcome.seconds:8.0f} ms  {outcome.path.name}")


def draw_sheet(outcomes: Sequence[Outcome]) -> Image.Image:
    """One picture of all rendered frames with their file names."""
    rendered = [outcome for outcome in outcomes if outcome.thumbnail is not None]
    rows = -(-len(rendered) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * (TILE + 4), max(1, rows) * (TILE + 28)), (60, 60, 90))
    draw = ImageDraw.Draw(sheet)
    for number, outcome in enumerate(rendered):
        left = number % SHEET_COLUMNS * (TILE + 4)
        top = number // SHEET_COLUMNS * (TILE + 28)
        sheet.paste(Image.fromarray(np.asarray(outcome.thumbnail)), (left, top))
        draw.text((left, top + TILE), outcome.path.name[:26], fill=(255, 255, 255))
        draw.text((left, top + TILE + 13), outcome.label[:26], fill=(180, 220, 180))
    return sheet


if __name__ == "__main__":
    main()
