"""DCMTK's programs by name, also in an activated environment. It installs and runs none."""

import os
import sys
from pathlib import Path


def prefer_dcmtk() -> None:
    """Take this interpreter's folder off PATH: pynetdicom puts programs of DCMTK's names there."""
    ours = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join(place for place in os.get_exec_path() if place != ours)
