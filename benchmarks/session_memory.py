"""Memory and speed of a session that runs all day: 1,000 questions, then 50 loads and closes.

    python benchmarks/session_memory.py ARTIFACT [--questions N] [--reloads N]

Questions go round robin to three studies of different sizes and to single images, streamed and
whole, some cancelled; the resident set size is read after every tenth part. Not measured: swap,
page cache and GPU memory.
"""

import argparse
import gc
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.images import Frame
from medmo_edge.runtime.session import Session, load

SIZES = ((320, 320), (512, 256), (200, 450))
QUESTIONS = ("Locate the nodule.", "Is there a pleural effusion?", "Describe this medical image.")


def resident_mb() -> float:
    """Resident set size of this process in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def frame(width: int, height: int, seed: int) -> Frame:
    """Noise: every image is another one."""
    random = np.random.default_rng(seed)
    return Frame.from_pixels(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask_all(session: Session, count: int) -> list[float]:
    """Ask ``count`` questions; returns the memory after every tenth part, in MB."""
    studies = [session.study(frame(*size, seed)) for seed, size in enumerate(SIZES)]
    memory = [resident_mb()]
    for index in range(count):
        ask_one(session, studies, index)
        if (index + 1) % (count // 10) == 0:
            gc.collect()
            memory.append(resident_mb())
    return memory


def ask_one(session: Session, studies: list[Any], index: int) -> None:
    """One of four ways to put a question."""
    study, question = studies[index % len(studies)], QUESTIONS[index % len(QUESTIONS)]
    way = index % 7
    if way == 0:
        session.ask(frame(160, 160, index), question, max_new_tokens=16)
    elif way == 1:
        next(study.stream(question, max_new_tokens=16), None)  # abandoned after one piece
    elif way == 2:
        study.ask(question, max_new_tokens=16, timeout_seconds=0.005)
    elif way == 3:
        cancelled = threading.Event()
        cancelled.set()
        study.ask(question, max_new_tokens=16, cancel=cancelled)
    else:
        study.ask(question, max_new_tokens=16)


def reload_all(artifact: Path, count: int) -> list[float]:
    """Load, ask once, close, ``count`` times; returns the memory after every tenth part, in MB."""
    memory = []
    for index in range(count):
        with load(artifact, verify=False) as session:
            session.ask(frame(160, 160, index), QUESTIONS[0], max_new_tokens=4)
        if (index + 1) % (count // 10) == 0:
            gc.collect()
            memory.append(resident_mb())
    return memory


def main() -> None:
    """Run both and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--reloads", type=int, default=50)
    arguments = parser.parse_args()
    with load(arguments.artifact) as session:
        questions = ask_all(session, arguments.questions)
    reloads = reload_all(arguments.artifact, arguments.reloads)
    print(
        json.dumps(
            {
                "questions": arguments.questions,
                "resident_mb_during_questions": [round(value, 1) for value in questions],
                "reloads": arguments.reloads,
                "resident_mb_during_reloads": [round(value, 1) for value in reloads],
            }
        )
    )


if __name__ == "__main__":
    main()
