"""What a run writes down step by step: metrics.jsonl, TensorBoard files and curves.png.

A resumed run first forgets the lines of steps that it will do again, so that each step stands
there once. Nothing here knows what the figures mean, and nothing leaves this machine.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmo_edge.train.curves import draw_curves

METRICS, CURVES, BOARD = "metrics.jsonl", "curves.png", "tensorboard"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order; a last one torn by a kill is left out."""
    path = folder / METRICS
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


@dataclass(slots=True, kw_only=True)
class StepLog:
    """The open files of a run. ``board`` is TensorBoard's writer where it is installed."""

    folder: Path
    title: str
    board: Any = None

    @classmethod
    def open(cls, folder: Path, title: str, start: int) -> "StepLog":
        """Go on at step ``start``: lines of it and later ones are dropped. Errors: OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(line) for line in read_metrics(folder) if line["step"] < start]
        draft = folder / f".{METRICS}.tmp"
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(draft, folder / METRICS)
        return cls(folder=folder, title=title, board=_board(folder / BOARD, start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for ``step``, in full precision; what is not finite is left out.

        Errors: OSError.
        """
        known = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, **known})
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        if self.board is not None:
            for name, value in known.items():
                self.board.add_scalar(name, value, step)

    def draw(self) -> None:
        """Draw curves.png anew and pass on what TensorBoard has not been given yet."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for line in read_metrics(self.folder):
            for name, value in line.items():
                if name != "step":
                    curves.setdefault(name, []).append((line["step"], float(value)))
        draw_curves(curves, self.title, self.folder / CURVES)
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()


def _board(folder: Path, start: int) -> Any:
    """A writer that hides what earlier files say of steps from ``start`` on; None without one."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # tensorboard is not installed
        return None
    return SummaryWriter(str(folder), purge_step=start if start else None)
