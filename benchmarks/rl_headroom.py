"""How much can reinforcement gain from what a checkpoint already knows?

    python benchmarks/rl_headroom.py CHECKPOINT --data DIR

Reinforcement moves probability towards the better ones of a model's own answers. Whether there is
anything to be had shows before any training: every held-out picture with one true box (phantoms
with a nodule, BCCD's val smears with one white cell) is answered greedily and by a group of drawn
answers, and the table compares mean IoU with the truth of

- the greedy answer, and the mean of the drawn ones;
- the drawn box that overlaps most with the others: the best choice without knowing the truth;
- the box of the median corners: better than any single answer, where their errors are independent;
- the best drawn box, chosen by the truth: nobody can learn this from the picture alone.

The differences to the greedy answer have 95 % intervals over pictures. In float32, one thread.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rl_answers import answers, decoding
from rl_questions import HeldOut

from medmo_edge.boxes import Geometry, iou, pairwise_iou, parse_boxes
from medmo_edge.evaluation.compare import paired
from medmo_edge.train.asked import Asked
from medmo_edge.train.attention import use_products
from medmo_edge.train.base_model import load_base
from medmo_edge.train.blood import read_blood
from medmo_edge.train.rollouts import Answer, Decoding
from medmo_edge.train.scene_stages import Asking

CHUNK = 16
Corners = Sequence[float]
ROWS = {
    "drawn": "mean of the drawn",
    "central": "drawn, most like the others",
    "median": "median corners",
    "best": "best of the drawn",
}


@dataclass(frozen=True)
class Answered:
    """The true box of a picture, the greedy one, and the drawn ones; None where none was said."""

    truth: Corners
    greedy: Corners | None
    drawn: list[Corners | None]


def main() -> None:
    """Draw, and print a table per kind of question."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path, default=os.environ.get("MEDMO_EDGE_DATA"))
    parser.add_argument("--answers", type=int, default=16, help="drawn for each picture")
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("set MEDMO_EDGE_DATA or --data to the folder that holds bccd/")
    torch.set_num_threads(1)
    drawer = Drawer(arguments.checkpoint, arguments.answers, arguments.temperature)
    with tempfile.TemporaryDirectory() as scratch:
        smears = read_blood(arguments.data, "val")
        held_out = HeldOut(smears, [], Path(scratch) / "phantoms.npz")
        for what, tokens, items in held_out.questions():
            asked = [one for _, one in items if len(one.sample.boxes) == 1]
            if what.endswith("IoU"):
                print(table(what, list(drawer.answer(asked, tokens))), flush=True)


class Drawer:
    """A checkpoint that answers greedily and by chance."""

    def __init__(self, checkpoint: str, answers: int, temperature: float) -> None:
        """Loads it."""
        self.base = load_base(checkpoint, precision="float32")
        use_products(self.base.model)
        base = self.base
        self.asking = Asking(chat=base.chat, limits=base.limits, coords=base.coords)
        self.groups, self.temperature = answers, temperature

    def answer(self, asked: Sequence[Asked], tokens: int) -> Iterator[Answered]:
        """What is said about each picture, in order."""
        greedy = self._boxes(asked, decoding(self.base, 1, tokens, 0.0))
        drawn = self._boxes(asked, decoding(self.base, self.groups, tokens, self.temperature))
        for one, (first,), group in zip(asked, greedy, drawn, strict=True):
            yield Answered(one.sample.boxes[0].xyxy, first, group)

    def _boxes(self, asked: Sequence[Asked], drawing: Decoding) -> Iterator[list[Corners | None]]:
        for prompt, group in answers(self.base, self.asking, asked, drawing, CHUNK):
            yield [self._box(one, prompt.geometries) for one in group]

    def _box(self, answer: Answer, geometries: Sequence[Geometry]) -> Corners | None:
        """The box of an answer that has just one."""
        text = self.base.tokenizer.decode(answer.ids)
        found = parse_boxes(text, geometries, self.base.coords).boxes
        return found[0].xyxy if len(found) == 1 else None


def worth(answered: Answered) -> dict[str, float]:
    """IoU with the truth of each way to answer; 0 where no box is said."""
    said = [box for box in answered.drawn if box is not None]
    values = [iou(box, answered.truth) for box in said] + [0.0] * (len(answered.drawn) - len(said))
    found = {"drawn": float(np.mean(values)), "best": max(values), "central": 0.0, "median": 0.0}
    if answered.greedy is not None:
        found["greedy"] = iou(answered.greedy, answered.truth)
    if 2 * len(said) > len(answered.drawn):  # most say that there is one
        found["central"] = values[int(pairwise_iou(said, said).mean(axis=1).argmax())]
        found["median"] = iou(np.median(np.array(said), axis=0).tolist(), answered.truth)
    return {"greedy": 0.0} | found


def table(what: str, answered: Sequence[Answered]) -> str:
    """Mean IoU of each way, and the difference to the greedy answer."""
    found = [worth(one) for one in answered]
    columns = {name: [one[name] for one in found] for name in ("greedy", *ROWS)}
    pictures = [str(index) for index in range(len(found))]
    lines = [f"{what}, {len(found)} pictures: greedy {np.mean(columns['greedy']):.4f}"]
    for name, title in ROWS.items():
        pair = paired(columns["greedy"], columns[name], pictures)
        low, high = pair.interval
        change = f"{pair.difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(f"  {title:<28} {pair.second:.4f}  {change}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
