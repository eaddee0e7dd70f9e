"""The score of one answer by the rule of its case, and our box rules.

Boxes: truth and answer are paired by the Hungarian method on IoU; a truth box without partner
counts 0; the score is the mean over truth boxes, so boxes too many show in precision and count
error, not in IoU. Label names are not compared: a question names one target. Several images are
paired image by image. ``first_box`` is MedSG-Bench's rule: the first box that can be read against
the one truth box, whatever image either names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box, Coords, Geometry, iou, parse_boxes
from medmo_edge.evaluation import answer_rules as rules
from medmo_edge.evaluation.answer_rules import Judged
from medmo_edge.evaluation.cases import Case
from medmo_edge.evaluation.findings import compare_findings
from medmo_edge.evaluation.scores import match_image
from medmo_edge.evaluation.text_scores import bleu, rouge_l, rouge_n, token_prf

HIT = 0.5  # IoU from which a box is a true positive
_RASTER = 256  # side of the grid on which the union of many boxes is measured


@dataclass(frozen=True, slots=True)
class Said:
    """What is scored: the text, and how its coordinates are to be read."""

    text: str
    geometries: tuple[Geometry, ...] = ()
    coords: Coords = "norm1000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """``value`` 0..1 is the headline (None: this case has none, e.g. no truth box to find).

    ``read``: the answer could be understood. ``said`` is what was understood. ``parts`` are the
    figures that are averaged or summed later; ``boxes`` those of the answer, in source pixels.
    """

    value: float | None
    read: bool
    said: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule by name: its headline metric, the function, and a sentence for reports."""

    metric: str
    score: Callable[[Case, Said], Score]
    describe: str


def score_case(case: Case, said: Said) -> Score:
    """The score of an answer by the case's own rule."""
    return RULES[case.rule].score(case, said)


def _judged(judge: Callable[[Case, str], Judged]) -> Callable[[Case, Said], Score]:
    def score(case: Case, said: Said) -> Score:
        verdict = judge(case, said.text)
        return Score(value=float(verdict.right), read=verdict.read, said=verdict.said)

    return score


def _count(case: Case, said: Said) -> Score:
    """The whole number exactly, with how far off it is beside it."""
    verdict = rules.judge_count(said.text, case.gold)
    off = {"count_off_by": abs(int(verdict.said) - int(case.gold))} if verdict.read else {}
    return Score(value=float(verdict.right), read=verdict.read, said=verdict.said, parts=off)


def _open(case: Case, said: Said) -> Score:
    """Exact match, with word overlap beside it: an open answer is rarely word for word."""
    verdict = rules.judge_open(said.text, case.gold)
    precision, recall, f1 = token_prf(verdict.said, case.gold)
    parts = {
        "token_precision": precision,
        "token_recall": recall,
        "token_f1": f1,
        "open_bleu_1": bleu(verdict.said, case.gold, 1),
        "open_rouge_l": rouge_l(verdict.said, case.gold),
    }
    return Score(value=float(verdict.right), read=verdict.read, said=verdict.said, parts=parts)


def _report(case: Case, said: Said) -> Score:
    """ROUGE-L of the whole text, with its neighbours and the findings that both name."""
    text, gold = said.text, case.gold
    findings = compare_findings(gold, text)
    parts = {f"bleu_{order}": bleu(text, gold, order) for order in (1, 2, 3, 4)}
    parts |= {f"rouge_{size}": rouge_n(text, gold, size) for size in (1, 2)}
    parts["token_f1"] = token_prf(text, gold)[2]
    parts |= {
        "findings_shared": findings.shared,
        "findings_sided": findings.sided,
        "findings_missed": findings.missed,
        "findings_invented": findings.invented,
        "findings_contradicted": findings.contradicted,
    }
    return Score(value=rouge_l(text, gold), read=bool(text.strip()), said=text, parts=parts)


def _boxes(case: Case, said: Said) -> Score:
    parsed = parse_boxes(said.text, said.geometries, said.coords)
    pairs = [
        match_image(
            [box.xyxy for box in case.boxes if box.image == image],
            [box.xyxy for box in parsed.boxes if box.image == image],
        )
        for image in range(len(said.geometries))
    ]
    ious = [value for pair in pairs for value in pair.ious]
    hits = sum(value >= HIT for value in ious)
    parts = {
        "truth_boxes": len(ious),
        "said_boxes": len(parsed.boxes),
        "hits": hits,
        "rejected_boxes": len(parsed.rejected),
        "count_error": abs(len(parsed.boxes) - len(ious)),
        "sum_iou": sum(ious),
    }
    if ious:
        parts |= {
            f"share_at_{level}": float(np.mean([v >= level for v in ious])) for level in LEVELS
        }
        parts["union_iou"] = union_iou(case.boxes, parsed.boxes, said.geometries)
    return Score(
        value=float(np.mean(ious)) if ious else None,
        read=_readable(said.text, len(parsed.boxes), len(parsed.rejected)),
        parts=parts,
        boxes=parsed.boxes,
    )


LEVELS = (0.3, 0.5, 0.7)


def _readable(text: str, boxes: int, rejected: int) -> bool:
    """Every coordinate was usable, and what holds no box holds no numbers that could be one."""
    numbers = sum(character.isdigit() for character in text)
    return not rejected and (boxes > 0 or numbers < 4)


def _first_box(case: Case, said: Said) -> Score:
    """The geometry of the truth's image alone: the published metric compares coordinates only."""
    truth = case.boxes[0]
    parsed = parse_boxes(said.text, [said.geometries[truth.image]], said.coords)
    value = iou(truth.xyxy, parsed.boxes[0].xyxy) if parsed.boxes else 0.0
    parts = {f"share_at_{level}": float(value >= level) for level in LEVELS}
    parts |= {"rejected_boxes": len(parsed.rejected), "said_boxes": len(parsed.boxes)}
    shown = tuple(
        Box(box.label, box.x1, box.y1, box.x2, box.y2, truth.image) for box in parsed.boxes[:1]
    )
    return Score(value=value, read=bool(parsed.boxes), parts=parts, boxes=shown)


def union_iou(truth: Sequence[Box], said: Sequence[Box], geometries: Sequence[Geometry]) -> float:
    """IoU of the areas that the boxes cover together, on a grid of 256 x 256 cells an image."""
    shared = total = 0
    for image, geometry in enumerate(geometries):
        masks = [_mask([b for b in boxes if b.image == image], geometry) for boxes in (truth, said)]
        shared += int((masks[0] & masks[1]).sum())
        total += int((masks[0] | masks[1]).sum())
    return shared / total if total else 0.0


def _mask(boxes: Sequence[Box], geometry: Geometry) -> NDArray[np.bool_]:
    mask = np.zeros((_RASTER, _RASTER), np.bool_)
    for box in boxes:
        left, right = (round(x * _RASTER / geometry.width) for x in (box.x1, box.x2))
        top, bottom = (round(y * _RASTER / geometry.height) for y in (box.y1, box.y2))
        mask[top : max(top + 1, bottom), left : max(left + 1, right)] = True
    return mask


#: name -> rule
RULES: dict[str, Rule] = {
    "choice": Rule(
        "accuracy",
        _judged(lambda case, text: rules.judge_choice(text, case.gold, case.options)),
        "Multiple choice by MedEvalKit's rule: the letter or text given, else the most similar "
        "option.",
    ),
    "yes_no": Rule(
        "accuracy",
        _judged(lambda case, text: rules.judge_yes_no(text, case.gold)),
        "Yes or no: right when exactly one of the two occurs and it is the right one.",
    ),
    "phrase": Rule(
        "accuracy",
        _judged(lambda case, text: rules.judge_phrase(text, case.gold)),
        "Closed question: equal but for case and full stops.",
    ),
    "open": Rule(
        "accuracy", _open, "Open question: exact match without case; word overlap beside."
    ),
    "count": Rule(
        "accuracy",
        _count,
        "Count: the first whole number of the answer, exactly.",
    ),
    "mmmu_choice": Rule(
        "accuracy",
        _judged(lambda c, text: rules.judge_mmmu_choice(text, c.gold, c.options, c.id)),
        "MMMU's multiple choice: the last option named; without one a letter is drawn by seed.",
    ),
    "mmmu_open": Rule(
        "accuracy",
        _judged(lambda case, text: rules.judge_mmmu_open(text, case.golds)),
        "MMMU's open question: the gold text within a key phrase, or an equal number.",
    ),
    "report": Rule(
        "rouge_l", _report, "Text against the reference: ROUGE-L, with BLEU, CIDEr and findings."
    ),
    "boxes": Rule(
        "mean_iou",
        _boxes,
        "Boxes: Hungarian pairing on IoU, mean over truth boxes (missed ones count 0), then over "
        "questions.",
    ),
    "first_box": Rule(
        "mean_iou",
        _first_box,
        "Boxes: IoU of the first box that can be read with the one truth box (MedSG-Bench).",
    ),
}
