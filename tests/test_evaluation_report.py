"""What the report shows: the answers that lost most, and both kinds of box on any background."""

import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from medmo_edge.boxes import Box
from medmo_edge.evaluation.case_scores import Score
from medmo_edge.evaluation.cases import Case
from medmo_edge.evaluation.html_report import WORST, worst_answers
from medmo_edge.evaluation.predictions import Prediction
from medmo_edge.evaluation.report_pictures import ANSWER, SIDE, TRUTH, picture
from medmo_edge.evaluation.summary import Scored
from medmo_edge.images import Frame


def _near(pixels: np.ndarray, colour: str) -> np.ndarray:
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    close: np.ndarray = np.abs(pixels.astype(int) - wanted).max(axis=2) < 60
    return close


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_both_boxes_show_on_any_background(grey: int) -> None:
    frame = Frame.from_pixels(np.full((160, 320, 3), grey, np.uint8))
    data = picture(frame, [Box("a", 32, 32, 96, 96)], [Box("a", 160, 16, 304, 144)])
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(data))))
    assert pixels.shape == (SIDE // 2, SIDE, 3)
    truth, answer = _near(pixels, TRUTH), _near(pixels, ANSWER)
    rows, columns = np.nonzero(truth)
    # 320 pixels became SIDE: the truth's corners lie at 2 x (32, 96).
    assert abs(columns.min() - 64) <= 4 and abs(columns.max() - 191) <= 4
    assert abs(rows.min() - 64) <= 4 and abs(rows.max() - 191) <= 4
    rows, columns = np.nonzero(answer)
    assert abs(columns.min() - 320) <= 4 and abs(columns.max() - 607) <= 4
    top = answer[30:36, 330:600].any(axis=0)
    assert top.mean() > 0.95  # solid
    dashes = truth[62:68, 70:186].any(axis=0)
    assert 0.3 < dashes.mean() < 0.8  # dashed


def _scored(name: str, sample: str, value: float | None) -> Scored:
    case = Case(id=name, sample=sample, question="q", rule="boxes")
    said = Prediction(
        id=name,
        text="",
        geometries=(),
        seconds=0,
        decode_seconds=0,
        new_tokens=0,
        prompt_tokens=0,
        finish_reason="stop",
    )
    return Scored(case, said, Score(value=value, read=True))


def test_the_worst_come_first_and_once_per_picture() -> None:
    scored = [
        _scored("right", "a", 1.0),
        _scored("half", "b", 0.5),
        _scored("bad", "c", 0.1),
        _scored("worse", "c", 0.0),
        _scored("nothing to find", "d", None),
    ]
    assert [each.case.id for each in worst_answers(scored, "mean_iou")] == ["worse", "half"]
    assert worst_answers(scored, "accuracy") == []
    many = [_scored(str(n), str(n), n / 100) for n in range(50)]
    assert len(worst_answers(many, "mean_iou")) == WORST
