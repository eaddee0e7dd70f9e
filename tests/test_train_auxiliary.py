"""The dense loss: what each vision token is told, and that a perfect head pays next to nothing."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from medmo_edge.boxes import Box, Geometry
from medmo_edge.train.auxiliary import CLASSES, Targets, build_head, dense_loss, dense_targets
from medmo_edge.train.recipe import AuxiliarySpec

GEOMETRY = Geometry(
    width=400, height=200, frame_width=400, frame_height=200, resized_width=128, resized_height=64
)
WBC, PLATELET = CLASSES.index("WBC"), CLASSES.index("Platelets")
EVEN = AuxiliarySpec(coverage=1.0, corners=1.0, digits=1.0)


def targets(*boxes: Box) -> Targets:
    """Of a picture of 2 rows and 4 columns of tokens, each 100 x 100 pixels."""
    return dense_targets(boxes, GEOMETRY, 2, 4)


def test_cover_is_the_part_of_each_token_under_the_box() -> None:
    found = targets(Box("WBC", 50, 0, 200, 150))
    assert found.cover[:, WBC].reshape(2, 4) == pytest.approx(
        np.array([[0.5, 1, 0, 0], [0.25, 0.5, 0, 0]])
    )
    assert found.cover[:, PLATELET].sum() == 0


def test_tokens_that_see_enough_of_a_box_know_its_corners() -> None:
    found = targets(Box("WBC", 50, 0, 200, 150)).corners[:, WBC].reshape(2, 4, 4)
    assert (found[0, 0] == (125, 0, 500, 750)).all() and (found[0, 1] == found[0, 0]).all()
    assert (found[1, 0] == -1).all() and (found[0, 2] == -1).all()
    assert (found[1, 1] == found[0, 0]).all()


def test_a_small_box_is_known_to_the_token_that_holds_its_middle() -> None:
    found = targets(Box("Platelets", 310, 120, 330, 140)).corners[:, PLATELET].reshape(2, 4, 4)
    assert (found[1, 3] == (775, 600, 825, 700)).all()
    assert (found == -1).all(axis=2).sum() == 7


def test_a_perfect_head_pays_next_to_nothing_and_a_wrong_one_pays() -> None:
    truth = targets(Box("WBC", 0, 0, 200, 100), Box("heart", 200, 0, 400, 200))
    perfect = outputs_for(truth)
    assert dense_loss(perfect, [truth], EVEN).item() < 1e-3
    assert dense_loss(-perfect, [truth], EVEN).item() > 10
    shifted = targets(Box("WBC", 200, 0, 400, 100), Box("heart", 0, 0, 200, 200))
    assert dense_loss(perfect, [shifted], EVEN).item() > 10


def test_parts_weigh_what_the_recipe_says() -> None:
    truth = targets(Box("WBC", 0, 0, 200, 100))
    guess = torch.randn(8, outputs_for(truth).shape[1], generator=torch.Generator().manual_seed(1))
    parts = [
        dense_loss(guess, [truth], AuxiliarySpec(coverage=a, corners=b, digits=c)).item()
        for a, b, c in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    whole = dense_loss(guess, [truth], AuxiliarySpec(coverage=2, corners=3, digits=4)).item()
    assert whole == pytest.approx(2 * parts[0] + 3 * parts[1] + 4 * parts[2], rel=1e-5)


def test_a_class_counts_the_same_however_many_tokens_speak_for_it() -> None:
    only_corners = AuxiliarySpec(coverage=0, corners=1, digits=1)
    wide, narrow = Box("WBC", 0, 0, 300, 200), Box("Platelets", 310, 20, 330, 40)
    truth = targets(wide, narrow)
    assert (truth.corners[:, WBC, 0] >= 0).sum() == 6 * (truth.corners[:, PLATELET, 0] >= 0).sum()

    def wrong_about(kind: int) -> float:
        said = outputs_for(truth).reshape(8, len(CLASSES), -1)
        said[:, kind, 1:] = outputs_for(targets()).reshape(8, len(CLASSES), -1)[:, kind, 1:]
        return dense_loss(said.reshape(8, -1), [truth], only_corners).item()

    alone = {
        kind: dense_loss(outputs_for(targets()), [targets(box)], only_corners).item()
        for kind, box in ((WBC, wide), (PLATELET, narrow))
    }
    for kind, loss in alone.items():
        assert wrong_about(kind) == pytest.approx(loss / 2, rel=1e-4)


def test_a_missed_platelet_token_costs_more_than_a_missed_white_cell() -> None:
    only_cover = AuxiliarySpec(coverage=1, corners=0, digits=0)
    whole = targets(Box("WBC", 0, 0, 100, 100), Box("Platelets", 300, 100, 400, 200))
    costs = {}
    for kind in (WBC, PLATELET):
        said = outputs_for(whole).reshape(8, len(CLASSES), -1)
        said[:, kind, 0] = -20.0
        costs[kind] = dense_loss(said.reshape(8, -1), [whole], only_cover).item()
    assert costs[PLATELET] / costs[WBC] == pytest.approx(20 / 3, rel=1e-3)


def test_a_picture_without_boxes_still_teaches_that_nothing_is_there() -> None:
    empty = targets()
    loss = dense_loss(torch.zeros(8, outputs_for(empty).shape[1]), [empty], EVEN)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-5)


def test_the_head_is_the_same_for_the_same_seed() -> None:
    one, other = build_head(16, 3), build_head(16, 3)
    value = torch.ones(2, 16)
    assert torch.equal(one(value), other(value))
    assert one(value).shape == (2, len(CLASSES) * 89)


def outputs_for(truth: Targets) -> torch.Tensor:
    """Head outputs [T, ...] that say exactly ``truth``, with confidence."""
    said = torch.zeros(len(truth.cover), len(CLASSES), 89)
    said[:, :, 0] = torch.from_numpy(np.where(truth.cover > 0.5, 20.0, -20.0))
    corners = torch.from_numpy(truth.corners).clamp(min=0)
    said[:, :, 1:5] = corners / 1000
    digits = said[:, :, 5:].reshape(len(said), len(CLASSES), 4, 21)
    digits.scatter_(3, (corners // 100)[..., None], 30.0)
    digits.scatter_(3, (11 + corners // 10 % 10)[..., None], 30.0)
    said[:, :, 5:] = digits.reshape(len(said), len(CLASSES), 84)
    return said.reshape(len(said), -1)
