"""Whether the files behind a loaded artifact are still the files that were checked.

Weights are mapped, not copied: a file that is overwritten changes a running model, and a file that
is replaced leaves answers whose provenance names a folder that holds something else now. Looks at
inode, modification time and size of every file, the manifest included; contents are not read.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from medmo_edge.manifest import Manifest, Stamp
from medmo_edge.runtime.session import Session

CHANGED = "the artifact was changed on disk while it was served: start the {} again"


class ArtifactWatch:
    """Compares files with what they were when ``manifests`` were read, before they were hashed.

    A change is never forgotten. Thread-safe.
    """

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._stamps = {
            manifest.folder / name: stamp
            for manifest in manifests
            for name, stamp in manifest.stamps.items()
        }
        self._changed = False

    @classmethod
    def of(cls, session: Session) -> Self:
        """A watch over every artifact at work, that of a vision tower beside it included."""
        tower: Manifest | None = getattr(session.backend, "tower_manifest", None)
        return cls((session.manifest,) if tower is None else (session.manifest, tower))

    def changed(self) -> bool:
        """Whether any file was replaced, rewritten or removed since."""
        self._changed = self._changed or any(
            _differs(path, stamp) for path, stamp in self._stamps.items()
        )
        return self._changed


def _differs(path: Path, stamp: Stamp) -> bool:
    """A new link, owner or access time is no change: backups leave them behind."""
    try:
        found = Stamp.of(os.stat(path))
    except OSError:
        return True
    return found._replace(status_ns=stamp.status_ns) != stamp
