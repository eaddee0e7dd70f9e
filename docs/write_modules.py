"""Writes docs/modules.md: every module with the first sentence of its docstring.

Run by `make docs`; the tests fail when the page is out of date. Nothing is imported.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).with_name("modules.md")
FOLDERS = {
    "medmo_edge": "core and command line",
    "train": "recipes, rewards, the training loop",
    "calibration": "what every quantiser needs, from one pass",
    "export": "checkpoint to artifact",
    "evaluation": "benchmarks, equivalence, certificates",
    "runtime": "the local inference API, server and DICOM node; torch-free",
    "benchmarks": "scripts that measure against named peers and print tables",
}


def page() -> str:
    """The page as it should be."""
    lines = ["# Modules", "", "Written by `make docs` from the modules' first sentences.", ""]
    for folder, purpose in FOLDERS.items():
        lines += [f"## {folder}/: {purpose}", "", "| module | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {said} |" for name, said in _modules(ROOT / folder)]
        lines.append("")
    return "\n".join(lines)


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("__"):
            yield path.name, _first_sentence(path)


def _first_sentence(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(said.partition("\n\n")[0].split())
    return paragraph.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
