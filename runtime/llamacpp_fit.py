"""What a GGUF artifact needs of a machine: memory, context length, threads.

Estimates from the manifest alone, on the careful side; nothing is loaded or measured here.
"""

from medmo_edge.manifest import Manifest
from medmo_edge.runtime import model_facts
from medmo_edge.runtime.device import Device
from medmo_edge.runtime.model_facts import FIRST_CELLS, MIN_CELLS, Facts

__all__ = ["FIRST_CELLS", "Facts", "default_threads", "max_cells", "memory_obstacle", "should_map"]

_SMALL_BYTES = 64 << 20
_OVERHEAD_BYTES = 300 << 20  # compute buffers, tokenizer, Python
_HALF_FLOAT_BYTES = 2


def cell_bytes(manifest: Manifest) -> int:
    """Bytes of the KV cache per token, in f16."""
    return Facts.of(manifest).cell_bytes(_HALF_FLOAT_BYTES)


def weight_bytes(manifest: Manifest) -> int:
    """Size of both weight files."""
    return model_facts.file_bytes(manifest, "language", "vision")


def memory_obstacle(manifest: Manifest, device: Device) -> str | None:
    """Why the artifact does not fit into the free memory, else None."""
    needed = weight_bytes(manifest) + MIN_CELLS * cell_bytes(manifest) + _OVERHEAD_BYTES
    return model_facts.memory_obstacle(needed, device)


def should_map(manifest: Manifest, device: Device) -> bool:
    """Whether to map the weights into memory rather than read them.

    Reading needs less memory in all, because repacked weights do not exist twice, but what is
    mapped can be dropped when memory is short.
    """
    return device.ram_available_bytes < 1.5 * weight_bytes(manifest) + _OVERHEAD_BYTES


def default_threads(manifest: Manifest, device: Device) -> int:
    """Operations of a small model end sooner than a second thread wakes up: one is faster."""
    return 1 if weight_bytes(manifest) < _SMALL_BYTES else device.cores


def max_cells(manifest: Manifest, device: Device, wanted: int | None) -> int:
    """Tokens of the longest conversation: as asked, else half of the memory left by the weights."""
    if wanted is not None:
        return wanted
    return model_facts.longest_conversation(_spare_bytes(manifest, device), cell_bytes(manifest))


def affordable_cells(manifest: Manifest, device: Device) -> int:
    """Tokens of all conversations that are held at once: half of the memory left by the weights."""
    return model_facts.affordable_cells(_spare_bytes(manifest, device), cell_bytes(manifest))


def _spare_bytes(manifest: Manifest, device: Device) -> int:
    return device.ram_available_bytes - weight_bytes(manifest) - _OVERHEAD_BYTES
