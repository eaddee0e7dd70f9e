"""Questions about scenes for reinforcement learning: for boxes, for presence, for a number.

Each has one true answer that rules can judge. Questions to learn from in words, with many kinds of
answers, are in ``questions``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medmo_edge.images import Frame
from medmo_edge.prompts import locate_prompt, user_message
from medmo_edge.samples import Sample
from medmo_edge.train.questions import (
    EFFUSION,
    HEART,
    LOCATE,
    NODULE,
    PLATELET,
    WBC,
    Target,
    yes_no,
)
from medmo_edge.train.scenes import Scene, augment, chest_scene

TRAINING_SEEDS = 10_000_000  # phantoms from here on are drawn for reinforcement alone
_SEEDS = 10**8
# What chests are asked to locate. Whatever is left out is forgotten: without effusions their mean
# IoU fell from 0.78 to 0.70 in 160 steps.
_CHEST = ((NODULE, 0.5), (EFFUSION, 0.3), (HEART, 0.2))
# Where nothing is, all answers of a group are soon right alike, and teach nothing: such views are
# only drawn for this part of the questions for boxes, where chance may still show something.
_ANY = 0.3
_TRIES = 16
_YES_NO = (yes_no(True), yes_no(False))
_IMAGE = Path("drawn.png")  # never opened: frames are given


@dataclass(frozen=True, slots=True)
class Asked:
    """A sample with its picture, both as training sees them."""

    sample: Sample
    frame: Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Parts of the questions: ``blood`` about smears, ``radiology`` about real radiographs, the
    rest about phantoms. Of smears and phantoms, ``located`` are for boxes, ``present`` ask whether
    there are any, the rest how many.
    """

    blood: float
    radiology: float
    located: float
    present: float


def draw(
    smears: Sequence[Scene],
    radiology: Sequence[Scene],
    shares: Shares,
    rng: np.random.Generator,
) -> Asked:
    """A question about a random view of a scene: cells of smears, findings and heart of chests.

    Pictures of ``radiology`` are asked what people asked about them: see ``with_yes_or_no``.
    """
    kind, place = rng.random(), rng.random()
    if radiology and shares.blood <= place < shares.blood + shares.radiology:
        return _told(radiology[int(rng.integers(len(radiology)))], rng)
    pool = smears if place < shares.blood else ()
    if kind < shares.located:
        target = WBC if pool else _chest_target(rng)
        return _boxes(_showing(pool, target, rng), target, rng)
    view, target = _view(pool, rng), WBC if pool else NODULE
    if kind < shares.located + shares.present:
        seen = target if rng.random() < 0.5 else PLATELET if pool else EFFUSION
        sample = worded(f"Is there a {seen.singular[0]}?", yes_no(view.count(seen.label) > 0))
    else:
        sample = worded(f"How many {target.plural[0]} are there?", str(view.count(target.label)))
    return Asked(sample, Frame.from_pixels(view.pixels))


def with_yes_or_no(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes that came with questions whose answer is yes or no, with these alone."""
    closed = [
        replace(scene, turns=tuple(turn for turn in scene.turns if turn[1] in _YES_NO))
        for scene in scenes
    ]
    return [scene for scene in closed if scene.turns]


def _told(scene: Scene, rng: np.random.Generator) -> Asked:
    question, answer = scene.turns[int(rng.integers(len(scene.turns)))]
    return Asked(worded(question, answer), Frame.from_pixels(augment(scene, rng).pixels))


def _view(smears: Sequence[Scene], rng: np.random.Generator) -> Scene:
    """A view of one of the smears, or of a new phantom when there are none."""
    if smears:
        return augment(smears[int(rng.integers(len(smears)))], rng)
    seed = TRAINING_SEEDS + int(rng.integers(_SEEDS))
    return augment(chest_scene.__wrapped__(seed), rng)  # past the cache: none comes twice


def _showing(smears: Sequence[Scene], target: Target, rng: np.random.Generator) -> Scene:
    """A view that shows the target, or now and then any view."""
    tries = 1 if rng.random() < _ANY else _TRIES
    for _ in range(tries):
        view = _view(smears, rng)
        if view.count(target.label):
            break
    return view


def _chest_target(rng: np.random.Generator) -> Target:
    return _CHEST[int(rng.choice(len(_CHEST), p=[part for _, part in _CHEST]))][0]


def _boxes(view: Scene, target: Target, rng: np.random.Generator) -> Asked:
    one, many = target.singular[0], target.plural[0]
    form = LOCATE[int(rng.integers(len(LOCATE)))]
    question = locate_prompt(one) if rng.random() < 0.5 else form.format(one=one, many=many)
    return Asked(located(view, target, question), Frame.from_pixels(view.pixels))


def located(view: Scene, target: Target, question: str) -> Sample:
    """The sample of a question for boxes."""
    return Sample(
        id="drawn",
        task="locate",
        images=(_IMAGE,),
        messages=[user_message(question, 1)],
        boxes=view.labelled(target.label),
        answer=f"No {target.singular[0]} found.",
    )


def worded(question: str, answer: str) -> Sample:
    """The sample of a question for a word or number."""
    reply = {"role": "assistant", "content": answer}
    messages = [user_message(question, 1), reply]
    return Sample(
        id="drawn",
        task="vqa",
        images=(_IMAGE,),
        messages=messages,
        answer=answer.strip(".").lower(),
    )
