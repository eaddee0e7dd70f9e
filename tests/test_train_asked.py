"""Questions drawn for reinforcement: their truths, and what they are about."""

from collections import Counter

import numpy as np
import pytest

from medmo_edge.boxes import Box
from medmo_edge.train.asked import Asked, Shares, draw, with_yes_or_no
from medmo_edge.train.scenes import Scene

NUMBER = 60
SMEARS = [
    Scene(
        kind="blood",
        pixels=np.full((240, 320, 3), 200, np.uint8),
        boxes=(Box("WBC", 100, 80, 180, 160), Box("Platelets", 20, 30, 40, 50)),
    )
]
TOLD = (("Is it fractured?", "No."), ("Is this a CT?", "Yes."), ("Which organ?", "Liver."))
RADIOGRAPHS = with_yes_or_no(
    [
        Scene(kind="radiology", pixels=np.full((90, 70, 3), 9, np.uint8), boxes=(), turns=turns)
        for turns in (TOLD, TOLD[2:])
    ]
)


def drawn(shares: Shares, number: int = NUMBER) -> list[Asked]:
    rngs = (np.random.default_rng([5, i]) for i in range(number))
    return [draw(SMEARS, RADIOGRAPHS, shares, rng) for rng in rngs]


def words(asked: Asked) -> str:
    content = asked.sample.messages[0]["content"]
    return str(next(part["text"] for part in content if part["type"] == "text")).lower()


@pytest.fixture(scope="module")
def located() -> list[Asked]:
    return drawn(Shares(blood=0.4, radiology=0, located=1, present=0))


def test_boxes_are_mostly_asked_for_where_there_are_some(located: list[Asked]) -> None:
    """A group that is right to say "none" has no spread of rewards, so nothing is learned."""
    empty = [asked for asked in located if not asked.sample.boxes]
    assert 0 < len(empty) < 0.3 * NUMBER
    for asked in located:
        height, width = asked.frame.pixels.shape[:2]
        for box in asked.sample.boxes:
            assert 0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height


def test_everything_that_was_taught_is_asked_for(located: list[Asked]) -> None:
    """Else the rest is forgotten: effusions were, when only nodules and white cells were asked."""
    labels = Counter(box.label for asked in located for box in asked.sample.boxes)
    assert set(labels) == {"WBC", "nodule", "effusion", "heart"}
    for asked in located:
        assert len({box.label for box in asked.sample.boxes}) <= 1


def test_words_have_the_truth_of_the_view() -> None:
    shares = Shares(blood=1, radiology=0, located=0, present=0.6)
    answers = Counter((words(asked), asked.sample.answer) for asked in drawn(shares, 150))
    kinds = {question for question, _ in answers}
    assert len(kinds) == 3  # white cell there, platelet there, number of white cells
    for question, answer in answers:
        assert answer in (("0", "1") if "how many" in question else ("yes", "no"))
    assert len(answers) == 6


def test_radiographs_are_asked_what_people_asked() -> None:
    """Yes or no alone: no rule here judges other answers."""
    assert len(RADIOGRAPHS) == 1 and RADIOGRAPHS[0].turns == TOLD[:2]
    found = drawn(Shares(blood=0.5, radiology=0.5, located=0, present=1))
    told = [asked for asked in found if "is there" not in words(asked)]
    assert 0.3 * NUMBER < len(told) < 0.7 * NUMBER
    answers = {(words(asked), asked.sample.answer) for asked in told}
    assert answers == {("is it fractured?", "no"), ("is this a ct?", "yes")}


def test_a_draw_depends_on_its_seed_alone() -> None:
    shares = Shares(blood=0.5, radiology=0.2, located=0.6, present=0.2)
    first, again = (drawn(shares, 20) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.sample == other.sample
        np.testing.assert_array_equal(one.frame.pixels, other.frame.pixels)
