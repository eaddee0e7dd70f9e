"""Cases: one question of a benchmark as it is asked, with all that its score needs.

The words of the prompts are MedEvalKit's (question_formats.py, English and, for SLAKE, Chinese, the
variants without reasoning) and MedSG-Bench's; the locate questions are MedMO's own. Pictures are
loaded here, one at a time. Which benchmark uses which words is in the table of benchmarks.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from medmo_edge.boxes import Box, Coords, Geometry, to_model
from medmo_edge.evaluation.items import LETTERS, Embedded, Item, per_label
from medmo_edge.images import Frame, read_image, replace_path
from medmo_edge.phantoms import Phantom, draw

MC_TAIL = "Answer with the option's letter from the given choices directly."
JUDGE_TAIL = "Please output 'yes' or 'no'(no extra output)."
CLOSE_TAIL = "Answer the question using a single word or phrase."
OPEN_TAIL = "Please answer the question concisely."
CLOSE_TAIL_ZH = (
    "\u8bf7\u7528\u4e00\u4e2a\u5355\u8bcd\u6216\u8005"
    "\u77ed\u8bed\u56de\u7b54\u8be5\u95ee\u9898\u3002"
)
OPEN_TAIL_ZH = "\u8bf7\u7b80\u8981\u56de\u7b54\u8be5\u95ee\u9898\u3002"
REPORT = (
    "You are a helpful assistant. Please generate a report for the given images, including both "
    "findings and impressions. Return the report in the following format: Findings: {} Impression: "
    "{}."
)
REPORT_INDENTED = f"\n        {REPORT}\n        "  # MIMIC-CXR alone, as published
# The published suffix for models that answer <box>[[...]]</box>, spelling included.
MEDSG_TAIL = "Format:<box>[[x1,y1,x2,y2]]</box>. Don't generate addtional words."

SHORT_ANSWER, PHRASE, LONG, BOX = 32, 128, 512, 512  # new tokens

_QUESTION_BOX = re.compile(
    r"(?:<\|box_start\|>)?\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)"
    r"(?:<\|box_end\|>)?|\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]"
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A phantom that is drawn when it is shown; ``size`` is (width, height) in pixels."""

    seed: int
    size: tuple[int, int]

    @property
    def name(self) -> str:
        """What stands in reports for a file name."""
        return f"phantom-{self.seed}"


@dataclass(frozen=True, slots=True)
class Crop:
    """A window (x1, y1, x2, y2) in whole pixels of a picture file."""

    path: Path
    window: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """What stands in reports for a file name."""
        return f"{self.path.name}[{','.join(map(str, self.window))}]"


Shown = Path | Embedded | Drawn | Crop


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question. ``sample`` is the publisher's item that it belongs to; one item may ask more.

    ``rule`` names how it is scored; ``gold``, ``golds``, ``options`` (as printed) and ``boxes``
    (source pixels) are what the rule needs. ``groups`` are the figures' breakdowns.
    """

    id: str
    sample: str
    question: str
    rule: str
    images: tuple[Shown, ...] = ()
    image_texts: tuple[str, ...] = ()
    max_new_tokens: int = 512
    gold: str = ""
    golds: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


def load_frame(picture: Shown) -> Frame:
    """The pixels of a picture. Errors: ImageError naming it."""
    if isinstance(picture, Path):
        return read_image(picture)
    if isinstance(picture, Drawn):
        return Frame.from_pixels(drawn(picture).pixels, path=picture.name)
    if isinstance(picture, Crop):
        x1, y1, x2, y2 = picture.window
        pixels = read_image(picture.path).pixels[y1:y2, x1:x2]
        return Frame.from_pixels(np.ascontiguousarray(pixels), path=picture.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{Path(picture.name).suffix}"
        path.write_bytes(picture.data)
        return replace_path(read_image(path), picture.name)


@lru_cache(maxsize=256)
def drawn(picture: Drawn) -> Phantom:
    """The phantom itself; drawing one takes a fifth of a second."""
    return draw(picture.seed, size=picture.size)


def choice_text(question: str, options: Sequence[str]) -> str:
    """The published multiple-choice prompt; ``options`` as printed."""
    return "\nQuestion: {}\nOptions: \n{}\n{}".format(question, "\n".join(options), MC_TAIL)


def mmmu_text(question: str, options: Sequence[str]) -> str:
    """MMMU's prompt, its blanks included; without options the closing words of a phrase."""
    if not options:
        return f"\n{question}\n\n        {CLOSE_TAIL}"
    lines = "".join(f"({letter}) {text}\n" for letter, text in zip(LETTERS, options, strict=False))
    return f"\n{question}\n\n{lines}\n\n        {MC_TAIL}"


def lettered(choices: Sequence[str], form: str) -> tuple[str, ...]:
    """Options as printed: ``form`` is "{}. {}" or "{}.{}", the publisher's own."""
    return tuple(form.format(letter, text) for letter, text in zip(LETTERS, choices, strict=False))


def image_texts(item: Item, listed: bool = False) -> tuple[str, ...]:
    """MedEvalKit's texts before the images of a list; ``listed``: its lists may hold one image."""
    count = len(item.images)
    if count < 2 and not listed:
        return ()
    return tuple(f"<image_{number}>: " for number in range(1, count + 1))


def convert_boxes(question: str, geometry: Geometry, coords: Coords) -> str:
    """A question whose boxes in source pixels are rewritten in the model's convention."""

    def rewrite(found: re.Match[str]) -> str:
        values = [float(value) for value in found.groups() if value is not None]
        row = ", ".join(map(str, to_model(values, geometry, coords)))
        return f"<box>[[{row}]]</box>"

    return _QUESTION_BOX.sub(rewrite, question)


def _case(item: Item, question: str, rule: str, tokens: int, **more: object) -> Case:
    return replace(
        Case(
            id=item.id,
            sample=item.id,
            question=question,
            rule=rule,
            images=item.images,
            image_texts=image_texts(item),
            max_new_tokens=tokens,
            gold=item.answer or "",
        ),
        **more,  # type: ignore[arg-type]
    )


def ask_choice(item: Item, form: str = "{}. {}", listed: bool = False) -> Iterator[Case]:
    """Multiple choice; ``form`` prints an option. A context stands before the question."""
    options = lettered(item.choices, form)
    text = choice_text(item.question, options)
    if item.meta.get("context"):
        text = f"Context: {item.meta['context']}\n{text}"
    named = image_texts(item, listed)
    yield _case(item, text, "choice", SHORT_ANSWER, options=options, image_texts=named)


def ask_mmmu(item: Item) -> Iterator[Case]:
    """MMMU's multiple choice or, without options, its open question."""
    text = mmmu_text(item.question, item.choices)
    rule = "mmmu_choice" if item.choices else "mmmu_open"
    golds = tuple(item.meta["golds"])
    yield _case(item, text, rule, SHORT_ANSWER, options=item.choices, golds=golds)


def ask_vqa(item: Item) -> Iterator[Case]:
    """Yes or no where that is the gold answer, else a concise answer."""
    closed = (item.answer or "").strip().lower() in ("yes", "no")
    tail = JUDGE_TAIL if closed else OPEN_TAIL
    kind = {"answer type": "closed" if closed else "open"}
    rule, tokens = ("yes_no", SHORT_ANSWER) if closed else ("open", PHRASE)
    yield _case(item, f"{item.question}\n{tail}", rule, tokens, groups=kind)


def ask_slake(item: Item) -> Iterator[Case]:
    """A phrase for closed questions, a concise answer for open ones, in the item's language."""
    closed = item.meta.get("answer_type") != "OPEN"
    chinese = item.meta.get("language") == "zh"
    tails = (OPEN_TAIL_ZH, CLOSE_TAIL_ZH)
    tail = (tails if chinese else (OPEN_TAIL, CLOSE_TAIL))[closed]
    gold = (item.answer or "").lower()
    rule = ("yes_no" if gold in ("yes", "no") else "phrase") if closed else "open"
    kind = {"answer type": "closed" if closed else "open"}
    yield _case(item, f"{item.question}\n{tail}", rule, PHRASE, groups=kind)


def ask_report(item: Item, prompt: str = REPORT, listed: bool = True) -> Iterator[Case]:
    """Both halves of a report, against the published reference string."""
    halves = [str(item.meta.get(key) or "") for key in ("findings", "impression")]
    gold = f"Findings: {halves[0]} Impression: {halves[1]}." if any(halves) else item.target or ""
    named = image_texts(item, listed)
    yield _case(item, prompt, "report", LONG, gold=gold, image_texts=named)


def ask_caption(item: Item) -> Iterator[Case]:
    """The item's own question, scored as a text."""
    yield _case(item, item.question, "report", LONG, gold=item.target or "")


def ask_locate(item: Item) -> Iterator[Case]:
    """One question per label that the picture shows."""
    for part in per_label(item):
        kind = {"label": part.boxes[0].label} if part.boxes else {}
        yield _case(
            part, part.question, "boxes", BOX, boxes=part.boxes, sample=item.id, groups=kind
        )


def ask_medsg(item: Item) -> Iterator[Case]:
    """MedSG-Bench: one box over several images, the first box counts."""
    text = f"{item.question} {MEDSG_TAIL}"
    yield _case(item, text, "first_box", PHRASE, boxes=item.boxes)
