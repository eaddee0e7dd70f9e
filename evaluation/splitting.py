"""Splits that never divide a picture, a patient or a study.

Everything that shares a picture (by content, whatever its name) or a group falls into the same
split. The choice is a hash, so it does not depend on the order, and what is added later hardly
moves the rest. A picture saved again by another program counts as another picture.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.items import Embedded, Item, Picture

Key = bytes


class Groups:
    """Which keys belong together: a union-find over digests of pictures and groups."""

    def __init__(self) -> None:
        self._parent: dict[Key, Key] = {}

    def join(self, keys: Sequence[Key]) -> Key:
        """Say that ``keys`` (at least one) belong together; gives one of them to ask with later."""
        roots = sorted({self.root(key) for key in keys})
        for root in roots[1:]:
            self._parent[root] = roots[0]
        return keys[0]

    def root(self, key: Key) -> Key:
        """The smallest key of everything that belongs to ``key`` so far."""
        path = []
        while (parent := self._parent.setdefault(key, key)) != key:
            path.append(key)
            key = parent
        for passed in path:
            self._parent[passed] = key
        return key


def item_keys(item: Item, digests: dict[Path, Key]) -> list[Key]:
    """What ``item`` must not be divided from: its pictures and its group, else its question.

    ``digests`` remembers files already read. Errors: SampleError for a picture that cannot be read.
    """
    keys = [_picture_key(picture, digests, item.where) for picture in item.images]
    if item.group:
        keys.append(_digest(f"group {item.group}".encode()))
    return keys or [_digest(f"question {item.question}".encode())]


def _picture_key(picture: Picture, digests: dict[Path, Key], where: str) -> Key:
    if isinstance(picture, Embedded):
        return _digest(picture.data)
    if picture not in digests:
        try:
            with picture.open("rb") as file:
                digests[picture] = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            reason = error.strerror
            raise SampleError(f"{where}: {picture} cannot be read ({reason})") from error
    return digests[picture]


def _digest(data: bytes) -> Key:
    return hashlib.sha256(data).digest()


def parse_fractions(text: str) -> dict[str, float]:
    """ "train=0.8,val=0.2" as a table.

    Errors: UsageError unless these are different plain names with parts that add up to 1.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            fractions[name.strip()] = float(value)
        except ValueError:
            raise UsageError(
                f"fraction {part!r} is not NAME=PART, e.g. train=0.9,val=0.1"
            ) from None
    named = all(name.replace("_", "").isalnum() for name in fractions)
    whole = abs(sum(fractions.values()) - 1) < 1e-6 and all(0 < v <= 1 for v in fractions.values())
    if not named or not whole or len(fractions) != text.count(",") + 1:
        raise UsageError(
            f"fractions {text!r}: different plain names, parts above 0 that add up to 1"
        )
    return fractions


def choose(root: Key, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The split of everything under ``root``: each with the probability of its fraction."""
    drawn = int.from_bytes(_digest(seed.to_bytes(8, "big") + root)[:8], "big") / 2**64
    for name, part in fractions.items():
        drawn -= part
        if drawn < 0:
            return name
    return list(fractions)[-1]
