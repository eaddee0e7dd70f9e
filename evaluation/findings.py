"""Findings named in a radiology text, by rules: what, present or not, and on which side.

A small vocabulary (the fourteen CheXpert observations and common findings elsewhere), negation in
the manner of NegEx (Chapman et al. 2001) and laterality, all as plain tables: no weights, the same
result everywhere. It reads English only, no severity, no size and no time course, and a finding
outside the vocabulary does not exist for it. It measures how texts agree, never how ill somebody
is.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["present", "absent", "uncertain"]
Side = Literal["left", "right", "both", ""]

#: finding -> the words that name it; a text is lower-case and its hyphens are spaces by then
VOCABULARY: dict[str, str] = {
    "enlarged cardiomediastinum": (
        r"(?:mediastinal|cardiomediastinal) (?:widening|enlargement)|"
        r"(?:widened|enlarged|prominent) (?:cardio)?mediastin(?:um|al)(?: silhouette| contours?)?"
    ),
    "cardiomegaly": (
        r"cardiomegaly|cardiac enlargement|enlargement of the (?:heart|cardiac silhouette)|"
        r"(?:enlarged|large|big) (?:heart|cardiac silhouette)|"
        r"(?:heart|cardiac silhouette)(?: size)? (?:is|remains|appears)(?: \w+)? "
        r"(?:enlarged|increased|large)"
    ),
    "lung opacity": (
        r"(?:airspace|air space|lung|pulmonary|parenchymal|basilar|basal|bibasilar|interstitial|"
        r"hazy|patchy|focal) opaci(?:ty|ties|fications?)|opaci(?:ty|ties|fications?)|infiltrates?|"
        r"infiltrations?|ground glass"
    ),
    "lung lesion": r"(?:lung|pulmonary) (?:lesions?|mass(?:es)?|tumou?rs?)|nodules?|nodular \w+",
    "mass": r"(?<!lung )(?<!pulmonary )mass(?:es)?|tumou?rs?|neoplasms?",
    "edema": r"(?:o?edema)|vascular congestion|fluid overload|congestive heart failure",
    "consolidation": r"consolidations?",
    "pneumonia": r"pneumonias?|bronchopneumonia",
    "atelectasis": r"atelecta(?:sis|ses|tic)|(?:lung|lobar|lobe) collapse",
    "pneumothorax": r"pneumothora(?:x|ces)",
    "pleural effusion": (
        r"(?:pleural|parapneumonic) (?:effusions?|fluid)|(?<!pericardial )(?<!joint )effusions?|"
        r"hydrothorax|blunt(?:ing|ed)(?: of)?(?: the)?(?: left| right)? costophrenic|"
        r"costophrenic angles? blunting"
    ),
    "pleural other": r"pleural (?:thickening|plaques?|scarring)",
    "pericardial effusion": r"pericardial (?:effusions?|fluid)",
    "fracture": r"fractures?|fractured",
    "support devices": (
        r"(?:endotracheal|nasogastric|feeding|enteric|chest|tracheostomy|drainage) tubes?|"
        r"pacemakers?|picc|(?:central|venous|dialysis) (?:venous )?(?:catheters?|lines?)|"
        r"port a cath|sternotomy wires|stents?|drains?"
    ),
    "emphysema": r"emphysema(?:tous)?|copd|hyperinflat(?:ion|ed)",
    "fibrosis": r"fibrosis|fibrotic|honeycombing",
    "hernia": r"hernias?|herniation",
    "lymphadenopathy": r"lymphadenopathy|adenopathy|enlarged lymph nodes?",
    "metastasis": r"metasta(?:sis|ses|tic)",
    "hemorrhage": r"ha?emorrhages?|ha?emorrhagic|ha?ematomas?|bleeding",
    "infarct": r"infarct(?:s|ion|ions|ed)?|ischa?emi[ac]|stroke",
    "hydrocephalus": r"hydrocephalus|ventriculomegaly",
    "ascites": r"ascites",
    "hydronephrosis": r"hydronephrosis",
    "calculus": r"calculi|calculus|(?:gall)?stones?|(?:nephro|chole)lithiasis",
    "cyst": r"cysts?|cystic lesions?",
    "obstruction": r"obstructions?|obstructed",
    "dislocation": r"dislocations?|dislocated",
    "aneurysm": r"aneurysms?|aneurysmal",
    "calcification": r"calcifications?|calcified",
    "pneumoperitoneum": r"pneumoperitoneum|free (?:intraperitoneal |subdiaphragmatic )?air",
}

#: statements that deny a finding without a negating word
_NORMAL: dict[str, str] = {
    "cardiomegaly": (
        r"(?:heart|cardiac silhouette|cardiac size|heart size|cardiomediastinal silhouette)"
        r"(?: \w+){0,4}? (?:is|are|remains|appears|within)?(?: \w+){0,2}? ?"
        r"(?:normal|unremarkable|within normal limits)|normal (?:heart|cardiac) (?:size|silhouette)"
        r"|normal (?:heart|cardiac|cardiomediastinal) \w+"
    ),
    "lung opacity": (
        r"lungs?(?: \w+){0,3}? (?:is|are|remain|appear)(?: \w+){0,2}? (?:clear|normal)|clear lungs?"
    ),
}

_NEGATION = re.compile(
    r"\b(?:no|not|without|denies|negative for|free of|absence of|absent|neither|nor|never|"
    r"resolved|resolution of|clear of|lack of|rather than|ruled out|rules out|exclude[sd]?)\b"
)
# What looks like a negation of a finding and denies only its change.
_NO_CHANGE = re.compile(
    r"\bno (?:significant |interval |acute |definite |other |further |appreciable )*"
    r"(?:change|increase|decrease|progression|improvement|worsening)\b(?: in| of)?|\bnot only\b|"
    r"\bno longer seen well\b"
)
_DENIED_AFTER = re.compile(
    r"^[^,;]{0,40}?\b(?:not (?:\w+ )?(?:seen|identified|present|visuali[sz]ed|evident|detected|"
    r"appreciated|noted|demonstrated)|absent|resolved|ruled out|excluded|unlikely|negative)\b"
)
_NOT_EXCLUDED = re.compile(
    r"^[^,;]{0,40}?\b(?:cannot|can not|could not|not) (?:be )?(?:\w+ )?(?:excluded|ruled out)"
)
_UNCERTAIN = re.compile(
    r"\b(?:possibl[ey]|may|might|probabl[ey]|suspected|suspicious|suspicion|questionable|question|"
    r"suggest(?:s|ive|ing)?|versus|vs|could|concern(?:ing)?|cannot exclude|equivocal|likely)\b"
)
_SENTENCE = re.compile(r"(?<!\d)[.!?](?=\s|$)|[;\n]+|(?<=\d)\.(?=\s|$)")
# Where a negation stops: "no effusion but a nodule", "no nodule, there is an effusion".
_TURN = re.compile(
    r"\b(?:but|however|although|though|except|apart from|aside from|while|whereas|yet|"
    r"there is|there are|secondary to|due to)\b"
)
_LEFT = re.compile(r"\bleft\b|\bleft(?=sided)")
_RIGHT = re.compile(r"\bright\b|\bright(?=sided)")
_BOTH = re.compile(r"\b(?:bilateral(?:ly)?|both|bibasilar|biapical|bibasal)\b")
_PATTERNS = {label: re.compile(rf"\b(?:{words})\b") for label, words in VOCABULARY.items()}
_DENIALS = {label: re.compile(rf"\b(?:{words})\b") for label, words in _NORMAL.items()}
_HISTORY = re.compile(
    r"\b(?:history of|indication|comparison|evaluate for|assess for|rule out|r/o|technique|"
    r"clinical information)\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding that a text names; ``side`` is "" when the text names none."""

    label: str
    status: Status
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How the present findings of an answer and of the truth agree.

    ``sided`` of the ``shared`` findings have the same side; ``contradicted`` are findings that the
    truth denies in words and the answer claims, or the other way round.
    """

    shared: int
    sided: int
    missed: int
    invented: int
    contradicted: int


def find_findings(text: str) -> tuple[Finding, ...]:
    """Every finding of ``text``, one entry a label: present beats uncertain beats absent.

    Sentences about history, indication or technique are left out.
    """
    best: dict[str, Finding] = {}
    for found in _mentions(text):
        known = best.get(found.label)
        if known is None or _RANK[found.status] > _RANK[known.status]:
            best[found.label] = found
        elif known.status == found.status:
            best[found.label] = _joined(known, found)
    return tuple(best[label] for label in VOCABULARY if label in best)


def compare_findings(truth: str, answer: str) -> Agreement:
    """Findings of ``answer`` against those of ``truth``; an uncertain finding counts as present."""
    wanted = {found.label: found for found in find_findings(truth)}
    said = {found.label: found for found in find_findings(answer)}
    positive = {label for label, found in wanted.items() if found.status != "absent"}
    claimed = {label for label, found in said.items() if found.status != "absent"}
    shared = positive & claimed
    return Agreement(
        shared=len(shared),
        sided=sum(wanted[label].side == said[label].side for label in shared),
        missed=len(positive - claimed),
        invented=len(claimed - positive),
        contradicted=len(claimed & (set(wanted) - positive))
        + len(positive & (set(said) - claimed)),
    )


def finding_f1(agreements: Iterable[Agreement], *, sided: bool = False) -> float:
    """Micro F1 over reports; ``sided``: a finding on another side is both missed and invented.

    nan when neither truth nor answers hold any finding.
    """
    shared = total = 0
    for found in agreements:
        shared += found.sided if sided else found.shared
        total += 2 * found.shared + found.missed + found.invented
    return 2 * shared / total if total else float("nan")


_RANK = {"absent": 0, "uncertain": 1, "present": 2}


def _joined(a: Finding, b: Finding) -> Finding:
    """Two mentions of equal status: left and right are both, a named side beats none."""
    if a.side == b.side or not b.side:
        return a
    side: Side = b.side if not a.side else "both"
    return Finding(label=a.label, status=a.status, side=side)


def _mentions(text: str) -> Iterator[Finding]:
    for sentence in _SENTENCE.split(text.lower().replace("-", " ").replace("_", " ")):
        if not sentence.strip() or _HISTORY.search(sentence):
            continue
        plain = _NO_CHANGE.sub(lambda found: " " * len(found[0]), sentence)
        taken: list[tuple[int, int]] = []
        for label, pattern in _PATTERNS.items():
            for found in pattern.finditer(plain):
                if not _overlaps(found.span(), taken):
                    taken.append(found.span())
                    yield _judge(label, plain, found.start(), found.end())
        for label, pattern in _DENIALS.items():
            if pattern.search(plain) and not _NEGATION.search(plain):
                yield Finding(label=label, status="absent", side="")


def _overlaps(span: tuple[int, int], taken: Iterable[tuple[int, int]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in taken)


def _judge(label: str, sentence: str, start: int, end: int) -> Finding:
    before, after = sentence[:start], sentence[end:]
    scope = before[_last_turn(before) :]
    turn = _TURN.search(after)
    following = after[: turn.start()] if turn else after
    status: Status = "present"
    if _NOT_EXCLUDED.search(following) or "cannot exclude" in scope:
        status = "uncertain"
    elif _NEGATION.search(scope) or _DENIED_AFTER.search(following):
        status = "absent"
    elif _UNCERTAIN.search(scope) or re.match(r"[^,;]{0,20}\b(?:versus|vs|suspected)\b", following):
        status = "uncertain"
    return Finding(label=label, status=status, side=_side(scope, following))


def _last_turn(before: str) -> int:
    """Where the clause of the finding begins."""
    ends = [found.end() for found in _TURN.finditer(before)]
    return ends[-1] if ends else 0


def _side(before: str, after: str) -> Side:
    """The side in the finding's own phrase: nearest before it, else just after it."""
    phrase = re.split(r",|\band\b|\bwith\b", before)[-1]
    for words in (phrase, re.split(r",|\band\b|\bwith\b", after)[0]):
        left, right = bool(_LEFT.search(words)), bool(_RIGHT.search(words))
        if _BOTH.search(words) or (left and right):
            return "both"
        if left or right:
            return "left" if left else "right"
    return ""
