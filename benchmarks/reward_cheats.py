"""What every reward gives for the obvious ways to cheat it, as a Markdown table.

    python benchmarks/reward_cheats.py

Prints the tables of docs/rewards.md; nothing is drawn or random. The pictures are imaginary: boxes
are scored against boxes.
"""

from collections.abc import Mapping
from typing import Any

from medmo_edge.boxes import NORM, Box, Geometry, format_boxes
from medmo_edge.train.rewards import DEFAULT_WEIGHTS, Case, box_reward, combine, judge

SIDE = NORM  # a square picture of 1000 pixels: answer and source coordinates are the same
GEOMETRY = Geometry(
    width=SIDE,
    height=SIDE,
    frame_width=SIDE,
    frame_height=SIDE,
    resized_width=SIDE,
    resized_height=SIDE,
)
Row = tuple[int, int, int, int]
TRUTH: tuple[Row, ...] = ((100, 150, 220, 260), (420, 480, 560, 640), (700, 120, 790, 230))
LABEL = "nodule"
REPORT = (
    "The heart size is normal. Small left pleural effusion. Consolidation in the right lower lobe. "
    "No pneumothorax."
)
CHOICES = ("Liver", "Lung", "Heart", "Brain")
BOX_REWARDS = ("box", "iou", "label", "count", "format", "distinct")


def locate(text: str, truth: tuple[Row, ...] = TRUTH) -> Case:
    """An answer to "Locate the nodules." on the imaginary picture."""
    boxes = tuple(Box(LABEL, *row) for row in truth)
    return Case(text=text, sample_id="example", boxes=boxes, geometries=(GEOMETRY,))


def grid(columns: int) -> list[Row]:
    """The picture tiled by ``columns`` squared boxes."""
    step = SIDE // columns
    starts = range(0, step * columns, step)
    return [(x, y, x + step, y + step) for y in starts for x in starts]


def box_answers() -> dict[str, Case]:
    """Answers to a picture with three nodules, the honest ones first."""
    near = [(x1 + 12, y1 - 9, x2 + 14, y2 - 6) for x1, y1, x2, y2 in TRUTH]
    everything = [(0, 0, SIDE, SIDE)]
    labels = ("nodule", "mass", "effusion", "opacity")
    return {
        "perfect": locate(format_boxes(LABEL, TRUTH)),
        "a little beside": locate(format_boxes(LABEL, near)),
        "one of three missing": locate(format_boxes(LABEL, TRUTH[:2])),
        "empty answer": locate(""),
        '"None."': locate("None."),
        "whole-image box": locate(format_boxes(LABEL, everything)),
        "whole-image box three times": locate(format_boxes(LABEL, everything * 3)),
        "one box in the middle": locate(format_boxes(LABEL, [(350, 350, 650, 650)])),
        "three boxes anywhere": locate(
            format_boxes(LABEL, [(0, 700, 150, 850), (300, 100, 450, 250), (800, 800, 950, 950)])
        ),
        "grid of 25 boxes": locate(format_boxes(LABEL, grid(5))),
        "grid of 400 boxes": locate(format_boxes(LABEL, grid(20))),
        "right boxes and a grid of 25": locate(format_boxes(LABEL, [*TRUTH, *grid(5)])),
        "right boxes, each said five times": locate(format_boxes(LABEL, TRUTH * 5)),
        "right boxes under four labels": locate(
            ", ".join(format_boxes(label, TRUTH) for label in labels)
        ),
        "right boxes, wrong label": locate(format_boxes("mass", TRUTH)),
        "boxes without area": locate(format_boxes(LABEL, [(5, 5, 5, 9)] * 3)),
        "prose without boxes": locate("There are three nodules in the lungs."),
        "boxes although there is nothing": locate(format_boxes(LABEL, TRUTH), ()),
        '"None." where there is nothing': locate("None.", ()),
    }


def question_answers() -> dict[str, tuple[str, Case]]:
    """Answers to questions with one true answer, each under the reward that judges it."""
    facts: dict[str, dict[str, Any]] = {
        "option": {"answer": "B", "choices": CHOICES},
        "yes_no": {"answer": "yes"},
        "number": {"answer": "3.2 cm"},
    }
    texts = {
        "option": {
            "B": "B",
            "B. Lung": "B. Lung",
            "all letters: A B C D": "A B C D",
            "all options": "A. Liver B. Lung C. Heart D. Brain",
            "letter and another text: B. Heart": "B. Heart",
            "no option (empty)": "",
        },
        "yes_no": {
            "Yes, there is.": "Yes, there is.",
            "yes and no": "yes and no",
            "Yes. No.": "Yes. No.",
            "no yes or no (empty)": "",
        },
        "number": {
            "32 mm": "32 mm",
            "3.2 without unit": "3.2",
            "other unit: 3.2 mm": "3.2 mm",
            "many sizes: 1 cm, 2 cm, 3.2 cm": "1 cm, 2 cm, 3.2 cm",
            "range: 1-10 cm": "1-10 cm",
            "no number (empty)": "",
        },
    }
    return {
        name: (reward, Case(text=text, **facts[reward]))
        for reward, answers in texts.items()
        for name, text in answers.items()
    }


def report_answers() -> dict[str, tuple[str, Case]]:
    """Reports of the radiograph that ``REPORT`` describes."""
    findings = "cardiomegaly edema consolidation pneumonia atelectasis fracture".split()
    findings += "pneumothorax effusion emphysema fibrosis lymphadenopathy".split()
    every = " ".join(f"There is {name}." for name in findings)
    none = " ".join(f"No {name}." for name in findings)
    swapped = REPORT.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")
    texts = {
        "the report itself": REPORT,
        "the report without its effusion": REPORT.replace("Small left pleural effusion.", ""),
        "the report mirrored": swapped,
        "no report (empty)": "",
        "every finding present": every,
        "every finding denied": none,
        "every finding present and denied": f"{every} {none}",
        "the report's own findings negated": (
            "No pleural effusion. No consolidation. There is a pneumothorax."
        ),
        "the report said five times": " ".join([REPORT] * 5),
    }
    return {name: ("findings", Case(text=text, target=REPORT)) for name, text in texts.items()}


def scores(case: Case) -> dict[str, float]:
    """Every box reward of a case, MedMO's as printed, and the weighted sum."""
    values: Mapping[str, float | None] = {name: judge(name, case) for name in BOX_REWARDS}
    found, wanted = ([box.xyxy for box in boxes] for boxes in (case.claimed, case.boxes or ()))
    printed = box_reward(found, wanted, size=(SIDE, SIDE), fp_weight=0, fn_weight=0)
    penalised = box_reward(found, wanted, size=(SIDE, SIDE))
    known = {name: value for name, value in values.items() if value is not None}
    return (
        {"paper": printed, "penalised": penalised}
        | known
        | {"sum": combine(case, DEFAULT_WEIGHTS) or 0.0}
    )


def tables() -> str:
    """Both tables of docs/rewards.md."""
    names = ("paper", "penalised", *BOX_REWARDS, "sum")
    lines = [f"| answer | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for answer, case in box_answers().items():
        values = scores(case)
        lines.append(f"| {answer} | {' | '.join(f'{values[name]:.2f}' for name in names)} |")
    lines += ["", "| reward | answer | score |", "|---|---|---:|"]
    for answer, (name, case) in (question_answers() | report_answers()).items():
        lines.append(f"| {name} | {answer} | {judge(name, case):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
