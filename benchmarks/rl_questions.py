"""Questions for ``rl_against_control.py`` that are held out for measuring, and the report.

No model is run here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.boxes import Box
from medmo_edge.evaluation.compare import Paired, paired
from medmo_edge.evaluation.nano_cases import FIRST_SEED
from medmo_edge.images import Frame
from medmo_edge.prompts import locate_prompt
from medmo_edge.samples import Sample
from medmo_edge.train.asked import Asked, located, worded
from medmo_edge.train.questions import NODULE, PLATELET, WBC, yes_no
from medmo_edge.train.scenes import Scene, chest_scene

WITH_NODULE, WITHOUT = 300, 100
PHANTOM_SIZE = (320, 320)  # of those that are held out; it decides what drawing them costs
WORD_TOKENS = 8

Scores = list[dict[str, Any]]


@dataclass
class HeldOut:
    """What no training sees: BCCD's val smears, radiographs with questions for yes or no, and
    phantoms that are kept in ``cache``.
    """

    smears: Sequence[Scene]
    radiology: Sequence[Scene]
    cache: Path

    @cached_property
    def phantoms(self) -> list[Scene]:
        """From the evaluation's seeds on: the first with a nodule, then the first without."""
        if not self.cache.exists():
            self._keep(list(_first_phantoms()))
        with np.load(self.cache) as kept:
            pixels, boxes = kept["pixels"], kept["boxes"]
        return [
            Scene(
                kind="chest",
                pixels=np.repeat(grey[:, :, None], 3, axis=2),
                boxes=() if np.isnan(box).any() else (_nodule(box.tolist()),),
            )
            for grey, box in zip(pixels, boxes, strict=True)
        ]

    def _keep(self, scenes: Sequence[Scene]) -> None:
        nothing = (np.nan,) * 4
        found = [[box.xyxy for box in scene.labelled(NODULE.label)] for scene in scenes]
        np.savez(
            self.cache,
            pixels=np.stack([scene.pixels[:, :, 0] for scene in scenes]),
            boxes=np.array([boxes[0] if boxes else nothing for boxes in found]),
        )

    def questions(self) -> Iterator[tuple[str, int, list[tuple[str, Asked]]]]:
        """(what, tokens to answer in, pictures with their question), in the plainest wording."""
        some = self.phantoms[-2 * WITHOUT :]  # as many with a nodule as without
        for target, scenes in ((NODULE, self.phantoms), (WBC, self.smears)):
            boxes = [located(one, target, locate_prompt(target.singular[0])) for one in scenes]
            yield f"{target.label} IoU", 64, _items(scenes, boxes)
        question = f"How many {WBC.plural[0]} are there?"
        counts = [worded(question, str(one.count(WBC.label))) for one in self.smears]
        yield "WBC count", WORD_TOKENS, _items(self.smears, counts)
        for target, scenes in ((NODULE, some), (PLATELET, self.smears)):
            question = f"Is there a {target.singular[0]}?"
            seen = [worded(question, yes_no(one.count(target.label) > 0)) for one in scenes]
            yield f"{target.label} presence", WORD_TOKENS, _items(scenes, seen)
        told = [
            (str(index), Asked(worded(*turn), Frame.from_pixels(scene.pixels)))
            for index, scene in enumerate(self.radiology)
            for turn in scene.turns
        ]
        yield "VQA-RAD yes or no", WORD_TOKENS, told


def _nodule(xyxy: Sequence[float]) -> Box:
    x1, y1, x2, y2 = xyxy
    return Box(NODULE.label, x1, y1, x2, y2)


def _first_phantoms() -> Iterator[Scene]:
    kept: dict[bool, list[Scene]] = {True: [], False: []}
    wanted = {True: WITH_NODULE, False: WITHOUT}
    seed = FIRST_SEED
    while any(len(kept[has]) < wanted[has] for has in kept):
        scene = chest_scene.__wrapped__(seed, PHANTOM_SIZE)
        has = scene.count(NODULE.label) > 0
        if len(kept[has]) < wanted[has]:
            kept[has].append(scene)
        seed += 1
    return iter(kept[True] + kept[False])


def _items(scenes: Sequence[Scene], samples: Sequence[Sample]) -> list[tuple[str, Asked]]:
    return [
        (str(index), Asked(sample, Frame.from_pixels(scene.pixels)))
        for index, (scene, sample) in enumerate(zip(scenes, samples, strict=True))
    ]


def values_of(scores: Scores, what: str) -> tuple[list[float], list[str]]:
    """One value per true box, or per word; and the picture of each."""
    values: list[float] = []
    pictures: list[str] = []
    for score in scores:
        if score["what"] == what:
            own = score["ious"] if "ious" in score else [score["value"]]
            values += own
            pictures += [score["picture"]] * len(own)
    return values, pictures


def kinds(scores: Scores) -> list[str]:
    """What was asked, in order."""
    return list(dict.fromkeys(score["what"] for score in scores))


def brief(scores: Scores) -> str:
    """Means on one line, with the parts of boxes above 0.5 and 0.75, and boxes too many."""
    parts = []
    for what in kinds(scores):
        values = np.array(values_of(scores, what)[0])
        text = f"{what} {values.mean():.4f}"
        if what.endswith("IoU"):
            extra = sum(score["extra"] for score in scores if score["what"] == what)
            text += f" ({np.mean(values >= 0.5):.3f} / {np.mean(values >= 0.75):.3f}, +{extra})"
        parts.append(text)
    return ", ".join(parts)


def render(folders: Sequence[Path]) -> str:
    """Every run at its end, and the paired differences to the start and to the last run."""
    ends = {
        folder.name: json.loads((folder / "answers-end.json").read_text()) for folder in folders
    }
    start = json.loads((folders[0] / "answers-start.json").read_text())
    lines = [f"start: {brief(start['scores'])}"]
    lines += [
        f"{name}: {end['step']} steps, {end['seconds']} CPU s: {brief(end['scores'])}"
        for name, end in ends.items()
    ]
    last = folders[-1].name
    pairs = [(start, end, f"{name} - start") for name, end in ends.items()]
    pairs += [(ends[last], end, f"{name} - {last}") for name, end in ends.items() if name != last]
    for first, second, title in pairs:
        lines.append(f"\n{title} (95 % interval over pictures, p of sign flips)")
        lines += [
            f"  {what}: {_difference(first, second, what)}" for what in kinds(start["scores"])
        ]
    return "\n".join(lines)


def _difference(first: dict[str, Any], second: dict[str, Any], what: str) -> str:
    a, pictures = values_of(first["scores"], what)
    b, _ = values_of(second["scores"], what)
    found: Paired = paired(a, b, pictures)
    low, high = found.interval
    return f"{found.difference:+.4f} [{low:+.4f}, {high:+.4f}] p = {found.p_value:.4f}"
