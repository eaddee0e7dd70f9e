"""Indiana University chest X-rays (Open-i): one XML report per study, or MedEvalKit's JSON of them.

``XXXX`` in the reports is what de-identification left; it stays. Reports without picture or without
both findings and impression are broken: they cannot teach or be scored.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import Pictures, json_rows, text_cell
from medmo_edge.evaluation.items import Item, OnBroken, each, picture_size, refuse
from medmo_edge.prompts import TASK_PROMPTS


def read_iu_xray(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``report`` item per study of a folder with XML files (and pictures) or a JSON file.

    ``split``: ``SPLIT.json`` (MedEvalKit's, with id, image, findings, impression); the XML files
    are not split. The study is the item's group. Errors: SampleError.
    """
    folder = source.parent if source.is_file() else source
    pictures = Pictures(folder)
    path = source if source.suffix == ".json" else folder / f"{split}.json"
    if path.is_file():
        return each(json_rows(path), lambda entry: _from_json(*entry, pictures), broken)
    if split is not None:
        raise SampleError(f"{folder} has no {split}.json: the XML reports have no split")
    found = [source] if source.is_file() else _reports(folder)
    return each(found, lambda report: _from_xml(report, pictures), broken)


def _reports(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.xml"), key=lambda path: (len(path.name), path.name))
    if not found:
        raise SampleError(f"{folder} holds no .xml report: is it an IU-Xray folder?")
    return found


def _from_xml(path: Path, pictures: Pictures) -> Item:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise SampleError(f"{path} is not XML: {error}") from error
    sections = {
        str(node.get("Label", "")).upper(): " ".join("".join(node.itertext()).split())
        for node in root.iter("AbstractText")
    }
    study = root.find("uId")
    name = (study.get("id") if study is not None else None) or path.stem
    names = [str(node.get("id", "")) for node in root.iter("parentImage")]
    item = _item(name, sections, names, pictures, str(path))
    tags = [node.text for node in root.iterfind("MeSH/major") if node.text]
    item.meta.update({"mesh": tags, "indication": sections.get("INDICATION", "")})
    return item


def _from_json(where: str, row: dict[str, Any], pictures: Pictures) -> Item:
    sections = {key.upper(): str(row.get(key) or "").strip() for key in ("findings", "impression")}
    images = row.get("image")
    names = [str(name) for name in (images if isinstance(images, list) else [images]) if name]
    return _item(text_cell(row, "id", where), sections, names, pictures, where)


def _item(
    name: str, sections: dict[str, str], names: Iterable[str], pictures: Pictures, where: str
) -> Item:
    images = tuple(pictures.find(each, where) for each in names)
    if not images:
        raise SampleError(f"{where}: the report names no picture")
    for picture in images:
        picture_size(picture, where)
    return Item(
        id=f"iu-xray/{name}",
        task="report",
        question=TASK_PROMPTS["report"],
        where=where,
        images=images,
        target=report_text(sections.get("FINDINGS", ""), sections.get("IMPRESSION", ""), where),
        group=f"iu-xray/{name}",
        meta={key.lower(): sections.get(key, "") for key in ("FINDINGS", "IMPRESSION")},
    )


def report_text(findings: str, impression: str, where: str) -> str:
    """ "Findings: ... Impression: ...", the form MedMO was scored on, without an empty half.

    Errors: SampleError when both are empty.
    """
    halves = (("Findings", findings.strip()), ("Impression", impression.strip()))
    text = " ".join(f"{name}: {half}" for name, half in halves if half)
    if not text:
        raise SampleError(f"{where}: neither findings nor impression")
    return text
