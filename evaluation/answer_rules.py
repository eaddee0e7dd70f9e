"""Whether an answer is right: the published rules of MedEvalKit and MMMU, by name.

Each rule takes an answer and its gold and says right or wrong, and whether the answer could be read
at all: MedEvalKit's multiple choice guesses the most similar option, so "read" is our own figure
beside it. Rules, not bugs: docs/evaluation.md lists what differs. No model judges anything here.
"""

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The text after the last of these is the answer; tried in this order, one after the other.
_MARKS = (
    "**answer**:",
    "**answer**",
    "*answer*:",
    "**answer:**",
    "answer is",
    "answer:",
    "\u7b54\u6848:",
    "final answer",
    "final answer is",
)
_LETTER = re.compile(r"\(?([a-z])\)?(?:[.:)]|$)(?:\s|$)")
_OPTION_MARK = re.compile(r"^\s*\(?[a-z][.:)]\s*", re.IGNORECASE)
_EDGES = (",", ".", "!", "?", ";", ":", "'")


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on one answer; ``read`` is False where nothing in it was an answer.

    ``said`` is what was understood: a letter, "yes", a phrase.
    """

    right: bool
    read: bool
    said: str


def judge_choice(answer: str, gold: str, options: Sequence[str]) -> Judged:
    """Multiple choice. ``options`` as printed ("A. text"), ``gold`` a letter."""
    letters = [letter.lower() for letter in LETTERS[: len(options)]]
    printed = [option.lower() for option in options]
    gold = gold.strip().lower()
    whole = _lone_letter(_between_tags(answer).lower(), letters)
    text = _after_marks(tagged(whole)).strip().replace("\n", "")
    short = text.split(".")[0].split(":")[-1]
    if short == gold:
        return Judged(True, True, short)
    if short in letters:
        return Judged(printed[letters.index(short)] == gold, True, short)
    if short in printed:
        said = letters[printed.index(short)]
        return Judged(said == gold, True, said)
    said = letters[_most_similar(printed, text)]
    return Judged(said == gold, _names_option(text, printed, letters), said)


def _lone_letter(text: str, letters: Sequence[str]) -> str:
    """The first paragraph when it is a letter, else the last one up to its first full stop."""
    blocks = text.split("\n\n")
    if blocks[0] in letters:
        return blocks[0]
    last = blocks[-1].split(".")[0]
    return last if last in letters else text


def _most_similar(printed: Sequence[str], text: str) -> int:
    best, index = 0.0, 0
    for at, option in enumerate(printed):
        ratio = difflib.SequenceMatcher(None, option, text).ratio()
        if ratio > best:
            best, index = ratio, at
    return index


def _names_option(text: str, printed: Sequence[str], letters: Sequence[str]) -> bool:
    """Whether exactly one option is named, by its letter at the start or by its words."""
    start = _LETTER.match(text)
    if start:
        return start[1] in letters
    plain = text.strip(" .")
    return sum(_OPTION_MARK.sub("", option).strip(" .") == plain for option in printed) == 1


def judge_yes_no(answer: str, gold: str) -> Judged:
    """Right when exactly one of "yes" and "no" occurs, anywhere in a word, and it is the gold one.

    ``read`` asks for whole words: by the published rule "normal" holds a "no".
    """
    text = _plain(answer)
    has_yes, has_no = "yes" in text, "no" in text
    said = "yes" if has_yes and not has_no else "no" if has_no and not has_yes else ""
    words = set(re.findall(r"[a-z]+", text))
    return Judged(bool(said) and gold.lower() in text, len(words & {"yes", "no"}) == 1, said)


def judge_phrase(answer: str, gold: str) -> Judged:
    """Closed question with a word or phrase: equal but for case, line ends and full stops."""
    said = _plain(answer).strip()
    return Judged(said == gold.lower().strip(), bool(said), said)


def judge_open(answer: str, gold: str) -> Judged:
    """Open question: exact match in lower case. The published judge model is not here."""
    said = _after_marks(tagged(answer).lower()).strip()
    return Judged(said == gold.lower().strip(), bool(said), said)


def judge_count(answer: str, gold: str) -> Judged:
    """A whole number: the first one of the answer."""
    found = re.search(r"\d{1,6}", answer)
    said = str(int(found[0])) if found else ""
    return Judged(said == gold, found is not None, said)


def judge_mmmu_choice(answer: str, gold: str, options: Sequence[str], seed: str = "") -> Judged:
    """MMMU's reading: "(A)", else " A ", else the option's text; the last one named wins.

    Without any of them a letter is drawn, as in the published code, but the same one every time
    for one ``seed``. ``options`` are bare texts.
    """
    text = (_between_tags(answer) if "<answer>" in answer else tagged(answer)).strip()
    for edge in _EDGES:
        text = text.strip(edge)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    places = {letter: text.rfind(f"({letter})") for letter in letters}
    if max(places.values()) < 0:
        places = {letter: text.rfind(f" {letter} ") for letter in letters}
    if max(places.values()) < 0 and len(text.split()) > 5:
        lower = text.lower()
        places = {
            letter: lower.rfind(option.lower())
            for letter, option in zip(letters, options, strict=True)
        }
    last = max(places.values())
    if last < 0:
        said = random.Random(f"medmo-edge {seed}").choice(letters)
        return Judged(said == gold, False, said)
    said = next(letter for letter, place in places.items() if place == last)
    return Judged(said == gold, True, said)


def judge_mmmu_open(answer: str, golds: Sequence[str]) -> Judged:
    """MMMU's open items: a gold text inside a key phrase of the answer, or an equal number."""
    said = _mmmu_values(answer)
    wanted = [value for gold in golds for value in _mmmu_normal(gold)]
    texts = [value for value in wanted if isinstance(value, str)]
    numbers = [value for value in wanted if isinstance(value, float)]
    right = any(
        any(text in value for text in texts) if isinstance(value, str) else value in numbers
        for value in said
    )
    return Judged(right, bool(answer.strip()), answer.strip()[:80])


def _mmmu_values(answer: str) -> list[str | float]:
    phrases = _key_phrases(tagged(answer))
    numbers = [number for phrase in phrases for number in _NUMBERS.findall(phrase)]
    return [value for text in [*phrases, *numbers] for value in _mmmu_normal(text)]


_NUMBERS = re.compile(
    r"-?\b\d{1,3}(?:,\d{3})+\b|-?\d+(?:\.\d+)?[eE][+-]?\d+|-?(?:\d+\.\d+|\.\d+|\d+)"
)
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def _key_phrases(answer: str) -> list[str]:
    """The shortest text after "is", "thus", ... in each line; without one the whole answer."""
    text = answer.strip().strip(".").lower()
    lines = re.split(r"\n", text)
    found = []
    for number, line in enumerate(lines, start=1):
        marks = (*_INDICATORS, "=") if number == len(lines) else _INDICATORS
        tails = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest and shortest not in _EDGES:
            found.append(shortest)
    return found or [text]


def _mmmu_normal(text: str) -> list[str | float]:
    """A number to two digits, else lower case; one letter must stand beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def tagged(answer: str) -> str:
    """What stands in the last ``\\boxed{}``, else between ``<answer>`` tags, else the answer."""
    boxed = _boxed(answer)
    return _between_tags(answer) if boxed is None else boxed


def _between_tags(answer: str) -> str:
    inner = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    return " ".join(inner).strip() or answer


def _boxed(answer: str) -> str | None:
    start = answer.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start + len("\\boxed"), len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[at], 0)
        if depth == 0:
            return answer[start + len("\\boxed{") : at]
    return None


def _after_marks(text: str) -> str:
    for mark in _MARKS:
        text = text.split(mark)[-1]
    return text


def _plain(answer: str) -> str:
    return _after_marks(tagged(answer).lower()).replace("\n", "").replace(".", "")
