"""Questions about scenes for reinforcement learning: for boxes, for presence, for a number.

Each has one true answer that rules can judge. Questions to learn from in words, with many kinds of
answers, are in ``questions``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmo_edge.images import Frame
from medmo_edge.prompts import locate_prompt, user_message
from medmo_edge.samples import Sample
from medmo_edge.train.questions import LOCATE, NODULE, PLATELET, WBC, Target, yes_no
from medmo_edge.train.scenes import Scene, augment, chest_scene

TRAINING_SEEDS = 10_000_000  # phantoms from here on are drawn for reinforcement alone
_SEEDS = 10**8
_IMAGE = Path("drawn.png")  # never opened: frames are given


@dataclass(frozen=True, slots=True)
class Asked:
    """A sample with its picture, both as training sees them."""

    sample: Sample
    frame: Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Parts of the questions: ``blood`` about smears; ``located`` for boxes, ``present`` whether
    there are any. The rest are about phantoms; the rest are for numbers.
    """

    blood: float
    located: float
    present: float


def draw(smears: Sequence[Scene], shares: Shares, rng: np.random.Generator) -> Asked:
    """A question about a random view of a scene: white cells of smears, nodules of chests."""
    if smears and rng.random() < shares.blood:
        scene, target = smears[int(rng.integers(len(smears)))], WBC
    else:  # past the cache: no phantom comes twice
        scene = chest_scene.__wrapped__(TRAINING_SEEDS + int(rng.integers(_SEEDS)))
        target = NODULE
    return ask(augment(scene, rng), target, shares, rng)


def ask(view: Scene, target: Target, shares: Shares, rng: np.random.Generator) -> Asked:
    """A question about a view, of a kind that chance decides."""
    kind = rng.random()
    one, many = target.singular[0], target.plural[0]
    if kind < shares.located:
        plain = rng.random() < 0.5
        form = LOCATE[int(rng.integers(len(LOCATE)))]
        question = locate_prompt(one) if plain else form.format(one=one, many=many)
        sample = located(view, target, question)
    elif kind < shares.located + shares.present:
        seen = PLATELET if target is WBC and rng.random() < 0.5 else target
        sample = worded(f"Is there a {seen.singular[0]}?", yes_no(view.count(seen.label) > 0))
    else:
        sample = worded(f"How many {many} are there?", str(view.count(target.label)))
    return Asked(sample, Frame.from_pixels(view.pixels))


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
