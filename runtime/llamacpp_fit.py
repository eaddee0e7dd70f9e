"""What a GGUF artifact needs of a machine: memory, context length, threads.

Estimates from the manifest alone, on the careful side; nothing is loaded or measured here.
"""

from dataclasses import dataclass, fields

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.device import Device

FIRST_CELLS = 2048  # the KV cache grows by doubling from here
_MAX_CELLS = 32768
_MIN_CELLS = 1024
_SMALL_BYTES = 64 << 20
_OVERHEAD_BYTES = 300 << 20  # compute buffers, tokenizer, Python
_HALF_FLOAT_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Numbers of the model that the backend relies on, under the manifest's names."""

    vocab_size: int
    hidden_size: int
    deepstack_levels: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int

    @classmethod
    def of(cls, manifest: Manifest) -> "Facts":
        """Errors: ArtifactError when one is missing or no positive number."""
        values = {field.name: manifest.model.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            if type(value) is not int or value < 1:
                raise ArtifactError(
                    f"{manifest.folder}: manifest.json has model {name} {value!r}, which is no "
                    "positive number: export again"
                )
        return cls(**values)  # type: ignore[arg-type]

    @property
    def cell_bytes(self) -> int:
        """Bytes of the KV cache per token: keys and values of all layers in f16."""
        return 2 * _HALF_FLOAT_BYTES * self.num_layers * self.num_kv_heads * self.head_dim


def weight_bytes(manifest: Manifest) -> int:
    """Size of both weight files."""
    roles = ("language", "vision")
    return sum(record["bytes"] for record in manifest.files.values() if record["role"] in roles)


def memory_obstacle(manifest: Manifest, device: Device) -> str | None:
    """Why the artifact does not fit into the free memory, else None."""
    cache = _MIN_CELLS * Facts.of(manifest).cell_bytes
    needed = weight_bytes(manifest) + cache + _OVERHEAD_BYTES
    if 0 < device.ram_available_bytes < needed:
        return (
            f"needs about {needed / 1e9:.1f} GB of memory, "
            f"{device.ram_available_bytes / 1e9:.1f} GB are free: close programs, or export a "
            "smaller target"
        )
    return None


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
    spare = device.ram_available_bytes - weight_bytes(manifest) - _OVERHEAD_BYTES
    affordable = int(spare / 2 / Facts.of(manifest).cell_bytes) // 256 * 256
    return max(_MIN_CELLS, min(_MAX_CELLS, affordable))
