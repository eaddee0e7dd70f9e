"""Every benchmark on a tiny folder in its publisher's form, and on the real ones that are here."""

import json
from pathlib import Path

import pytest
from benchmark_folders import FOLDERS, medmcqa_original, mmlu_csv, pubmedqa_copy, voc

from medmo_edge.boxes import Box, Geometry
from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.benchmarks import BENCHMARKS, held_out
from medmo_edge.evaluation.case_scores import RULES, Said, score_case, union_iou
from medmo_edge.evaluation.cases import Case, convert_boxes, load_frame
from medmo_edge.evaluation.questions import load_questions

pytest.importorskip("pyarrow", reason="Parquet copies need the data extra")


def _square(side: int = 100) -> Geometry:
    return Geometry(
        width=side,
        height=side,
        frame_width=side,
        frame_height=side,
        resized_width=2 * side,
        resized_height=2 * side,
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_the_publishers_form(name: str, tmp_path: Path) -> None:
    write, items, questions, gold = FOLDERS[name]
    write(tmp_path)
    found = load_questions(name, tmp_path)
    assert (found.num_items, len(found.cases)) == (items, questions)
    first = found.cases[0]
    assert first.gold == gold
    assert first.rule in RULES and first.question.strip()
    for case in found.cases:
        assert [load_frame(picture).pixels.ndim for picture in case.images] == [3] * len(
            case.images
        )


def test_every_benchmark_has_a_fixture() -> None:
    """Those without need none here: they are asked whole elsewhere."""
    assert set(BENCHMARKS) - set(FOLDERS) == {"bccd", "phantoms", "samples"}


def test_published_words(tmp_path: Path) -> None:
    """Spelt out from MedEvalKit 9b12e3b, blanks and line ends included."""
    texts = {}
    for name in ("pubmedqa", "medqa", "mmmu-med", "vqa-rad", "slake", "mimic-cxr", "medxpertqa-mm"):
        FOLDERS[name][0](tmp_path / name)
        texts[name] = [case.question for case in load_questions(name, tmp_path / name).cases]
    assert texts["pubmedqa"][0] == (
        "Context: One.\nTwo.\n\nQuestion: Does it help?\nOptions: \nA.yes\nB.no\nC.maybe\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert texts["medqa"][0] == (
        "\nQuestion: Which drug?\nOptions: \nA. w\nB. x\nC. y\nD. z\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert texts["mmmu-med"][0] == (
        "\nWhat does <image 1> show?\n\n(A) heart\n(B) lung\n(C) the patient's liver\n\n\n        "
        "Answer with the option's letter from the given choices directly."
    )
    assert texts["mmmu-med"][1].endswith(
        "\n\n        Answer the question using a single word or phrase."
    )
    assert texts["vqa-rad"] == [
        "Is there an effusion?\nPlease output 'yes' or 'no'(no extra output).",
        "Which organ?\nPlease answer the question concisely.",
    ]
    assert texts["slake"][0].endswith("\nAnswer the question using a single word or phrase.")
    assert texts["mimic-cxr"][0].startswith(
        "\n        You are a helpful assistant. Please generate"
    )


def test_several_images_are_numbered_in_words(tmp_path: Path) -> None:
    FOLDERS["medxpertqa-mm"][0](tmp_path)
    (case,) = load_questions("medxpertqa-mm", tmp_path).cases
    assert case.image_texts == ("<image_1>: ", "<image_2>: ")
    assert len(case.images) == 2
    FOLDERS["chexpert-plus"][0](tmp_path / "chexpert")
    (single,) = load_questions("chexpert-plus", tmp_path / "chexpert").cases
    assert single.image_texts == ()  # one image, not a list of one
    (listed,) = load_questions("mimic-cxr", tmp_path / "chexpert").cases
    assert listed.image_texts == ("<image_1>: ",)


def test_mmmu_items_with_pictures_as_options_show_none(tmp_path: Path) -> None:
    FOLDERS["mmmu-med"][0](tmp_path)
    cases = {case.id: case for case in load_questions("mmmu-med", tmp_path).cases}
    assert cases["mmmu-med/v3"].images == ()
    assert cases["mmmu-med/v2"].rule == "mmmu_open" and len(cases["mmmu-med/v2"].images) == 1


def test_other_forms_of_the_same_exam(tmp_path: Path) -> None:
    for name, write, gold in (
        ("mmlu-med", mmlu_csv, "D"),
        ("pubmedqa", pubmedqa_copy, "C"),
        ("medmcqa", medmcqa_original, "A"),
    ):
        write(tmp_path / name)
        assert load_questions(name, tmp_path / name).cases[0].gold == gold


def test_answers_that_may_count_from_zero_or_one_are_not_guessed(tmp_path: Path) -> None:
    row = {"question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SampleError, match="count from 0 or from 1"):
        load_questions("medmcqa", tmp_path)


def test_missing_gold_is_named(tmp_path: Path) -> None:
    row = {"question": "Which?", "options": {"A": "w", "B": "x"}, "answer_idx": None}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SampleError, match="test.jsonl:1: gold answer None is missing"):
        load_questions("medqa", tmp_path)


def test_missing_pictures_are_counted_and_named(tmp_path: Path) -> None:
    voc(tmp_path)
    note = (tmp_path / "Annotations" / "a.xml").read_text()
    for name in ("b", "c"):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(note)
    with pytest.raises(SampleError, match="voc: 2 pictures are missing of 3 items: .*'b'.*'c'"):
        load_questions("voc", tmp_path)
    found = load_questions("voc", tmp_path, skip_broken=True)
    assert found.num_items == 1 and len(found.broken) == 2


def test_an_empty_split_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(SampleError, match="bccd: .* holds no item of this benchmark"):
        load_questions("bccd", tmp_path)
    with pytest.raises(UsageError, match="benchmark 'bcdc' is unknown: use one of"):
        load_questions("bcdc", tmp_path)
    with pytest.raises(UsageError, match="bccd needs --data"):
        load_questions("bccd", None)
    with pytest.raises(SampleError, match="does not exist"):
        load_questions("bccd", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "items", "majority", "baseline"),
    [
        ("pubmedqa", 500, "A", 0.552),
        ("mmlu-med", 1089, "D", 352 / 1089),
        ("medmcqa", 4183, "A", 1348 / 4183),
    ],
)
def test_real_exams_whole(
    name: str, items: int, majority: str, baseline: float, data_dir: Path
) -> None:
    cases = load_questions(name, data_dir).cases
    assert len(cases) == items
    right = [score_case(case, Said(majority)).value for case in cases]
    assert sum(value or 0 for value in right) / items == pytest.approx(baseline)


def test_real_pictures_whole(data_dir: Path) -> None:
    smears = load_questions("bccd", data_dir)
    assert smears.num_items == 87
    assert sum(case.rule == "boxes" for case in smears.cases) == 3 * 87
    questions = load_questions("vqa-rad", data_dir)
    assert 400 < questions.num_items < 800
    assert all(held_out(case.images[0].name) for case in questions.cases)


def _boxes_case(*boxes: Box) -> Case:
    return Case(id="x", sample="x", question="", rule="boxes", boxes=boxes)


def test_boxes_by_hand() -> None:
    """Truth: two boxes; the answer has one of them exactly and one elsewhere."""
    case = _boxes_case(Box("a", 0, 0, 50, 100), Box("a", 50, 0, 100, 50))
    score = score_case(
        case, Said("a <box>[[0, 0, 500, 1000], [900, 900, 1000, 1000]]</box>", (_square(),))
    )
    assert score.value == pytest.approx(0.5)
    assert (score.parts["hits"], score.parts["said_boxes"], score.parts["truth_boxes"]) == (1, 2, 2)
    # covered: 5000 + 2500 of truth, 5000 + 100 of the answer, 5000 together
    assert score.parts["union_iou"] == pytest.approx(5000 / 7600, abs=0.01)
    assert score.read


def test_nothing_to_find_has_no_iou_but_counts_boxes() -> None:
    score = score_case(_boxes_case(), Said("a <box>[[0, 0, 500, 1000]]</box>", (_square(),)))
    assert score.value is None and score.parts["said_boxes"] == 1
    quiet = score_case(_boxes_case(), Said("No nodule found.", (_square(),)))
    assert quiet.read and quiet.parts["said_boxes"] == 0


def test_the_first_box_counts_in_medsg() -> None:
    case = Case(
        id="x",
        sample="x",
        question="",
        rule="first_box",
        boxes=(Box("target", 0, 0, 50, 100, 1),),
    )
    said = "<box>[[0, 0, 500, 500], [0, 0, 500, 1000]]</box>"
    score = score_case(case, Said(said, (_square(50), _square(100))))
    assert score.value == pytest.approx(0.5)
    assert score.parts["share_at_0.5"] == 1 and score.parts["share_at_0.7"] == 0
    assert not score_case(case, Said("in the second image", (_square(), _square()))).read


def test_union_of_overlapping_boxes() -> None:
    truth = [Box("a", 0, 0, 60, 100), Box("a", 40, 0, 100, 100)]
    assert union_iou(truth, [Box("a", 0, 0, 100, 100)], [_square()]) == 1


def test_boxes_in_a_question_follow_the_convention() -> None:
    text = "See <|box_start|>(10,20),(50,60)<|box_end|> and [10, 20, 50, 60]."
    expected = "<box>[[100, 200, 500, 600]]</box>"
    assert convert_boxes(text, _square(), "norm1000") == f"See {expected} and {expected}."
    assert "[[20, 40, 100, 120]]" in convert_boxes(text, _square(), "pixel_resized")
