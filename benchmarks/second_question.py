"""What the second question about one picture costs, against the first.

    python benchmarks/second_question.py ARTIFACT... [--sides 448 1024] [--quick]

The first question evaluates the picture and its own text, the others their own text only. Prints
the seconds before the first token (picture and prompt) and the ratio, which must stay below 0.15.
Pictures are drawn radiographs. ARTIFACT may be nano, which is exported to onnx-fp32 first. Seconds
for nano; for a 4B artifact on two cores about 2 minutes, with --quick (448 only) half a minute.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from medmo_edge.export.export import export_checkpoint
from medmo_edge.images import Frame
from medmo_edge.phantoms import draw
from medmo_edge.runtime.session import Session, load

QUESTIONS = (
    "Is there a nodule?",
    "Is there a pleural effusion?",
    "Locate the nodule.",
    "What is the most likely finding in this radiograph?",
)


def main() -> None:
    """Print one row per artifact and picture side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", nargs="+")
    parser.add_argument("--sides", type=int, nargs="+", default=[448, 1024])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="448 x 448 only")
    options = parser.parse_args()
    sides = [448] if options.quick else options.sides
    print(f"{'target':14}{'side':>6}{'tokens':>8}{'first s':>10}{'second s':>10}{'ratio':>8}")
    with ExitStack() as stack:
        for name in options.artifact:
            path = _artifact(name, stack)
            with load(path, verify=False, threads=options.threads) as session:
                for side in sides:
                    print(_row(session, side), flush=True)


def _artifact(name: str, stack: ExitStack) -> Path:
    if name != "nano":
        return Path(name)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "onnx-fp32"
    export_checkpoint("nano", "onnx-fp32", folder)
    return folder


def _row(session: Session, side: int) -> str:
    waits, tokens = [], 0
    warm = Frame.from_pixels(draw(1, size=(64, 64)).pixels)
    session.ask(warm, QUESTIONS[0], max_new_tokens=1)  # pages in the weights
    with session.study(Frame.from_pixels(draw(2, size=(side, side)).pixels)) as study:
        for question in QUESTIONS:
            times = study.ask(question, max_new_tokens=1).timings
            waits.append(times.image_seconds + times.prefill_seconds)
            tokens = max(tokens, times.prompt_tokens)
    second = float(np.median(waits[1:]))
    return (
        f"{session.manifest.target:14}{side:6}{tokens:8}{waits[0]:10.3f}{second:10.3f}"
        f"{second / waits[0]:8.3f}"
    )


if __name__ == "__main__":
    main()
