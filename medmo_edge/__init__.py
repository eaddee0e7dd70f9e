"""MedMO Edge: train, calibrate, export and run MedMO medical vision-language models, offline.

Importing this package switches off, before any backend can be imported, everything that would
contact the network. Public names load on first use, so that ``import medmo_edge`` stays light.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Native telemetry reads these when its library loads: set them before any other import of ours.
for _name, _value in {
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ[_name] = _value
# OpenMP barriers that spin make a busy workstation up to 30 times slower; libgomp reads this once.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

if TYPE_CHECKING:
    from medmo_edge.boxes import Box
    from medmo_edge.errors import MedmoError
    from medmo_edge.images import Frame, Source, read_image
    from medmo_edge.runtime.session import Answer, Session, Study, load

_HOMES = {
    "Answer": "medmo_edge.runtime.session",
    "Box": "medmo_edge.boxes",
    "Frame": "medmo_edge.images",
    "MedmoError": "medmo_edge.errors",
    "Session": "medmo_edge.runtime.session",
    "Source": "medmo_edge.images",
    "Study": "medmo_edge.runtime.session",
    "load": "medmo_edge.runtime.session",
    "read_image": "medmo_edge.images",
}

__all__ = [
    "Answer",
    "Box",
    "Frame",
    "MedmoError",
    "Session",
    "Source",
    "Study",
    "__version__",
    "load",
    "read_image",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'medmo_edge' has no attribute {name!r}")
    return getattr(import_module(home), name)
