"""What MedMO-nano is asked: blood smears of BCCD and phantoms drawn on the spot.

Every picture is asked where each thing is, whether it is there and how many there are, also where
the right answer is "none". A quarter of a smear can lack the white cell that a whole one never
lacks. The phantoms' seeds are used nowhere else: training and its watching draw others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from medmo_edge.boxes import Box
from medmo_edge.evaluation.cases import Case, Crop, Drawn, Shown, drawn
from medmo_edge.evaluation.items import Item
from medmo_edge.phantoms import EFFUSION, HEART, NODULE
from medmo_edge.prompts import locate_prompt

FIRST_SEED = 2_000_000
PHANTOM_SIZE = (512, 576)
PHANTOMS = 200
WHOLE, GONE = 0.75, 0.05  # a cell is in a quarter from the one, and out of it up to the other
SHORT = 8  # tokens of yes, no or a number


@dataclass(frozen=True, slots=True)
class Thing:
    """Something to look for: its box label, the words for it, tokens that its boxes need."""

    label: str
    located: str
    present: str
    plural: str
    tokens: int


CELLS = (
    Thing("WBC", "white blood cell", "a white blood cell", "white blood cells", 128),
    Thing("RBC", "red blood cells", "a red blood cell", "red blood cells", 700),
    Thing("Platelets", "platelets", "a platelet", "platelets", 256),
)
FINDINGS = (
    Thing(NODULE, "nodule", "a nodule", "nodules", 64),
    Thing(EFFUSION, "pleural effusion", "a pleural effusion", "pleural effusions", 64),
    Thing(HEART, "heart", "a heart", "hearts", 64),
)


def bccd_cases(item: Item) -> Iterator[Case]:
    """The questions about one smear and, where there are such, a quarter with and one without."""
    smear = item.images[0]
    base = Case(id=item.id, sample=item.id, question="", rule="", images=(smear,))
    for cell in CELLS:
        boxes = tuple(box for box in item.boxes if box.label == cell.label)
        yield _locate(base, cell, boxes)
        yield _count(base, cell, len(boxes))
    platelets = any(box.label == "Platelets" for box in item.boxes)
    yield _presence(base, CELLS[2], platelets)
    if isinstance(smear, Path):
        for shown, has_cell in _quarters(smear, item.boxes):
            name = f"{item.id}/quarter-{'with' if has_cell else 'without'}"
            yield _presence(replace(base, id=name, images=(shown,)), CELLS[0], has_cell)


def phantom_items(count: int = PHANTOMS) -> Iterator[Item]:
    """The held-out phantoms, in order of their seeds; their pictures are drawn when shown."""
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        phantom = drawn(Drawn(seed, PHANTOM_SIZE))
        yield Item(
            id=f"phantom-{seed}",
            task="locate",
            question="",
            where=f"seed {seed}",
            boxes=phantom.boxes + phantom.anatomy,
            meta={"seed": seed, "heart_enlarged": bool(phantom.facts["heart_enlarged"])},
        )


def phantom_cases(item: Item) -> Iterator[Case]:
    """The questions about one phantom."""
    shown = Drawn(item.meta["seed"], PHANTOM_SIZE)
    base = Case(id=item.id, sample=item.id, question="", rule="", images=(shown,))
    for thing in FINDINGS:
        boxes = tuple(box for box in item.boxes if box.label == thing.label)
        yield _locate(base, thing, boxes)
        if thing.label != HEART:
            yield _presence(base, thing, bool(boxes))
    yield _yes_no(base, "Is the heart enlarged?", item.meta["heart_enlarged"], "heart enlarged")


def _locate(base: Case, thing: Thing, boxes: tuple[Box, ...]) -> Case:
    return replace(
        base,
        id=f"{base.id}/locate-{thing.label}",
        question=locate_prompt(thing.located),
        rule="boxes",
        boxes=boxes,
        max_new_tokens=thing.tokens,
        groups={"label": thing.label},
    )


def _presence(base: Case, thing: Thing, present: bool) -> Case:
    return _yes_no(base, f"Is there {thing.present}?", present, f"presence of {thing.label}")


def _yes_no(base: Case, question: str, truth: bool, name: str) -> Case:
    return replace(
        base,
        id=f"{base.id}/{name.replace(' ', '-')}",
        question=question,
        rule="yes_no",
        gold="yes" if truth else "no",
        max_new_tokens=SHORT,
        groups={"question": name},
    )


def _count(base: Case, thing: Thing, number: int) -> Case:
    return replace(
        base,
        id=f"{base.id}/count-{thing.label}",
        question=f"How many {thing.plural} are there?",
        rule="count",
        gold=str(number),
        max_new_tokens=SHORT,
        groups={"question": f"count of {thing.label}"},
    )


def _quarters(smear: Path, boxes: tuple[Box, ...]) -> list[tuple[Shown, bool]]:
    """At most one quarter with a whole white cell, and at most one without any."""
    from PIL import Image

    with Image.open(smear) as picture:
        width, height = picture.width // 2, picture.height // 2
    corners = [(0, 0), (width, 0), (0, height), (width, height), (width // 2, height // 2)]
    found: dict[bool, Shown] = {}
    for x, y in corners:
        window = (x, y, x + width, y + height)
        parts = [_part_inside(box, window) for box in boxes if box.label == "WBC"]
        most = max(parts, default=0.0)
        if most >= WHOLE or most <= GONE:
            found.setdefault(most >= WHOLE, Crop(smear, window))
    return [(shown, has_cell) for has_cell, shown in found.items()]


def _part_inside(box: Box, window: tuple[int, int, int, int]) -> float:
    across = min(box.x2, window[2]) - max(box.x1, window[0])
    down = min(box.y2, window[3]) - max(box.y1, window[1])
    return max(0.0, across) * max(0.0, down) / box.area
