"""Does reinforcement learning beat the same time spent on more supervised training?

    B="python benchmarks/rl_against_control.py"
    $B run RUNS/rl --kind rl --data DIR --seconds 1200
    $B run RUNS/guided --kind rl --guided --learning-rate 4e-4 --data DIR --seconds 1200
    $B run RUNS/control --kind control --learning-rate 4e-4 --data DIR --seconds 1200
    $B report RUNS/rl RUNS/guided RUNS/control

All start from the same checkpoint (default: the shipped nano) and see pictures drawn alike: fresh
phantoms (seeds from 10,000,000, never drawn elsewhere), BCCD's training smears and VQA-RAD's
training pictures, asked as the rl stage of nano's recipe asks. ``--seconds`` are CPU seconds of
training, answers and their judging included, evaluation not. A run that was stopped goes on; more
seconds prolong it. Evaluation is greedy and in float32, on 300 phantoms with a nodule (seeds from
2,000,000), 100 without, BCCD's val smears, and the yes-or-no questions of VQA-RAD's held-out
pictures. The report pairs the pictures.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rl_answers import answers, decoding
from rl_questions import HeldOut, brief, render

from medmo_edge.boxes import parse_boxes
from medmo_edge.evaluation.scores import answer_score, match_image
from medmo_edge.train.asked import Asked, draw, with_yes_or_no
from medmo_edge.train.attention import use_products
from medmo_edge.train.base_model import Base, load_base, save_checkpoint, set_trainable
from medmo_edge.train.blood import read_blood
from medmo_edge.train.branches import branch_row, collate_branches
from medmo_edge.train.grpo_learner import Learner, Question
from medmo_edge.train.parallel import Group, arithmetic
from medmo_edge.train.radiology import read_radiology
from medmo_edge.train.recipe import load_recipe
from medmo_edge.train.reinforcement import Objective
from medmo_edge.train.scene_stages import Asking, shares_of

BOX_TOKENS = 48
SPEC = load_recipe("nano").rl
assert SPEC is not None
SHARES, REWARDS = shares_of(SPEC), SPEC.rewards
SAVE_EVERY = 20  # steps
CHUNK = 32  # questions that are answered at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run, as its command line has it."""

    kind: str
    checkpoint: str
    learning_rate: float
    prompts: int
    generations: int
    temperature: float
    scale: str
    epsilon: float
    epsilon_high: float
    iterations: int
    guided: bool
    rewards: dict[str, float]
    threshold: tuple[float, float]
    final: float
    seed: int


def main() -> None:
    """Run one arm, or compare two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train one arm and evaluate it")
    run.add_argument("folder", type=Path)
    run.add_argument("--kind", choices=("rl", "control"), required=True)
    run.add_argument("--data", type=Path, default=os.environ.get("MEDMO_EDGE_DATA"))
    run.add_argument("--checkpoint", default="nano")
    run.add_argument("--seconds", type=float, required=True, help="CPU seconds of training in all")
    run.add_argument("--slice", type=float, help="stop after this many of them, to go on later")
    run.add_argument("--learning-rate", type=float, default=3e-4)
    run.add_argument("--prompts", type=int, default=16, help="questions of a step")
    run.add_argument("--generations", type=int, default=16)
    run.add_argument("--temperature", type=float, default=1.0)
    run.add_argument("--scale", default="group", choices=("group", "batch", "none"))
    run.add_argument("--epsilon", type=float, default=0.15)
    run.add_argument("--epsilon-high", type=float, default=0.25)
    run.add_argument("--iterations", type=int, default=1)
    run.add_argument("--guided", action="store_true", help="the right answer in every group")
    run.add_argument("--rewards", type=json.loads, default=REWARDS, help="JSON: weights")
    run.add_argument("--threshold", type=float, nargs=2, default=(0.0, 0.0), help="of IoU, from to")
    run.add_argument("--final", type=float, default=0.1, help="part of the rate left at the end")
    run.add_argument("--seed", type=int, default=7)
    run.add_argument("--threads", type=int, default=1)
    report = commands.add_parser("report", help="compare the start and two or more runs")
    report.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "report":
        print(render(arguments.folders))
        return
    torch.set_num_threads(arguments.threads)
    names = set(Settings.__dataclass_fields__)
    settings = {key: value for key, value in vars(arguments).items() if key in names}
    settings["threshold"] = tuple(settings["threshold"])
    Run(arguments.folder, Settings(**settings), arguments.data).go(
        arguments.seconds, arguments.slice or math.inf
    )


class Run:
    """One arm in its folder: ``state.pt``, ``log.jsonl``, ``answers-*.json``, ``checkpoint``."""

    def __init__(self, folder: Path, settings: Settings, data: Path) -> None:
        """Loads the checkpoint, or what the folder has of an earlier call."""
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.base: Base = load_base(settings.checkpoint, precision="float32")
        set_trainable(self.base, ("vision", "merger", "language"))
        self.model: Any = self.base.model
        use_products(self.model)
        self.asking = Asking(chat=self.base.chat, limits=self.base.limits, coords=self.base.coords)
        self.smears = read_blood(data, "train")
        self.radiology = with_yes_or_no(read_radiology(data, "train"))
        self.held_out = HeldOut(
            read_blood(data, "val"),
            with_yes_or_no(read_radiology(data, "val")),
            folder.parent / "phantoms.npz",
        )
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.step, self.seconds = 0, 0.0
        self._resume()

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings), indent=2))
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Make this step resumable."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "seconds": self.seconds}
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")

    def go(self, seconds: float, slice_seconds: float) -> None:
        """Train until ``seconds`` are used up, then evaluate; or stop when the slice is."""
        self.look_at_start()
        until = min(seconds, self.seconds + slice_seconds)
        while self.seconds < until:
            started = time.process_time()
            found = self._one_step(min(1.0, self.seconds / seconds))
            self.seconds += time.process_time() - started
            self.step += 1
            self._log({"step": self.step, "seconds": round(self.seconds, 1), **found})
            if self.step % SAVE_EVERY == 0:
                self.save()
        self.save()
        if self.seconds >= seconds:
            self.look(self.folder / "answers-end.json")
            notes = {"step": self.step, "seconds": round(self.seconds), **asdict(self.settings)}
            save_checkpoint(self.base, self.folder / "checkpoint", notes)

    def look_at_start(self) -> None:
        """Ask the checkpoint itself, once for all runs beside this one that start from it."""
        name = self.settings.checkpoint.replace("/", "-").strip("-")
        shared = self.folder.parent / f"start-{name}.json"
        if self.step == 0 and not shared.exists():
            self.look(shared)
        if self.step == 0:
            shutil.copyfile(shared, self.folder / "answers-start.json")

    def _one_step(self, progress: float) -> dict[str, float]:
        settings = self.settings
        wave = (1 + math.cos(math.pi * progress)) / 2
        rate = settings.final + (1 - settings.final) * wave
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate * min(1.0, (self.step + 1) / 10)
        seeds = [[settings.seed, self.step, place] for place in range(settings.prompts)]
        streams = map(np.random.default_rng, seeds)
        drawn = [draw(self.smears, self.radiology, SHARES, rng) for rng in streams]
        if settings.kind == "control":
            return self._supervised(drawn)
        low, high = settings.threshold
        questions = [self.question(one) for one in drawn]
        experience = self.learner.collect(self.step, questions, low + (high - low) * progress)
        return self.learner.learn(experience, self._update)

    def question(self, asked: Asked) -> Question:
        """Prompt and truth of a sample."""
        return self.asking.question(asked)

    @cached_property
    def learner(self) -> Learner:
        """GRPO as the settings have it."""
        settings = self.settings
        return Learner(
            model=self.model,
            objective=Objective(
                loss_type="dapo",
                epsilon=settings.epsilon,
                epsilon_high=settings.epsilon_high,
                beta=0.0,
                scale_rewards=settings.scale,  # type: ignore[arg-type]
                num_iterations=settings.iterations,
                mask_truncated_completions=True,
            ),
            rewards=settings.rewards,
            decoding=decoding(self.base, settings.generations, BOX_TOKENS, settings.temperature),
            decode=self.base.tokenizer.decode,
            seed=settings.seed,
            row_tokens=2048,
            batch_tokens=4096,
            precision=partial(arithmetic, self.model, Group(), "bfloat16"),
            guided=settings.guided,
        )

    def _supervised(self, drawn: Sequence[Asked]) -> dict[str, float]:
        """A step on the right answers: an answer of n tokens weighs sqrt(n), as nano was taught."""
        rows, weights = [], []
        for index, question in enumerate(map(self.question, drawn)):
            rows.append(branch_row(question.prompt, [question.truth], [index]))
            weights.append(len(question.truth) ** -0.5)
        batch = collate_branches(rows, self.model)
        with self.learner.precision():
            known = self.learner.log_probs(self.model, batch)
        weight = torch.tensor(weights)[torch.from_numpy(batch.owners)]
        loss = -(known * weight).sum() / weight.sum()
        torch.autograd.backward(loss)
        return {"loss": float(loss.detach()), "norm": self._update()}

    def _update(self) -> float:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def look(self, path: Path) -> None:
        """Ask everything that is held out; what the answers are worth goes into ``path``."""
        scores = [self._score(*asked) for asked in self._answered()]
        found = {"step": self.step, "seconds": round(self.seconds), "scores": scores}
        path.write_text(json.dumps(found), encoding="utf-8")
        spent = f"{self.step} steps, {self.seconds:.0f} CPU s"
        print(f"{self.folder.name}, {spent}: {brief(scores)}", flush=True)

    def _answered(self) -> Iterator[tuple[str, str, Asked, str]]:
        """(what, picture, sample, answer) of every held-out question."""
        for what, tokens, items in self.held_out.questions():
            greedy = decoding(self.base, 1, tokens, 0.0)
            told = answers(self.base, self.asking, [one for _, one in items], greedy, CHUNK)
            for (name, asked), (_, (answer,)) in zip(items, told, strict=True):
                yield what, name, asked, self.base.tokenizer.decode(answer.ids)

    def _score(self, what: str, name: str, asked: Asked, text: str) -> dict[str, Any]:
        """IoU summed over true boxes and their number, or whether a word is right."""
        sample = asked.sample
        if sample.task == "vqa":
            assert sample.answer is not None
            right = answer_score([sample.answer], [text]).accuracy
            return {"what": what, "picture": name, "value": right, "truth": sample.answer}
        geometry = self.question(asked).prompt.geometries
        boxes = parse_boxes(text, geometry, self.base.coords).boxes
        match = match_image([b.xyxy for b in sample.boxes], [b.xyxy for b in boxes])
        return {"what": what, "picture": name, "ious": match.ious, "extra": match.false_positives}

    def _log(self, values: dict[str, Any]) -> None:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()
