"""Findings in sentences that a radiologist would read in one way only."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.evaluation.findings import (
    VOCABULARY,
    Agreement,
    compare_findings,
    find_findings,
    finding_f1,
)


def _read(text: str) -> dict[str, tuple[str, str]]:
    return {found.label: (found.status, found.side) for found in find_findings(text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Left pleural effusion.", {"pleural effusion": ("present", "left")}),
        ("There is a nodule in the right upper lobe.", {"lung lesion": ("present", "right")}),
        (
            "No pneumothorax or pleural effusion.",
            {"pneumothorax": ("absent", ""), "pleural effusion": ("absent", "")},
        ),
        (
            "No pneumothorax, but a small right effusion.",
            {"pneumothorax": ("absent", ""), "pleural effusion": ("present", "right")},
        ),
        ("Heart size is normal.", {"cardiomegaly": ("absent", "")}),
        ("The heart is enlarged.", {"cardiomegaly": ("present", "")}),
        ("The lungs are clear.", {"lung opacity": ("absent", "")}),
        ("Bibasilar atelectasis.", {"atelectasis": ("present", "both")}),
        ("Pneumonia cannot be excluded.", {"pneumonia": ("uncertain", "")}),
        ("Possible left lower lobe pneumonia.", {"pneumonia": ("uncertain", "left")}),
        ("No change in the left effusion.", {"pleural effusion": ("present", "left")}),
        ("The effusion has resolved.", {"pleural effusion": ("absent", "")}),
        ("A pneumothorax is not seen.", {"pneumothorax": ("absent", "")}),
        (
            "Effusion on the left. Small effusion on the right.",
            {"pleural effusion": ("present", "both")},
        ),
        (
            "Cardiomegaly and left pleural effusion.",
            {"cardiomegaly": ("present", ""), "pleural effusion": ("present", "left")},
        ),
        ("Pericardial effusion.", {"pericardial effusion": ("present", "")}),
        ("History of pneumonia.", {}),
        ("Evaluate for pneumothorax.", {}),
        ("Right-sided pneumothorax.", {"pneumothorax": ("present", "right")}),
        ("A 1.5 cm nodule. No mass.", {"lung lesion": ("present", ""), "mass": ("absent", "")}),
        ("Everything is as it should be.", {}),
        ("", {}),
    ],
)
def test_one_statement(text: str, expected: dict[str, tuple[str, str]]) -> None:
    assert _read(text) == expected


def test_a_report() -> None:
    report = (
        "Findings: The heart is mildly enlarged. There is a moderate left pleural effusion with "
        "adjacent atelectasis. No pneumothorax. Right lung is clear. Impression: Left effusion."
    )
    found = _read(report)
    assert found["pleural effusion"] == ("present", "left")
    assert found["cardiomegaly"][0] == "present"
    assert found["atelectasis"][0] == "present"
    assert found["pneumothorax"] == ("absent", "")


def test_agreement_counts_by_hand() -> None:
    truth = "Left effusion. Cardiomegaly. No pneumothorax."
    answer = "Right effusion. Pneumothorax. A nodule."
    agreement = compare_findings(truth, answer)
    # shared: effusion on the wrong side; missed: heart; invented: pneumothorax (denied), nodule
    assert agreement == Agreement(shared=1, sided=0, missed=1, invented=2, contradicted=1)
    assert finding_f1([agreement]) == pytest.approx(2 / 5)
    assert finding_f1([agreement], sided=True) == 0


def test_f1_is_over_all_reports() -> None:
    good = compare_findings("Left effusion.", "Left effusion.")
    bad = compare_findings("Cardiomegaly.", "Normal.")
    assert finding_f1([good, bad]) == pytest.approx(2 / 3)
    assert finding_f1([good], sided=True) == 1
    assert math.isnan(finding_f1([compare_findings("Fine.", "Fine.")]))


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    found = find_findings(text)
    assert len({each.label for each in found}) == len(found)
    agreement = compare_findings(text, text)
    assert agreement.missed == agreement.invented == agreement.contradicted == 0
    assert agreement.sided == agreement.shared


@given(st.sampled_from(sorted({"pneumothorax", "cardiomegaly", "pneumonia", "atelectasis"})))
def test_a_negation_turns_a_finding_round(word: str) -> None:
    assert word in VOCABULARY
    assert _read(f"There is {word}.")[word][0] == "present"
    assert _read(f"There is no {word}.")[word][0] == "absent"


def test_long_texts_take_linear_time() -> None:
    assert find_findings("the heart is " * 3000 + "enlarged") is not None
