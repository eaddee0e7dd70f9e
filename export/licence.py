"""The licence a checkpoint states about itself, for the manifest. Gives no legal judgement."""

import re
from pathlib import Path

UNSTATED = "see checkpoint"
_CARD_KEYS = ("license_name", "license")
_MAX_CARD_BYTES = 1 << 20


def stated_licence(checkpoint: Path) -> str:
    """The licence in the front matter of the checkpoint's README.md, else "see checkpoint"."""
    try:
        with (checkpoint / "README.md").open("rb") as file:
            card = file.read(_MAX_CARD_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return UNSTATED
    front = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    if not front:
        return UNSTATED
    for key in _CARD_KEYS:  # "license: other" goes with a license_name
        found = re.search(rf"^{key}:[ \t]*(\S.*?)\s*$", front[1], re.MULTILINE)
        if found:
            return found[1].strip("'\"")
    return UNSTATED
