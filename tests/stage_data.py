"""Small data and recipes for tests of stages: drawn pictures, every task, MedMO's recipe in small.

The recipe is the packaged medmo-4b with other sizes, so that what runs here is what is published.
"""

import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medmo_edge.checkpoint import open_checkpoint

TASKS = {
    "medtrinity.jsonl": ("caption",),
    "vqa.jsonl": ("vqa",),
    "reports.jsonl": ("report",),
    "boxes.jsonl": ("locate",),
    "cells.jsonl": ("locate",),
    "text-qa.jsonl": ("text_qa",),
}
PICTURES = 12


def write_data(folder: Path) -> Path:
    """All files that the packaged recipes name, over ``PICTURES`` drawn pictures."""
    folder.mkdir(parents=True)
    for index in range(PICTURES):
        _draw(folder / f"{index}.png", index)
    for name, tasks in TASKS.items():
        lines = [
            _line(f"{name}-{index}", task, index) for index in range(PICTURES) for task in tasks
        ]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _place(index: int) -> tuple[int, int]:
    return 4 + 8 * (index % 5), 6 + 5 * (index % 7)


def _draw(path: Path, index: int) -> None:
    height, width = (64, 96) if index % 3 else (96, 64)
    pixels = np.random.default_rng(index).integers(0, 60, (height, width, 3), dtype=np.uint8)
    left, top = _place(index)
    pixels[top : top + 20, left : left + 16] = 230
    Image.fromarray(pixels).save(path)


def _line(name: str, task: str, index: int) -> dict[str, Any]:
    side = ("left", "right", "upper", "lower")[index % 4]
    finding = ("nodule", "mass", "fracture")[index // 4]
    asked, told = {
        "caption": ("Describe this medical image.", f"The {side} lobe shows a {finding}."),
        "report": ("Generate a report.", f"No {finding} in the {side} zone. " * (1 + index % 3)),
        "vqa": ("Is there a nodule?", "Yes." if index % 2 else "No."),
        "locate": ("Locate the nodule.", ""),
        "text_qa": ("Is a nodule a mass? A: yes B: no", "A"),
    }[task]
    line: dict[str, Any] = {"id": name, "task": task}
    line["messages"] = [{"role": "user", "content": asked}]
    if task == "locate":
        left, top = _place(index)
        box = {"label": "nodule", "image": 0, "xyxy": [left, top, left + 16, top + 20]}
        line["boxes"] = [box]
    else:
        line["messages"].append({"role": "assistant", "content": told})
    if task == "vqa":
        line["answer"] = told.rstrip(".").lower()
    if task == "text_qa":
        line |= {"answer": "A", "choices": ["yes", "no"]}
    return line if task == "text_qa" else line | {"images": [f"{index}.png"]}


def write_recipe(
    path: Path,
    base: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    **stage_changes: Any,
) -> Path:
    """medmo-4b with the sizes of the checkpoint ``base`` and a few steps a stage.

    ``changes`` are of the recipe; ``stage_changes`` of every stage that has the key.
    """
    text = (resources.files("medmo_edge.train") / "medmo-4b.toml").read_text(encoding="utf-8")
    recipe = tomllib.loads(text)
    with open_checkpoint(base) as opened:
        config = opened.config
    for key in recipe["text"]:
        value = getattr(config.text, key)
        recipe["text"][key] = list(value) if isinstance(value, tuple) else value
    recipe["vision"] = {
        "hidden_size": config.vision.hidden_size,
        "intermediate_size": config.vision.intermediate_size,
        "num_layers": config.vision.depth,
        "num_heads": config.vision.num_heads,
        "position_side": round(config.vision.num_position_embeddings**0.5),
        "deepstack_layers": list(config.vision.deepstack_indexes),
    }
    recipe |= {"base": str(base), "precision": "float32", **(changes or {})}
    recipe["machine"] |= {"devices": 1}
    for stage in recipe["stages"]:
        if stage["kind"] == "rl":
            stage["rollouts"] |= {"max_prompt_tokens": 256, "max_completion_tokens": 8}
        stage |= _small(stage["kind"]) | {
            key: value for key, value in stage_changes.items() if key in stage
        }
        stage["tuning"] |= {"learning_rate": 1e-3}
        for source in stage["data"]:
            source["augment"] = stage_changes.get("augment", source["augment"])
    path.write_text(to_toml(recipe), encoding="utf-8")
    return path


def _small(kind: str) -> dict[str, Any]:
    small: dict[str, Any] = {
        "samples": 24,
        "rows": 3,
        "accumulation": 2,
        "min_pixels": 4096,
        "max_pixels": 8192,
        "text_tokens": 60,
        "answer_tokens": 30,
        "row_tokens": 256,
        "sharding": "none",
        "offload": False,
        "save_every": 2,
    }
    if kind != "rl":
        return small
    judged = {"iou": 0.5, "format": 0.5, "yes_no": 1.0}  # rewards that apply to our few samples
    return small | {"rows": 8, "samples": 8, "rewards": judged}


def to_toml(values: Mapping[str, Any], path: str = "") -> str:
    """A document of strings, numbers, booleans, lists, tables and lists of tables."""
    plain = {key: value for key, value in values.items() if not _is_table(value)}
    lines = [f"{key} = {_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            lines += [f"[{name}]", to_toml(value, f"{name}.")]
        elif _is_table(value):
            for entry in value:
                lines += [f"[[{name}]]", to_toml(entry, f"{name}.")]
    return "\n".join(lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _value(value: Any) -> str:
    return json.dumps(value)  # of plain values TOML and JSON write the same
