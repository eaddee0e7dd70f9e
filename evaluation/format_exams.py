"""Text exams as their publishers store them: MMLU, PubMedQA, MedMCQA, MedQA, Medbullets and others.

JSON, JSONL, CSV and Parquet, in the original form, the Hugging Face copy, and the one-line form of
MedXpertQA's repository ("... Answer Choices: (A) ... (B) ..."). Which rows count is decided here
(medical subjects, official test ids); how they are asked is not.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.item_sources import (
    Pictures,
    csv_rows,
    json_rows,
    parquet_rows,
    read_json,
    read_text,
    text_cell,
)
from medmo_edge.evaluation.items import LETTERS, Item, OnBroken, Picture, each, picture_size, refuse

MMLU_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
    "nutrition",
    "virology",
    "high_school_biology",
)
_INLINE = "\nAnswer Choices: "
_LISTED = ("opa", "opb", "opc", "opd", "ope")
_META = ("subject", "subject_name", "field", "difficulty", "question_type", "medical_task")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """Where one exam's rows are: glob patterns in order of preference, and which rows are kept.

    ``first_answer``: the number of the first option in a JSON file whose answers are numbers; None
    when the rows themselves tell (a 0 means 0).
    """

    name: str
    files: tuple[str, ...]
    only: tuple[str, tuple[str, ...]] | None = None
    pictures: bool = False
    first_answer: int | None = 0


MMLU = Exam(
    name="mmlu-med",
    files=(
        "mmlu_medical*.jsonl",
        "mmlu*.jsonl",
        "*/test-*.parquet",
        "test-*.parquet",
        "test/*_test.csv",
        "*_test.csv",
    ),
    only=("subject", MMLU_SUBJECTS),
)
MEDMCQA = Exam(
    name="medmcqa",
    files=(
        "medmcqa*.jsonl",
        "*/validation-*.parquet",
        "validation-*.parquet",
        "dev.json",
        "dev.jsonl",
        "validation.jsonl",
    ),
    first_answer=None,
)
MEDQA = Exam(
    name="medqa",
    files=("phrases_no_exclude_test.jsonl", "*/test-*.parquet", "test-*.parquet", "test.jsonl"),
)
MEDBULLETS_4 = Exam(
    name="medbullets-op4", files=("*op4*.jsonl", "*op4*.csv", "*/train-*.parquet", "*op4*.parquet")
)
MEDBULLETS_5 = Exam(
    name="medbullets-op5", files=("*op5*.jsonl", "*op5*.csv", "*/train-*.parquet", "*op5*.parquet")
)
MEDXPERT_TEXT = Exam(
    name="medxpertqa-text",
    files=("Text/test.jsonl", "Text/test-*.parquet", "medxpertqa_text*.jsonl"),
)
MEDXPERT_MM = Exam(
    name="medxpertqa-mm",
    files=("MM/test.jsonl", "MM/test-*.parquet", "medxpertqa_mm*.jsonl"),
    pictures=True,
)
SUPERGPQA = Exam(
    name="supergpqa-medicine",
    files=("SuperGPQA-all.jsonl", "*SuperGPQA*.jsonl", "*/train-*.parquet", "train-*.parquet"),
    only=("discipline", ("Medicine",)),
)


def read_exam(exam: Exam, source: Path, broken: OnBroken = refuse) -> Iterator[Item]:
    """One ``text_qa`` item per question of a folder or file: bare options, the answer a letter.

    Errors: SampleError for a folder without the exam, and for rows that lack a question, options or
    an answer among them.
    """
    paths = _documents(exam, source)
    pictures = Pictures(source if source.is_dir() else source.parent) if exam.pictures else None
    rows = [entry for path in paths for entry in _rows(path, exam)]
    first = _first_answer(exam, rows)
    numbered = enumerate(rows, start=1)
    return each(numbered, lambda entry: _read(exam, pictures, first, *entry), broken)


def _documents(exam: Exam, source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    for pattern in exam.files:
        found = sorted(source.glob(pattern))
        if found:
            return found
    raise SampleError(f"{source} holds no {exam.name}: looked for {', '.join(exam.files)}")


def _rows(path: Path, exam: Exam) -> Iterator[tuple[str, Row]]:
    if path.suffix == ".parquet":
        rows: Iterable[tuple[str, Row]] = parquet_rows(path, ())
    elif path.suffix == ".csv" and path.name.endswith("_test.csv"):
        rows = _mmlu_csv(path)
    elif path.suffix == ".csv":
        rows = csv_rows(path, ("question",))
    elif path.suffix == ".json":
        rows = _json_lines(path)
    else:
        rows = json_rows(path)
    for where, row in rows:
        if exam.only is None or row.get(exam.only[0]) in exam.only[1]:
            yield where, row


def _mmlu_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """The original MMLU files: question, four options and the letter, without a header."""
    subject = path.name.removesuffix("_test.csv")
    for number, cells in enumerate(csv.reader(io.StringIO(read_text(path))), start=1):
        if len(cells) != 6:
            raise SampleError(f"{path}:{number}: {len(cells)} cells, MMLU has 6")
        yield (
            f"{path}:{number}",
            {
                "question": cells[0],
                "choices": cells[1:5],
                "answer": cells[5],
                "subject": subject,
            },
        )


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """MedMCQA's dev.json holds one object a line despite its name."""
    try:
        yield from json_rows(path)
    except SampleError:
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:
                    raise SampleError(f"{path}:{number}: not JSON ({error})") from error


def _first_answer(exam: Exam, rows: Sequence[tuple[str, Row]]) -> int:
    """Whether numbers count from 0 (Hugging Face) or from 1 (MedMCQA's own file)."""
    numbers = {row["cop"] for _, row in rows if isinstance(row.get("cop"), int)}
    if exam.first_answer is not None or not numbers or 0 in numbers:
        return exam.first_answer or 0
    if 4 in numbers:
        return 1
    raise SampleError(f"{rows[0][0]}: do the answers {sorted(numbers)} count from 0 or from 1?")


def _read(
    exam: Exam,
    pictures: Pictures | None,
    first: int,
    number: int,
    entry: tuple[str, Row],
) -> Item:
    where, row = entry
    question, choices = _question(row, where)
    images: tuple[Picture, ...] = ()
    if pictures is not None:
        images = tuple(pictures.find(str(name), where) for name in row.get("images") or ())
        for picture in images:
            picture_size(picture, where)
    return Item(
        id=f"{exam.name}/{row.get('id') or number}",
        task="vqa" if images else "text_qa",
        question=question,
        where=where,
        images=images,
        choices=choices,
        answer=_letter(row, choices, first, where),
        meta={key: str(row[key]) for key in _META if row.get(key)},
    )


def _question(row: Row, where: str) -> tuple[str, tuple[str, ...]]:
    """The question without its options, and the options without their letters."""
    text = text_cell(row, "question", where)
    stem, mark, inline = text.partition(_INLINE)
    options = row.get("options", row.get("choices"))
    if isinstance(options, Mapping):
        options = [value for _, value in sorted(options.items()) if value is not None]
    if options is None and "opa" in row:
        options = [row[key] for key in _LISTED if row.get(key) is not None]
    if options is None and mark:
        options = _inline_options(inline)
    if not isinstance(options, list) or len(options) < 2:
        raise SampleError(f"{where}: no options: they are in options, choices or opa ...")
    if options and isinstance(options[0], Mapping):
        options = [each.get("content", each.get("text")) for each in options]
    return stem if mark else text, tuple(str(option).strip() for option in options)


def _inline_options(text: str) -> list[str]:
    """ "(A) one (B) two" as its texts; a letter in brackets inside an option is left alone."""
    found: list[str] = []
    rest = text
    for letter, following in zip(LETTERS, LETTERS[1:], strict=False):
        if not rest.startswith(f"({letter}) "):
            break
        option, mark, tail = rest.removeprefix(f"({letter}) ").partition(f" ({following}) ")
        found.append(option)
        rest = f"({following}) {tail}" if mark else ""
    return found


def _letter(row: Row, choices: Sequence[str], first: int, where: str) -> str:
    """The gold letter, from whichever column this publisher uses."""
    keys = ("answer_idx", "answer_letter", "label", "cop", "answer")
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, int) and not isinstance(value, bool):
        value = value - first
        value = LETTERS[value] if 0 <= value < len(LETTERS) else value
    if isinstance(value, str):
        value = value.strip().strip("().")
        if value.upper() in LETTERS[: len(choices)] and value:
            return value.upper()
        if value in choices:
            return LETTERS[choices.index(value)]
    raise SampleError(f"{where}: gold answer {value!r} is missing or not one of the options")


_PQAL, _TEST = ("ori_pqal.json", "pubmedqa_ori_pqal.json"), ("test_ground_truth.json",)
_DECISIONS = ("yes", "no", "maybe")


def read_pubmedqa(source: Path, broken: OnBroken = refuse) -> Iterator[Item]:
    """PubMedQA's 500 test questions; ``meta["context"]`` is the abstract without its conclusion.

    Reads ori_pqal.json with the official test ids beside it, or the Hugging Face copy. Errors:
    SampleError, also when the labels of the two files differ.
    """
    folder = source if source.is_dir() else source.parent
    found = [path for name in _PQAL for path in sorted(folder.glob(f"*{name}"))]
    if not found:
        yield from _pubmedqa_copy(source, broken)
        return
    tests = [path for name in _TEST for path in sorted(folder.glob(f"*{name}"))]
    if not tests:
        raise SampleError(f"{folder} has no test_ground_truth.json: it names the 500 test items")
    rows, gold = read_json(found[0]), read_json(tests[0])
    if not isinstance(rows, dict) or not isinstance(gold, dict):
        raise SampleError(f"{found[0]}: expected an object with one entry per PMID")

    def read(entry: tuple[str, Any]) -> Item:
        name, label = entry
        return _pubmedqa(f"{found[0]}, PMID {name}", name, rows.get(name), label)

    yield from each(gold.items(), read, broken)


def _pubmedqa(where: str, name: str, row: Any, label: Any) -> Item:
    if not isinstance(row, dict):
        raise SampleError(f"{where} is missing")
    if row.get("final_decision") not in (None, label) or label not in _DECISIONS:
        raise SampleError(f"{where}: labels {row.get('final_decision')!r} and {label!r} differ")
    return Item(
        id=f"pubmedqa/{name}",
        task="text_qa",
        question=text_cell(row, "QUESTION", where),
        where=where,
        choices=_DECISIONS,
        answer=LETTERS[_DECISIONS.index(label)],
        meta={"context": "\n".join(row.get("CONTEXTS") or [])},
    )


def _pubmedqa_copy(source: Path, broken: OnBroken) -> Iterator[Item]:
    patterns = ("*/test-*.parquet", "test-*.parquet", "test.json", "test.jsonl")
    exam = Exam(name="pubmedqa", files=patterns)
    for path in _documents(exam, source):
        yield from each(_rows(path, exam), lambda entry: _pubmedqa_row(*entry), broken)


def _pubmedqa_row(where: str, row: Row) -> Item:
    data = row.get("data")
    if not isinstance(data, dict):
        raise SampleError(f"{where}: 'data' is missing: is this openlifescienceai/pubmedqa?")
    choices = tuple(str(value) for _, value in sorted((data.get("Options") or {}).items()))
    return Item(
        id=f"pubmedqa/{row.get('id') or where.rpartition(' ')[2]}",
        task="text_qa",
        question=text_cell(data, "Question", where),
        where=where,
        choices=choices,
        answer=_letter({"answer": data.get("Correct Option")}, choices, 0, where),
        meta={"context": "\n".join(map(str, data.get("Context") or []))},
    )
