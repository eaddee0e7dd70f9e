"""DCMTK's programs by name, also in an activated environment. It installs and runs none."""

import os
from pathlib import Path


def prefer_dcmtk() -> None:
    """Take folders off PATH where pynetdicom put programs of DCMTK's names: those are scripts."""
    kept = [place for place in os.get_exec_path() if not _is_script(Path(place) / "storescp")]
    os.environ["PATH"] = os.pathsep.join(kept)


def _is_script(program: Path) -> bool:
    try:
        with program.open("rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False
