"""Write labelled samples that MedMO-nano understands: drawn radiographs and blood smears.

    python benchmarks/nano_samples.py --phantoms 48 --smears train --data DATA -o FOLDER

FOLDER gets samples.jsonl and the drawn pictures; smears are named where they lie. Training's seeds
begin at 0 and of nano's own tests at 2,000,000: take others. For calibration, comparisons and
demos; nothing is trained here.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medmo_edge.prompts import locate_prompt, user_message
from medmo_edge.samples import Sample, write_samples
from medmo_edge.train.blood import read_blood, read_names
from medmo_edge.train.questions import (
    EFFUSION,
    HEART,
    NODULE,
    PLATELET,
    RBC,
    WBC,
    Target,
    described,
    yes_no,
)
from medmo_edge.train.scenes import Scene, chest_scene

FIRST_SEED = 5_000_000
PHANTOM_SIZE = (512, 576)


def scene_samples(scene: Scene, picture: Path, name: str) -> Iterator[Sample]:
    """Everything that is asked about one picture."""
    blood = scene.kind == "blood"
    for target in (WBC, RBC, PLATELET) if blood else (NODULE, EFFUSION, HEART):
        yield located(scene, picture, name, target)
    for target in (WBC, PLATELET) if blood else (NODULE, EFFUSION):
        question = f"Is there a {target.singular[0]}?"
        answer = yes_no(scene.count(target.label) > 0)
        yield asked(picture, f"{name}-is-{target.label}", "vqa", question, answer)
    if blood:
        question = f"How many {WBC.plural[0]} are there?"
        yield asked(picture, f"{name}-count", "vqa", question, str(scene.count(WBC.label)))
    else:
        answer = yes_no(bool(scene.facts["heart_enlarged"]))
        yield asked(picture, f"{name}-heart", "vqa", "Is the heart enlarged?", answer)
    yield asked(picture, f"{name}-text", "caption", "Describe the image.", described(scene))


def located(scene: Scene, picture: Path, name: str, target: Target) -> Sample:
    """Boxes of one target; the answer without any is the one nano learned."""
    what = target.plural[0] if target in (RBC, PLATELET) else target.singular[0]
    return Sample(
        id=f"{name}-locate-{target.label}",
        task="locate",
        images=(picture,),
        messages=[user_message(locate_prompt(what), 1)],
        boxes=scene.labelled(target.label),
        answer=f"No {target.singular[0]} found.",
    )


def asked(picture: Path, id: str, task: str, question: str, answer: str) -> Sample:
    """A question with a plain answer."""
    reply = {"role": "assistant", "content": answer}
    return Sample(
        id=id,
        task=task,
        images=(picture,),
        messages=[user_message(question, 1), reply],
        answer=answer if task == "vqa" else None,
    )


def phantoms(number: int, first_seed: int, folder: Path) -> Iterator[Sample]:
    """Samples of drawn radiographs, whose pictures are written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + number):
        scene = chest_scene(seed, PHANTOM_SIZE)
        picture = (folder / f"phantom-{seed}.png").absolute()
        Image.fromarray(np.ascontiguousarray(scene.pixels[:, :, 0])).save(picture)
        yield from scene_samples(scene, picture, f"phantom-{seed}")


def smears(data: Path, split: str, number: int | None) -> Iterator[Sample]:
    """Samples of BCCD's pictures of one split."""
    names = read_names(data / "bccd", split)
    for name, scene in list(zip(names, read_blood(data, split), strict=True))[:number]:
        picture = (data / "bccd" / "images" / f"{name}.jpg").absolute()
        yield from scene_samples(scene, picture, name)


def write_nano_samples(
    folder: Path,
    *,
    num_phantoms: int,
    first_seed: int = FIRST_SEED,
    data: Path | None = None,
    split: str = "train",
    num_smears: int | None = None,
) -> Path:
    """Write ``folder``/samples.jsonl and its pictures; returns the file."""
    samples: Sequence[Sample] = list(phantoms(num_phantoms, first_seed, folder / "images"))
    if data:
        samples = [*samples, *smears(data, split, num_smears)]
    write_samples(folder / "samples.jsonl", samples)
    return folder / "samples.jsonl"


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    parser.add_argument("--phantoms", type=int, default=48)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--data", type=Path, help="folder that holds bccd/")
    parser.add_argument("--smears", default="train", help="split of bccd/: train or val")
    parser.add_argument("--max-smears", type=int)
    arguments = parser.parse_args()
    path = write_nano_samples(
        arguments.output,
        num_phantoms=arguments.phantoms,
        first_seed=arguments.first_seed,
        data=arguments.data,
        split=arguments.smears,
        num_smears=arguments.max_smears,
    )
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
