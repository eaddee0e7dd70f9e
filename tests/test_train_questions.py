"""Questions and answers: true to the scene, in the box format, in words a user would type."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.boxes import Box, Geometry, iou, parse_boxes
from medmo_edge.train.questions import (
    EFFUSION,
    HEART,
    NODULE,
    PLATELET,
    RBC,
    TARGETS,
    WBC,
    Turn,
    described,
    located,
    sample_turns,
    yes_no,
)
from medmo_edge.train.scenes import Scene

GEOMETRY = Geometry(
    width=640,
    height=480,
    frame_width=640,
    frame_height=480,
    resized_width=320,
    resized_height=224,
)
EMPTY = np.zeros((480, 640, 3), np.uint8)
SMEAR = Scene(
    kind="blood",
    pixels=EMPTY,
    boxes=(
        Box("WBC", 64, 48, 320, 240),
        Box("RBC", 400, 100, 500, 200),
        Box("RBC", 10, 300, 90, 400),
    ),
)
FACTS = {"nodules": 1, "effusions": 0, "heart_enlarged": True, "cardiothoracic_ratio": 0.6}
CHEST = Scene(
    kind="chest",
    pixels=EMPTY,
    boxes=(Box("nodule", 100, 100, 160, 160), Box("heart", 250, 200, 500, 400)),
    facts=FACTS,
)


def turns(scene: Scene, seeds: int = 200) -> list[Turn]:
    return [
        turn
        for seed in range(seeds)
        for turn in sample_turns(scene, GEOMETRY, "norm1000", np.random.default_rng(seed))
    ]


def test_located_boxes_are_in_norm1000_sorted_from_the_left() -> None:
    assert located(SMEAR, WBC, GEOMETRY, "norm1000") == "WBC <box>[[100, 100, 500, 500]]</box>"
    assert located(SMEAR, RBC, GEOMETRY, "norm1000") == (
        "RBC <box>[[16, 625, 141, 833], [625, 208, 781, 417]]</box>"
    )
    assert located(SMEAR, PLATELET, GEOMETRY, "norm1000") == "No platelet found."
    assert located(CHEST, EFFUSION, GEOMETRY, "norm1000") == "No pleural effusion found."


def test_other_conventions_are_followed() -> None:
    answer = located(SMEAR, WBC, GEOMETRY, "pixel_resized")
    assert answer == "WBC <box>[[32, 22, 160, 112]]</box>"


def test_descriptions() -> None:
    assert (
        described(SMEAR)
        == "Blood smear with 1 white blood cell, 2 red blood cells and 0 platelets."
    )
    assert described(CHEST) == (
        "Chest radiograph. One nodule. No pleural effusion. The heart is enlarged."
    )


@pytest.mark.parametrize("scene", [SMEAR, CHEST])
def test_every_box_in_an_answer_is_one_of_the_scene(scene: Scene) -> None:
    for turn in turns(scene):
        parsed = parse_boxes(turn.answer, [GEOMETRY], "norm1000")
        assert parsed.rejected == ()
        for box in parsed.boxes:
            truth = [other for other in scene.boxes if other.label == box.label]
            assert max(iou(box.xyxy, other.xyxy) for other in truth) > 0.95


@pytest.mark.parametrize("scene", [SMEAR, CHEST])
def test_one_wording_never_has_two_answers_on_one_scene(scene: Scene) -> None:
    answers: dict[str, set[str]] = {}
    for turn in turns(scene, 600):
        key = turn.question.lower().rstrip(".?")
        answers.setdefault(key, set()).add(turn.answer)
    assert len(answers) > 100
    assert all(len(found) == 1 for found in answers.values())


def test_the_plain_questions_of_the_readme_are_asked_often() -> None:
    asked = [turn.question for turn in turns(SMEAR) + turns(CHEST)]
    for question in (
        "Locate the white blood cell.",
        "Locate the red blood cells.",
        "Locate the platelets.",
        "Locate the nodule.",
        "Locate the pleural effusion.",
        "Is there a white blood cell?",
        "Is there a nodule?",
        "Is there a pleural effusion?",
        "How many white blood cells are there?",
        "Is the heart enlarged?",
        "Describe the image.",
    ):
        assert asked.count(question) >= 10, question


def test_the_most_important_question_is_always_asked_first() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        first = next(sample_turns(SMEAR, GEOMETRY, "norm1000", rng))
        assert first.answer.startswith("WBC <box>")
        first = next(sample_turns(CHEST, GEOMETRY, "norm1000", rng))
        assert first.answer.startswith("nodule <box>")


def test_questions_of_platelets_are_of_nothing_else() -> None:
    smear = replace(SMEAR, boxes=(*SMEAR.boxes, Box("Platelets", 320, 240, 352, 264)))
    for scene, found in ((SMEAR, "No platelet found."), (smear, "Platelets <box>[[")):
        for seed in range(50):
            rng = np.random.default_rng(seed)
            asked = list(sample_turns(scene, GEOMETRY, "norm1000", rng, of_platelets=True))
            assert asked[0].answer.startswith(found)
            for turn in asked:
                assert any(name in turn.question for name in ("platelet", "thrombocyte"))


def test_no_question_is_left_with_an_open_place_or_wrong_article() -> None:
    for turn in turns(SMEAR, 400) + turns(CHEST, 400):
        assert "{" not in turn.question and "}" not in turn.question
        assert not any(f" a {vowel}" in turn.question for vowel in "aeio")
        assert " a RBC" not in turn.question and " an WBC" not in turn.question


@given(st.sampled_from(TARGETS))
def test_names_are_what_a_question_needs(target: object) -> None:
    assert isinstance(target, type(WBC))
    assert target.singular and target.plural and target.label


def test_yes_and_no() -> None:
    assert (yes_no(True), yes_no(False)) == ("Yes.", "No.")
    assert HEART.label == "heart" and NODULE.label == "nodule"
