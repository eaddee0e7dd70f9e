"""Retrieval questions from any captioned set: which text fits the picture, which picture the text.

The wrong candidates are drawn from the same samples, so build one split at a time. They are never
the same text or the same picture as the right one, but nothing makes them hard: a model may tell a
chest from a knee.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.errors import SampleError
from medmo_edge.evaluation.items import LETTERS, choice_prompt
from medmo_edge.prompts import user_message
from medmo_edge.samples import Sample, target_text

TASKS = ("caption", "report")
WHICH_TEXT = "Which of these texts belongs to the image?"
WHICH_IMAGE = "Which image belongs to this text? {text}"
_TRIES = 50  # draws per wanted candidate before a set counts as too uniform


@dataclass(frozen=True, slots=True)
class _Captioned:
    """A sample with its text on one line, as it is compared and shown."""

    sample: Sample
    text: str


def retrieval_samples(
    samples: Sequence[Sample], *, candidates: int = 4, seed: int = 0
) -> Iterator[Sample]:
    """Two ``retrieval`` samples, image to text and text to image, per captioned sample.

    Others are ignored. ``answer`` is the letter of the right one of ``candidates`` (2 to 26). The
    draw depends on ``seed``, the sample's id and the set. Errors: SampleError when the set has too
    few different texts or pictures.
    """
    if not 2 <= candidates <= len(LETTERS):
        raise SampleError(f"{candidates} candidates: a choice has 2 to {len(LETTERS)}")
    pool = [
        _Captioned(sample, " ".join(target_text(sample).split()))
        for sample in samples
        if sample.task in TASKS and sample.images
    ]
    if not pool:
        raise SampleError("retrieval needs captioned samples (task caption or report): none here")
    for right in pool:
        digest = hashlib.sha256(f"{seed} {right.sample.id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        shown = _shuffle(right, pool, candidates, rng)
        letter = LETTERS[shown.index(right)]
        yield _which_text(right, shown, letter)
        yield _which_image(right, shown, letter)


def _shuffle(
    right: _Captioned, pool: Sequence[_Captioned], candidates: int, rng: np.random.Generator
) -> list[_Captioned]:
    """``right`` and its rivals, all of different texts and pictures, in random order."""
    kept = [right]
    for _ in range(_TRIES * candidates):
        if len(kept) == candidates:
            break
        rival = pool[int(rng.integers(len(pool)))]
        if all(_differs(rival, other) for other in kept):
            kept.append(rival)
    if len(kept) < candidates:
        raise SampleError(
            f"retrieval among {candidates} needs as many different texts and pictures: "
            f"{len(pool)} captioned samples gave {len(kept)} beside {right.sample.id!r}"
        )
    order = rng.permutation(candidates)
    return [kept[int(place)] for place in order]


def _differs(a: _Captioned, b: _Captioned) -> bool:
    same_text = a.text.lower() == b.text.lower()
    return not same_text and set(a.sample.images).isdisjoint(b.sample.images)


def _which_text(right: _Captioned, shown: Sequence[_Captioned], letter: str) -> Sample:
    choices = tuple(one.text for one in shown)
    asked = user_message(choice_prompt(WHICH_TEXT, choices), len(right.sample.images))
    return _sample(right, "text", letter, choices, right.sample.images, asked)


def _which_image(right: _Captioned, shown: Sequence[_Captioned], letter: str) -> Sample:
    """One picture of each candidate: the first, so that their number does not tell."""
    choices = tuple(f"image {number}" for number in range(1, len(shown) + 1))
    asked = user_message(choice_prompt(WHICH_IMAGE.format(text=right.text), choices), len(shown))
    images = tuple(one.sample.images[0] for one in shown)
    return _sample(right, "image", letter, choices, images, asked)


def _sample(
    right: _Captioned,
    kind: str,
    letter: str,
    choices: tuple[str, ...],
    images: tuple[Path, ...],
    asked: dict[str, Any],
) -> Sample:
    return Sample(
        id=f"{right.sample.id}/which-{kind}",
        task="retrieval",
        images=images,
        messages=[asked, {"role": "assistant", "content": letter}],
        answer=letter,
        choices=choices,
        meta={"of": right.sample.id},
    )
