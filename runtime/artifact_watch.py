"""Whether the files behind a loaded artifact are still the files that were loaded.

Weights are mapped, not copied: a file that is overwritten changes a running model, and a file that
is replaced leaves answers whose provenance names a folder that holds something else now. Looks at
inode, modification time and size of every file, the manifest included; contents are not read.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from medmo_edge.manifest import MANIFEST_NAME, Manifest
from medmo_edge.runtime.session import Session

CHANGED = "the artifact was changed on disk while it was served: start the {} again"

Facts = tuple[int, int, int] | None


class ArtifactWatch:
    """Remembers what ``manifests`` look like now; a change is never forgotten. Thread-safe."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._paths = [
            manifest.folder / name
            for manifest in manifests
            if manifest.files  # the fake model has none
            for name in (MANIFEST_NAME, *manifest.files)
        ]
        self._seen = self._facts()
        self._changed = False

    @classmethod
    def of(cls, session: Session) -> Self:
        """A watch over every artifact at work, that of a vision tower beside it included."""
        tower: Manifest | None = getattr(session.backend, "tower_manifest", None)
        return cls((session.manifest,) if tower is None else (session.manifest, tower))

    def changed(self) -> bool:
        """Whether any file was replaced, rewritten or removed since."""
        self._changed = self._changed or self._facts() != self._seen
        return self._changed

    def _facts(self) -> list[Facts]:
        return [_facts(path) for path in self._paths]


def _facts(path: Path) -> Facts:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
