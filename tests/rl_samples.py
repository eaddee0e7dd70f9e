"""A tiny reinforcement stage for tests: its recipe, its samples and their mixture."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medmo_edge.train.base_model import Base
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.packing import Chat
from medmo_edge.train.stages import DataSource, RlStage, load_stages

SEED = 3


def write_rl_samples(folder: Path, count: int = 6) -> Path:
    """``folder``/rl.jsonl: pictures of noise, each to locate something in and to answer yes on."""
    random = np.random.default_rng(0)
    lines = []
    for index in range(count):
        pixels = random.integers(0, 255, (64, 64 + 32 * (index % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        shared = {"images": [f"{index}.png"]}
        asked = {"role": "user", "content": "Locate the nodule."}
        box = {"label": "nodule", "xyxy": [4, 8, 40, 48]}
        lines.append({"id": f"l{index}", "task": "locate", "messages": [asked], "boxes": [box]})
        asked = {"role": "user", "content": "Is there a nodule?"}
        reply = {"role": "assistant", "content": "Yes."}
        lines.append({"id": f"v{index}", "task": "vqa", "messages": [asked, reply]})
        lines[-1]["answer"] = "yes"
        lines[-2:] = [line | shared for line in lines[-2:]]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "rl.jsonl").write_text(text, encoding="utf-8")
    return folder / "rl.jsonl"


def tiny_rl_stage(**objective: Any) -> RlStage:
    """MedMO-8B's reinforcement stage with tiny sizes: 2 questions a step, 4 answers each."""
    (stage,) = (one for one in load_stages("medmo-8b").stages if isinstance(one, RlStage))
    source = DataSource(path="rl.jsonl", weight=1.0, tasks=(), augment="none")
    return dataclasses.replace(
        stage,
        samples=8,
        rows=8,
        accumulation=1,
        sharding="none",
        offload=False,
        gradient_checkpointing=False,
        min_pixels=4096,
        max_pixels=8192,
        row_tokens=512,
        data=(source,),
        mixture={"locate": 0.5, "vqa": 0.5},
        tuning=dataclasses.replace(stage.tuning, learning_rate=1e-3),
        rollouts=dataclasses.replace(
            stage.rollouts,
            num_generations=4,
            max_prompt_tokens=256,
            max_completion_tokens=8,
            engine="generate",
        ),
        rewards={"iou": 0.5, "format": 0.5, "yes_no": 1.0},
        objective=dataclasses.replace(
            stage.objective, **{"mask_truncated_completions": False, **objective}
        ),
    )


def rl_mixture(base: Base, stage: RlStage, folder: Path) -> Mixture:
    """The samples of ``folder`` as the stage mixes them."""
    chat = Chat(tokenizer=base.tokenizer, template=base.template)
    return Mixture(stage, SEED, chat, base.limits, base.coords, folder=folder, devices=1)
