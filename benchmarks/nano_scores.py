"""Scores of MedMO-nano, or of a model trained like it, on pictures that it has never seen.

    python benchmarks/nano_scores.py MODEL --data DIR [--phantoms 200] [--json FILE]

MODEL is a checkpoint folder or "nano" (asked through transformers, float32, greedy) or an artifact
(asked through its runtime, greedy). Pictures: BCCD's val split, and phantoms whose seeds training
and its watching never draw. Questions are asked one at a time, as a user would. Answers of a model
that was trained on other labels are not understood.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.boxes import Geometry, parse_boxes
from medmo_edge.evaluation.scores import (
    answer_score,
    box_score,
    count_score,
    match_image,
)
from medmo_edge.train.blood import read_blood
from medmo_edge.train.questions import EFFUSION, HEART, NODULE, PLATELET, RBC, WBC, Target, yes_no
from medmo_edge.train.scenes import GONE, WHOLE, Scene, chest_scene, crop, visible_part

FIRST_SEED = 2_000_000
PHANTOM_SIZE = (512, 576)
Ask = Callable[[Sequence[Scene], str, int], list[str]]


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of the table, with what it was asked and what a constant answer would get."""

    question: str
    pictures: str
    figure: str
    value: float
    low: float
    high: float
    baseline: float | None
    note: str


def through_transformers(path: str) -> Ask:
    """Ask a checkpoint with transformers' own generate."""
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen3VLForConditionalGeneration

    from medmo_edge.checkpoint import open_checkpoint
    from medmo_edge.train.vocabulary import special_ids
    from medmo_edge.train.watch import Asker

    with open_checkpoint(path) as checkpoint:
        folder, limits = checkpoint.path, checkpoint.preprocessing
        tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    loader: Any = Qwen3VLForConditionalGeneration
    model = loader.from_pretrained(folder, dtype=torch.float32).train(False)
    return Asker(model, tokenizer, special_ids(tokenizer), limits).ask


def through_runtime(path: str) -> Ask:
    """Ask an artifact as an application would."""
    from medmo_edge import Frame, load

    session = load(path)

    def ask(scenes: Sequence[Scene], question: str, max_new_tokens: int) -> list[str]:
        frames = [Frame.from_pixels(np.ascontiguousarray(scene.pixels)) for scene in scenes]
        return [session.ask(f, question, max_new_tokens=max_new_tokens).text for f in frames]

    return ask


def locate(ask: Ask, scenes: Sequence[Scene], target: Target, question: str, tokens: int) -> Line:
    """Boxes of one target, on pictures with and without it."""
    matches, rejected = [], 0
    for scene, text in zip(scenes, ask(scenes, question, tokens), strict=True):
        parsed = parse_boxes(text, [geometry_of(scene)], "norm1000")
        rejected += len(parsed.rejected)
        predicted = [box.xyxy for box in parsed.boxes if box.label == target.label]
        matches.append(match_image([box.xyxy for box in scene.labelled(target.label)], predicted))
    score = box_score(matches)
    note = (
        f"IoU>=.5 {score.at_50:.3f}, >=.75 {score.at_75:.3f}; {score.num_truth} boxes, "
        f"{score.false_positives} false, {rejected} unreadable"
    )
    return Line(question, pictures(scenes), "mean IoU", score.mean_iou, *score.interval, None, note)


def geometry_of(scene: Scene) -> Geometry:
    """The scene's own size; norm1000 does not depend on the resized one."""
    height, width = scene.pixels.shape[:2]
    return Geometry(
        width=width,
        height=height,
        frame_width=width,
        frame_height=height,
        resized_width=width,
        resized_height=height,
    )


def presence(ask: Ask, scenes: Sequence[Scene], truth: Sequence[bool], question: str) -> Line:
    """Yes or no, against the more frequent answer."""
    score = answer_score([yes_no(value) for value in truth], ask(scenes, question, 8))
    note = f'always "{score.baseline_answer}": {score.baseline:.3f}'
    return Line(
        question,
        pictures(scenes),
        "accuracy",
        score.accuracy,
        *score.interval,
        score.baseline,
        note,
    )


def count(ask: Ask, scenes: Sequence[Scene], target: Target) -> Line:
    """How many, exactly; the note has the mean error."""
    question = f"How many {target.plural[0]} are there?"
    truth = [scene.count(target.label) for scene in scenes]
    score = count_score(truth, ask(scenes, question, 8))
    note = (
        f'always "{score.exact.baseline_answer}": {score.exact.baseline:.3f}; mean error '
        f"{score.mean_error:.2f}, of the median {score.baseline_error:.2f}; {score.unread} unread"
    )
    return Line(
        question,
        pictures(scenes),
        "exact",
        score.exact.accuracy,
        *score.exact.interval,
        score.exact.baseline,
        note,
    )


def quarters(scene: Scene) -> list[Scene]:
    """At most one quarter of a smear with a whole white cell, and at most one without any."""
    height, width = (side // 2 for side in scene.pixels.shape[:2])
    corners = [(0, 0), (width, 0), (0, height), (width, height), (width // 2, height // 2)]
    found: dict[bool, Scene] = {}
    for x, y in corners:
        window = (x, y, x + width, y + height)
        parts = [visible_part(box, window) for box in scene.labelled("WBC")]
        if max(parts, default=0) >= WHOLE or max(parts, default=0) <= GONE:
            found.setdefault(max(parts, default=0) >= WHOLE, crop(scene, window))
    return list(found.values())


def pictures(scenes: Sequence[Scene]) -> str:
    """What was shown, in few words."""
    kind = "smears" if scenes[0].kind == "blood" else "phantoms"
    return f"{len(scenes)} {kind}"


def blood_lines(ask: Ask, data: Path) -> list[Line]:
    """Everything that is asked about real blood smears."""
    scenes = read_blood(data, "val")
    parts = [part for scene in scenes for part in quarters(scene)]
    return [
        locate(ask, scenes, WBC, "Locate the white blood cell.", 128),
        locate(ask, scenes, RBC, "Locate the red blood cells.", 700),
        locate(ask, scenes, PLATELET, "Locate the platelets.", 256),
        presence(
            ask, parts, [part.count("WBC") > 0 for part in parts], "Is there a white blood cell?"
        ),
        presence(
            ask, scenes, [scene.count("Platelets") > 0 for scene in scenes], "Is there a platelet?"
        ),
        count(ask, scenes, WBC),
        count(ask, scenes, RBC),
        count(ask, scenes, PLATELET),
    ]


def chest_lines(ask: Ask, number: int) -> list[Line]:
    """Everything that is asked about drawn radiographs; half of them have a nodule."""
    scenes = [chest_scene(FIRST_SEED + index, PHANTOM_SIZE) for index in range(number)]
    nodule, effusion = ([scene.count(t.label) > 0 for scene in scenes] for t in (NODULE, EFFUSION))
    enlarged = [bool(scene.facts["heart_enlarged"]) for scene in scenes]
    return [
        locate(ask, scenes, NODULE, "Locate the nodule.", 64),
        locate(ask, scenes, EFFUSION, "Locate the pleural effusion.", 64),
        locate(ask, scenes, HEART, "Locate the heart.", 64),
        presence(ask, scenes, nodule, "Is there a nodule?"),
        presence(ask, scenes, effusion, "Is there a pleural effusion?"),
        presence(ask, scenes, enlarged, "Is the heart enlarged?"),
    ]


def show(lines: Sequence[Line]) -> None:
    """Print the table as markdown, as the model card has it."""
    print("| question | pictures | figure | value | 95 % interval | more |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        print(
            f"| {line.question} | {line.pictures} | {line.figure} | {line.value:.3f} | "
            f"{line.low:.3f} .. {line.high:.3f} | {line.note} |"
        )


def main() -> None:
    """Read the arguments, ask, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help='checkpoint folder, "nano" or artifact folder')
    parser.add_argument("--data", type=Path, required=True, help="folder that holds bccd/")
    parser.add_argument("--phantoms", type=int, default=200)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    artifact = (Path(arguments.model) / "manifest.json").is_file()
    ask = (through_runtime if artifact else through_transformers)(arguments.model)
    started = time.perf_counter()
    lines = blood_lines(ask, arguments.data) + chest_lines(ask, arguments.phantoms)
    show(lines)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    main()
