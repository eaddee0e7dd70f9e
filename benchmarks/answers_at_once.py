"""Do answers change when several are given at once? Greedy, each alone against eight together.

    python benchmarks/answers_at_once.py                     # MedMO-nano, three targets
    python benchmarks/answers_at_once.py ARTIFACT ...        # your own artifacts, llama.cpp's

For each target: how many tokens are evaluated together without changing a bit of any logits (what
``serve`` measures when it starts), and how many of a hundred different questions about drawn
radiographs get another answer when eight run at once: as ``serve`` does it, and as ``--fast`` does.
Not measured: speed (benchmarks/server_load.py).
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medmo_edge.export.export import export_checkpoint
from medmo_edge.images import Frame
from medmo_edge.phantoms import draw
from medmo_edge.runtime.answers import Answer
from medmo_edge.runtime.crew import Crew
from medmo_edge.runtime.session import Session, Study, load

TARGETS = ("gguf-q8_0", "gguf-f16", "gguf-q4_k_m")
AT_ONCE = 8
PICTURES = 20
QUESTIONS = (
    "Is there a nodule?",
    "Locate the nodule.",
    "Describe this medical image.",
    "How many findings are there?",
    "Write a radiology report for this image.",
)
NEW_TOKENS = 96


@dataclass
class Listener:
    """Keeps what it is told."""

    text: str | None = None

    def piece(self, text: str) -> None:
        """Of no interest before the end."""

    def ended(self, answer: Answer) -> None:
        """Keep the whole text."""
        self.text = answer.text

    def failed(self, error: Exception) -> None:
        """A benchmark has no use for half of its answers."""
        raise error


def main() -> None:
    """Print one row per target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("artifacts", nargs="*", type=Path, help="default: exports of nano")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(
        f"| target | exact tokens together | of 100 answers changed by {AT_ONCE} at once | --fast |"
    )
    print("|---|---|---|---|")
    with _artifacts(arguments.artifacts) as artifacts:
        for path in artifacts:
            _row(path, arguments.threads)


@contextmanager
def _artifacts(given: list[Path]) -> Iterator[list[Path]]:
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            export_checkpoint("nano", target, Path(folder) / target)
        yield [Path(folder) / target for target in TARGETS]


def _frame(seed: int) -> Frame:
    return Frame.from_pixels(draw(seed, size=(256, 288)).pixels)


def _row(path: Path, threads: int) -> None:
    with load(path, threads=threads) as session:
        studies = [session.study(_frame(seed)) for seed in range(PICTURES)]
        asked = [(study, question) for study in studies for question in QUESTIONS]
        alone = [study.ask(text, max_new_tokens=NEW_TOKENS).text for study, text in asked]
        _, rows = session.prepare(AT_ONCE)
        exact = _changed(alone, _together(session, asked))
        session.prepare(AT_ONCE, exact=False)
        fast = _changed(alone, _together(session, asked))
        print(f"| {session.manifest.target} | {rows} | {exact} | {fast} |", flush=True)


def _together(session: Session, asked: list[tuple[Study, str]]) -> list[str | None]:
    """The answers when each begins as soon as fewer than eight run."""
    crew = Crew(AT_ONCE)
    listeners = [Listener() for _ in asked]
    for (study, question), listener in zip(asked, listeners, strict=True):
        while not crew.has_room:
            crew.advance()
        crew.add(study.stream(question, max_new_tokens=NEW_TOKENS), listener)
    while crew.size:
        crew.advance()
    crew.dismiss()
    return [listener.text for listener in listeners]


def _changed(alone: list[str], together: list[str | None]) -> int:
    return sum(one != other for one, other in zip(alone, together, strict=True))


if __name__ == "__main__":
    main()
