"""The table of benchmarks: what each reads, how it asks, how it is scored, how many items it has.

One row per name. Reading is in the format modules, words in ``cases``, verdicts in ``answer_rules``
and ``case_scores``. Nothing is downloaded: ``--data`` names the publisher's folder, or one that
holds it under one of the row's ``folders``.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medmo_edge.evaluation import format_exams as exams
from medmo_edge.evaluation.cases import (
    REPORT_INDENTED,
    Case,
    ask_caption,
    ask_choice,
    ask_locate,
    ask_medsg,
    ask_mmmu,
    ask_report,
    ask_slake,
    ask_vqa,
)
from medmo_edge.evaluation.format_mmmu import read_mmmu, read_omnimedvqa
from medmo_edge.evaluation.format_reports import read_reports
from medmo_edge.evaluation.formats import read_items
from medmo_edge.evaluation.items import Item, OnBroken
from medmo_edge.evaluation.nano_cases import bccd_cases, phantom_cases, phantom_items
from medmo_edge.evaluation.sample_cases import read_sample_items, sample_cases

Read = Callable[[Path, OnBroken], Iterable[Item]]
Ask = Callable[[Item], Iterator[Case]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One row. ``metric`` is the headline figure: accuracy, mean_iou or rouge_l.

    ``num_items``: how many the publisher's split has, None where that was not counted;
    ``group_keys``: meta entries that the figures are broken down by; ``needs_data`` is False for
    what is drawn on the spot.
    """

    name: str
    metric: str
    describe: str
    read: Read
    ask: Ask
    folders: tuple[str, ...] = ()
    num_items: int | None = None
    group_keys: tuple[str, ...] = ()
    needs_data: bool = True


def _format(name: str, split: str | None = None) -> Read:
    return lambda folder, broken: read_items(name, folder, split=split, broken=broken)


def _vqa_rad(folder: Path, broken: OnBroken) -> Iterable[Item]:
    """The test split; a folder without one is split by picture, a fifth of them held out."""
    files = [*folder.rglob("*.parquet"), *folder.glob("test.json")]
    if files or not folder.is_dir():
        return read_items("vqa-rad", folder, split="test", broken=broken)
    items = list(read_items("vqa-rad", folder, broken=broken))
    tests = [
        item for item in read_items("vqa-rad", folder, split="test", broken=lambda error: None)
    ]
    return tests or [item for item in items if held_out(item.images[0].name)]


def held_out(picture: str) -> bool:
    """Whether our own split tests on this picture: one in five, by the hash of its name."""
    return hashlib.sha256(picture.encode()).digest()[0] % 5 == 0


def _exam(exam: exams.Exam) -> Read:
    return lambda folder, broken: exams.read_exam(exam, folder, broken)


def _medsg_task(number: int, task: str) -> Read:
    """One task: its own file, else its rows of the Parquet copy."""

    def read(folder: Path, broken: OnBroken) -> Iterable[Item]:
        if (folder / f"Task{number}.json").is_file():
            return read_items("medsg", folder, split=f"Task{number}", broken=broken)
        items = read_items("medsg", folder, broken=broken)
        return (item for item in items if _same(item.meta.get("task"), task, number))

    return read


def _same(found: object, task: str, number: int) -> bool:
    text = str(found).lower().replace("-", "_").replace(" ", "_")
    return text in (task, f"task{number}", str(number))


MEDSG_TASKS = (
    "registered_diff",
    "non_registered_diff",
    "multi_view",
    "object_tracking",
    "concept",
    "patch",
    "crossmodal",
    "referring",
)

_ROWS = (
    # Questions about images
    Benchmark(
        name="mmmu-med",
        metric="accuracy",
        describe="MMMU, five medical subjects, validation (Parquet)",
        read=read_mmmu,
        ask=ask_mmmu,
        num_items=150,
        group_keys=("subject",),
    ),
    Benchmark(
        name="vqa-rad",
        metric="accuracy",
        describe="VQA-RAD, test; the training file alone is split by picture",
        read=_vqa_rad,
        ask=ask_vqa,
        folders=("vqa-rad",),
        num_items=451,
        group_keys=("organ",),
    ),
    Benchmark(
        name="slake",
        metric="accuracy",
        describe="SLAKE, test.json and imgs/, English and Chinese",
        read=_format("slake", "test"),
        ask=ask_slake,
        num_items=2094,
        group_keys=("language", "modality"),
    ),
    Benchmark(
        name="path-vqa",
        metric="accuracy",
        describe="PathVQA, test (Parquet)",
        read=_format("path-vqa", "test"),
        ask=ask_vqa,
        num_items=6719,
    ),
    Benchmark(
        name="pmc-vqa",
        metric="accuracy",
        describe="PMC-VQA, test_2.csv and figures/",
        read=_format("pmc-vqa", "test"),
        ask=partial(ask_choice, form="{}: {}"),
    ),
    Benchmark(
        name="omnimedvqa",
        metric="accuracy",
        describe="OmniMedVQA, QA_information/Open-access and Images/",
        read=read_omnimedvqa,
        ask=ask_choice,
        num_items=88996,
        group_keys=("modality", "question_type"),
    ),
    Benchmark(
        name="medxpertqa-mm",
        metric="accuracy",
        describe="MedXpertQA MM, test, with images/",
        read=_exam(exams.MEDXPERT_MM),
        ask=partial(ask_choice, listed=True),
        num_items=2000,
        group_keys=("medical_task", "question_type"),
    ),
    # Questions without images
    Benchmark(
        name="mmlu-med",
        metric="accuracy",
        describe="MMLU, nine medical and biological subjects, test",
        read=_exam(exams.MMLU),
        ask=partial(ask_choice, form="{}.{}"),
        folders=("text-qa",),
        group_keys=("subject",),
    ),
    Benchmark(
        name="pubmedqa",
        metric="accuracy",
        describe="PubMedQA, the 500 labelled test questions",
        read=exams.read_pubmedqa,
        ask=partial(ask_choice, form="{}.{}"),
        folders=("text-qa",),
        num_items=500,
    ),
    Benchmark(
        name="medmcqa",
        metric="accuracy",
        describe="MedMCQA, validation",
        read=_exam(exams.MEDMCQA),
        ask=ask_choice,
        folders=("text-qa",),
        num_items=4183,
        group_keys=("subject_name",),
    ),
    Benchmark(
        name="medqa",
        metric="accuracy",
        describe="MedQA-USMLE, four options, test",
        read=_exam(exams.MEDQA),
        ask=ask_choice,
        num_items=1273,
    ),
    Benchmark(
        name="medbullets-op4",
        metric="accuracy",
        describe="Medbullets, four options",
        read=_exam(exams.MEDBULLETS_4),
        ask=partial(ask_choice, form="{}.{}"),
        num_items=308,
    ),
    Benchmark(
        name="medbullets-op5",
        metric="accuracy",
        describe="Medbullets, five options",
        read=_exam(exams.MEDBULLETS_5),
        ask=partial(ask_choice, form="{}.{}"),
        num_items=308,
    ),
    Benchmark(
        name="medxpertqa-text",
        metric="accuracy",
        describe="MedXpertQA Text, test",
        read=_exam(exams.MEDXPERT_TEXT),
        ask=ask_choice,
        num_items=2450,
        group_keys=("medical_task", "question_type"),
    ),
    Benchmark(
        name="supergpqa-medicine",
        metric="accuracy",
        describe="SuperGPQA, discipline Medicine",
        read=_exam(exams.SUPERGPQA),
        ask=partial(ask_choice, form="{}.{}"),
        group_keys=("field", "difficulty"),
    ),
    # Reports and captions
    Benchmark(
        name="mimic-cxr",
        metric="rouge_l",
        describe="MIMIC-CXR, test.json and images/ in MedEvalKit's layout",
        read=lambda folder, broken: read_reports("mimic-cxr", folder, broken),
        ask=partial(ask_report, prompt=REPORT_INDENTED),
    ),
    Benchmark(
        name="chexpert-plus",
        metric="rouge_l",
        describe="CheXpert Plus, test.json and images/ in MedEvalKit's layout",
        read=lambda folder, broken: read_reports("chexpert-plus", folder, broken),
        ask=partial(ask_report, listed=False),
    ),
    Benchmark(
        name="iu-xray",
        metric="rouge_l",
        describe="IU-Xray, MedEvalKit's test.json with images, or the XML reports",
        read=lambda folder, broken: read_items(
            "iu-xray",
            folder,
            split="test" if (folder / "test.json").is_file() else None,
            broken=broken,
        ),
        ask=ask_report,
        num_items=296,
    ),
    Benchmark(
        name="medtrinity",
        metric="rouge_l",
        describe="MedTrinity-25M captions (Parquet)",
        read=_format("medtrinity"),
        ask=ask_caption,
    ),
    # Boxes
    *(
        Benchmark(
            name=f"medsg-{task.replace('_', '-')}",
            metric="mean_iou",
            describe=f"MedSG-Bench, Task{number}.json or the Parquet copy: first-box rule",
            read=_medsg_task(number, task),
            ask=ask_medsg,
            num_items=1482 if task == "referring" else None,
        )
        for number, task in enumerate(MEDSG_TASKS, start=1)
    ),
    Benchmark(
        name="medsg",
        metric="mean_iou",
        describe="MedSG-Bench, all eight tasks: first-box rule",
        read=_format("medsg"),
        ask=ask_medsg,
        num_items=9630,
        group_keys=("task",),
    ),
    Benchmark(
        name="nih",
        metric="mean_iou",
        describe="NIH ChestX-ray14, BBox_List_2017.csv and pictures",
        read=_format("nih"),
        ask=ask_locate,
        num_items=880,
    ),
    Benchmark(
        name="deeplesion",
        metric="mean_iou",
        describe="DeepLesion, DL_info.csv and 16-bit slices, test rows",
        read=_format("deeplesion", "test"),
        ask=ask_locate,
    ),
    *(
        Benchmark(
            name=name,
            metric="mean_iou",
            describe=f"any {name.upper()} folder, e.g. bacteria: one question per label",
            read=_format(name),
            ask=ask_locate,
        )
        for name in ("voc", "coco", "yolo")
    ),
    Benchmark(
        name="bccd",
        metric="mean_iou",
        describe="BCCD blood smears, val.txt: boxes, presence and counts",
        read=_format("voc", "val"),
        ask=bccd_cases,
        folders=("bccd",),
        num_items=87,
    ),
    Benchmark(
        name="phantoms",
        metric="mean_iou",
        describe="200 radiographs drawn on the spot: boxes and presence",
        read=lambda folder, broken: phantom_items(),
        ask=phantom_cases,
        num_items=200,
        needs_data=False,
    ),
    # One's own
    Benchmark(
        name="samples",
        metric="accuracy",
        describe="a JSONL file of samples: boxes, answers or reports",
        read=read_sample_items,
        ask=sample_cases,
    ),
)

#: name -> row, in the order of the documentation
BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in _ROWS}
