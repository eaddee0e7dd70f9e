"""Rewards for facts: the chosen option, yes or no, a number with its unit, a report's findings.

Rules, no model: each is 0..1, 1 for the perfect answer, and None where it does not apply. An answer
that keeps several possibilities open earns 0, however one of them reads. English only; free text is
not judged.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medmo_edge.evaluation.findings import Finding, find_findings
from medmo_edge.evaluation.items import LETTERS

ABSENT_WEIGHT = 0.25  # a finding denied, against one present: normal sentences are cheap
HALF_SIDED = 0.5  # credit of a finding of which only one text names the side
TOLERANCE = 0.05  # of a measurement; counts are exact

_STATED = re.compile(
    r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}|(?:final )?answer(?: is|:)[ \t]*(.*)", re.I | re.S
)
_MARKED = re.compile(r"(?<![A-Za-z])\(?([A-Z])[).:](?=\s|$)|\(([A-Z])\)")
_ALONE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])")
_ARTICLE = re.compile(r"\b(?:A|I)(?= (?!or\b|and\b)[a-z])")
_POLARITY = re.compile(r"\b(yes|no)\b", re.I)
_NUMBER = re.compile(
    r"(?<![\w.])([-+]?\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
    r"(?:-(?=[a-z])|\s*)(%|[a-z\u00b5\u00b0]+\^?[23]?)?(?!\w)",
    re.I,
)
# "2 x 3 cm" and "2 to 3 cm": the unit at the end belongs to both numbers.
_JOINED = re.compile(r"(?<=\d)\s*(?:x|\u00d7|by|to|-|\u2013)\s*(?=\d)", re.I)
_WORDS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
}
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.I)
#: unit -> (what it measures, how much of the base unit)
UNITS: dict[str, tuple[str, float]] = {
    "mm": ("length", 1.0),
    "millimeter": ("length", 1.0),
    "millimetre": ("length", 1.0),
    "cm": ("length", 10.0),
    "centimeter": ("length", 10.0),
    "centimetre": ("length", 10.0),
    "m": ("length", 1000.0),
    "mm2": ("area", 1.0),
    "cm2": ("area", 100.0),
    "ml": ("volume", 1.0),
    "cc": ("volume", 1.0),
    "mm3": ("volume", 0.001),
    "cm3": ("volume", 1.0),
    "l": ("volume", 1000.0),
    "hu": ("density", 1.0),
    "%": ("part", 1.0),
    "percent": ("part", 1.0),
    "bpm": ("rate", 1.0),
    "mmhg": ("pressure", 1.0),
    "degree": ("angle", 1.0),
    "\u00b0": ("angle", 1.0),
    "mg": ("mass", 1.0),
    "g": ("mass", 1000.0),
    "kg": ("mass", 1e6),
    "day": ("time", 1.0),
    "week": ("time", 7.0),
    "month": ("time", 30.44),
    "year": ("time", 365.25),
}


def option_reward(text: str, letter: str, choices: Sequence[str]) -> float:
    """1 when the answer chooses ``letter`` of ``choices`` and nothing else."""
    return float(chosen_option(text, choices) == letter.strip().upper())


def chosen_option(text: str, choices: Sequence[str]) -> str | None:
    """The one letter that ``text`` chooses: as a letter, as the option's text, or both alike.

    None when it names none, several, or a letter with another option's text.
    """
    part = _stated(text)
    known = tuple(LETTERS[: len(choices)])
    plain = _plain(part)
    exact = [
        letter for letter, choice in zip(known, choices, strict=True) if _plain(choice) == plain
    ]
    if plain and exact and plain.upper() not in known:
        return exact[0] if len(exact) == 1 else None
    letters = {a or b for a, b in _MARKED.findall(part)} & set(known)
    rest = _ARTICLE.sub("", part)
    for choice in choices:  # the C of "vitamin C" is no option
        rest = re.sub(re.escape(choice), " ", rest, flags=re.I) if len(choice) > 1 else rest
    letters |= set(_ALONE.findall(rest)) & set(known)
    if not letters and len(plain) == 1:
        letters = {plain.upper()} & set(known)
    if len(letters) != 1:
        return None
    (letter,) = letters
    return None if _names_another(part, letter, known, choices) else letter


def _names_another(part: str, letter: str, known: Sequence[str], choices: Sequence[str]) -> bool:
    """Whether the text also spells out an option of another letter, and not its own."""
    plain = _plain(part)
    own = _plain(choices[known.index(letter)])
    others = [_plain(choice) for choice in choices]
    others = [choice for choice in others if choice != own and _holds(plain, choice)]
    # An option that is part of the own one ("lung" in "left lung") says nothing.
    return any(not (_holds(own, choice) and _holds(plain, own)) for choice in others)


def _holds(text: str, part: str) -> bool:
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def _stated(text: str) -> str:
    """What an answer says after "answer is", in <answer> or in a box; else all of it.

    Several such answers are all of what it says.
    """
    found = [group for stated in _STATED.findall(text) for group in stated if group]
    return "\n".join(found).strip() if found else text.strip()


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w%.+/-]+", " ", text.lower()).split()).strip(" .")


def yes_no_reward(text: str, answer: str) -> float:
    """1 when the answer says ``answer`` ("yes" or "no") and does not also say the other."""
    return float(said_yes_no(text) == answer.strip().lower())


def said_yes_no(text: str) -> str | None:
    """ "yes", "no", or None for neither or both.

    An answer that opens with one of them means it, and may then deny something ("Yes, but there is
    no effusion"); unless the other follows at once ("yes or no") or as a sentence of its own.
    """
    part = _stated(text).lower()
    said = [found[1].lower() for found in _POLARITY.finditer(part)]
    if len(set(said)) == 1:
        return said[0]
    lead = re.match(r"\W*(yes|no)\b", part)
    if not said or not lead:
        return None
    rest = part[lead.end() :]
    other = "no" if lead[1] == "yes" else "yes"
    at_once = re.match(rf"\W*(?:(?:and|or)\W+)?{other}\b", rest)
    own_sentence = re.search(rf"[.;,!?/\n]\s*{other}\s*(?:[.;,!?/\n]|$)", rest)
    return None if at_once or own_sentence else lead[1]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number in the base unit of what it measures; ``kind`` is "" for a bare number."""

    value: float
    kind: str


def number_reward(text: str, answer: str, *, tolerance: float = TOLERANCE) -> float | None:
    """1 when the answer gives the number of ``answer``, converted to its unit; None if it has none.

    Bare numbers must be equal, measurements within ``tolerance`` of the truth. Several different
    numbers of the same kind are no answer, unless the truth has as many ("2 x 3 cm").
    """
    wanted = sorted(read_quantities(answer), key=_order)
    if not wanted:
        return None
    kinds = {one.kind for one in wanted}
    found = sorted((one for one in read_quantities(_stated(text)) if one.kind in kinds), key=_order)
    if len(wanted) == 1:
        found = sorted(set(found), key=_order)
    if len(found) != len(wanted):
        return 0.0
    pairs = zip(wanted, found, strict=True)
    return float(all(_equal(one, other, tolerance) for one, other in pairs))


def _order(quantity: Quantity) -> tuple[str, float]:
    return quantity.kind, quantity.value


def _equal(wanted: Quantity, found: Quantity, tolerance: float) -> bool:
    allowed = tolerance * abs(wanted.value) if wanted.kind else 0.0
    return wanted.kind == found.kind and abs(wanted.value - found.value) <= allowed + 1e-9


def read_quantities(text: str) -> list[Quantity]:
    """Every number of ``text`` in base units; words up to twelve count, unknown units do not.

    In "2 x 3 cm" and "2-3 cm" both numbers have the unit.
    """
    digits = _WORD.sub(lambda found: _WORDS[found[0].lower()], text)
    quantities: list[Quantity] = []
    pending: list[float] = []
    for found in _NUMBER.finditer(_JOINED.sub(" x ", digits)):
        value = float(found[1].replace(",", ""))
        unit = (found[2] or "").lower().replace("^", "")
        if unit == "x":
            pending.append(value)
            continue
        kind, factor = _unit(unit)
        quantities += [Quantity(one * factor, kind) for one in [*pending, value]]
        pending = []
    return quantities + [Quantity(one, "") for one in pending]


def is_quantity(answer: str) -> bool:
    """Whether ``answer`` is numbers with their units (or one word each) and nothing else."""
    digits = _JOINED.sub(" x ", _WORD.sub(lambda found: _WORDS[found[0].lower()], answer))
    return bool(read_quantities(answer)) and not _NUMBER.sub("", digits).strip(" .,~")


def _unit(name: str) -> tuple[str, float]:
    """What a unit measures and its size; a word that is no unit leaves the number bare."""
    return UNITS.get(name) or UNITS.get(name.removesuffix("s")) or ("", 1.0)


def findings_reward(text: str, truth: str) -> float | None:
    """Agreement of the findings of two reports, present and denied, with their sides.

    An F1 over statements: a finding present (or uncertain) weighs 1, a denied one
    ``ABSENT_WEIGHT``; the other side, or present against denied, is no agreement; only one text
    naming a side is half of one. Sentences said again divide the result. None when the truth names
    no finding of the vocabulary.
    """
    wanted = {found.label: found for found in find_findings(truth)}
    if not wanted:
        return None
    said = {found.label: found for found in find_findings(text)}
    shared = sum(
        _weight(wanted[label]) * _credit(wanted[label], said[label])
        for label in wanted.keys() & said.keys()
    )
    total = sum(map(_weight, wanted.values())) + sum(map(_weight, said.values()))
    return 2 * shared / total * min(1.0, variety(text) / variety(truth))


def _weight(found: Finding) -> float:
    return ABSENT_WEIGHT if found.status == "absent" else 1.0


def _credit(wanted: Finding, said: Finding) -> float:
    if (wanted.status == "absent") != (said.status == "absent"):
        return 0.0
    if wanted.status == "absent" or wanted.side == said.side:
        return 1.0
    return 0.0 if wanted.side and said.side else HALF_SIDED


def variety(text: str) -> float:
    """Different sentences over all sentences, 0..1; 1 for a text without any."""
    sentences = [_plain(part) for part in re.split(r"[.!?;]+(?:\s|$)|\n+", text)]
    sentences = [sentence for sentence in sentences if sentence]
    return len(set(sentences)) / len(sentences) if sentences else 1.0
