"""Labelled samples as verification asks them: decoded images, one question, the truth.

An image that several samples share is decoded once when they follow each other. Conversations of
several turns are reduced to their last question; nothing is judged here.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmo_edge.errors import SampleError
from medmo_edge.images import Frame, read_image
from medmo_edge.phantoms import MIN_SIDE, draw
from medmo_edge.preprocess import Preprocessing
from medmo_edge.prompts import locate_prompt
from medmo_edge.samples import Sample, question_of, read_samples

PROBE = "probe"
_PROBE_SEED = 7_100_000
_PROBES = (("wide", 40, 2), ("tall", 2, 40))  # in vision tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One sample with its pixels; ``picture`` names what is not independent of other cases."""

    sample: Sample
    frames: tuple[Frame, ...]
    question: str

    @property
    def picture(self) -> str:
        """The images' paths, or the sample's id without images."""
        return " ".join(map(str, self.sample.images)) or self.sample.id


def read_checked(path: Path) -> list[Sample]:
    """All samples of a file, after looking that every one asks something and its images are there.

    Errors: SampleError naming how many images are missing and the first of them.
    """
    samples = list(read_samples(path))
    for sample in samples:
        question_of(sample)
    missing = sorted({image for s in samples for image in s.images if not image.is_file()})
    if missing:
        raise SampleError(f"{path}: {len(missing)} images are missing, the first is {missing[0]}")
    return samples


def open_cases(samples: Sequence[Sample]) -> Iterator[Case]:
    """The samples with their images read. Errors: ImageError."""
    paths: tuple[Path, ...] = ()
    frames: tuple[Frame, ...] = ()
    for sample in samples:
        if sample.images != paths:
            paths, frames = sample.images, tuple(read_image(path) for path in sample.images)
        yield Case(sample=sample, frames=frames, question=question_of(sample))


def probe_cases(preprocessing: Preprocessing) -> list[Case]:
    """A very wide and a very tall drawn picture: wrong positions show there, hide in square ones.

    They are measured with every sample set, but count for no score and no agreement.
    """
    factor, cases = preprocessing.factor, []
    for name, wide, high in _PROBES:
        size = max(MIN_SIDE, wide * factor + 3), max(MIN_SIDE, high * factor + 3)
        frame = Frame.from_pixels(draw(_PROBE_SEED, size=size, nodule=True).pixels, path=name)
        sample = Sample(id=f"{PROBE}:{name}", task=PROBE)
        cases.append(Case(sample=sample, frames=(frame,), question=locate_prompt("nodule")))
    return cases


def samples_sha256(path: Path, samples: Sequence[Sample]) -> str:
    """Hash of the sample file and of every image it names."""
    digest = hashlib.sha256(path.read_bytes())
    for image in sorted({image for sample in samples for image in sample.images}):
        digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()
