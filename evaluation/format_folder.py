"""Plain folders: every picture with the text file of the same name beside it is a caption.

Nothing else is read from names or folders; a text without a picture is ignored.
"""

from collections.abc import Iterator
from pathlib import Path

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import PICTURE_ENDINGS, read_text
from medmo_edge.evaluation.items import Item, OnBroken, each, picture_size, refuse
from medmo_edge.prompts import TASK_PROMPTS


def read_folder(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``caption`` item per picture below ``source``; ``split`` is a folder in ``source``.

    Errors: SampleError, also for a picture without text.
    """
    folder = source if split is None else source / split
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS)
    if not found:
        raise SampleError(f"{folder} holds no picture")
    return each(found, lambda path: _read(path, source), broken)


def _read(path: Path, source: Path) -> Item:
    notes = path.with_suffix(".txt")
    if not notes.is_file():
        raise SampleError(f"{path} has no text: {notes.name} is missing")
    text = read_text(notes).strip()
    if not text:
        raise SampleError(f"{notes} is empty")
    picture_size(path, str(path))
    return Item(
        id=path.relative_to(source).as_posix(),
        task="caption",
        question=TASK_PROMPTS["caption"],
        where=str(path),
        images=(path,),
        target=text,
    )
