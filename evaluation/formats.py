"""The table of publishers' formats that can be read as items.

One row per format; a reader is a function ``read(source, *, split=None, broken=refuse)`` that gives
items lazily. Pure benchmark sets (multiple-choice exams, report sets behind a licence) are not
here: the benchmarks read those.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.format_coco import read_coco
from medmo_edge.evaluation.format_deeplesion import read_deeplesion
from medmo_edge.evaluation.format_folder import read_folder
from medmo_edge.evaluation.format_iu_xray import read_iu_xray
from medmo_edge.evaluation.format_jsonl import read_jsonl
from medmo_edge.evaluation.format_medsg import read_medsg
from medmo_edge.evaluation.format_medtrinity import read_medtrinity
from medmo_edge.evaluation.format_nih import read_nih
from medmo_edge.evaluation.format_path_vqa import read_path_vqa
from medmo_edge.evaluation.format_pmc_vqa import read_pmc_vqa
from medmo_edge.evaluation.format_slake import read_slake
from medmo_edge.evaluation.format_voc import read_voc
from medmo_edge.evaluation.format_vqa_rad import read_vqa_rad
from medmo_edge.evaluation.format_yolo import read_yolo
from medmo_edge.evaluation.items import Embedded, Item, OnBroken, Picture, per_label, refuse

__all__ = ["FORMATS", "Embedded", "Format", "Item", "Picture", "per_label", "read_items"]


class Reader(Protocol):
    """Gives the items of a file or folder; broken ones go to ``broken``, which may raise."""

    def __call__(
        self, source: Path, *, split: str | None = None, broken: OnBroken = refuse
    ) -> Iterator[Item]:
        """Errors: SampleError."""


@dataclass(frozen=True, slots=True)
class Format:
    """A publisher's format: its name on the command line, its reader, what it reads."""

    name: str
    read: Reader
    describe: str


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("voc", read_voc, "Pascal VOC: XML per picture"),
        Format("coco", read_coco, "COCO detection JSON"),
        Format("yolo", read_yolo, "YOLO text files with data.yaml or classes.txt"),
        Format("nih", read_nih, "NIH ChestX-ray14, BBox_List_2017.csv"),
        Format("deeplesion", read_deeplesion, "DeepLesion, DL_info.csv and 16-bit slices"),
        Format("vqa-rad", read_vqa_rad, "VQA-RAD, JSON or Parquet"),
        Format("slake", read_slake, "SLAKE, JSON and imgs/"),
        Format("path-vqa", read_path_vqa, "PathVQA, Parquet"),
        Format("pmc-vqa", read_pmc_vqa, "PMC-VQA, CSV or Parquet and figures"),
        Format("medtrinity", read_medtrinity, "MedTrinity-25M, Parquet"),
        Format("medsg", read_medsg, "MedSG-Bench and MedSG-188K, JSON or Parquet"),
        Format("iu-xray", read_iu_xray, "IU-Xray, XML reports or MedEvalKit's JSON"),
        Format("folder", read_folder, "pictures, each with a text file of the same name"),
        Format("jsonl", read_jsonl, "our own sample files, to check or split them"),
    )
}


def read_items(
    name: str, source: str | Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """The items of ``source`` in format ``name``.

    Errors: UsageError for an unknown format, SampleError when ``source`` is missing, or for the
    first broken item unless ``broken`` takes it.
    """
    if name not in FORMATS:
        raise UsageError(f"format {name!r} is unknown: use one of {', '.join(FORMATS)}")
    if not Path(source).exists():
        raise SampleError(f"{source} does not exist: give the folder or file of the data set")
    return FORMATS[name].read(Path(source), split=split, broken=broken)
