"""Numbers of the model that backends rely on, read from the manifest and checked once."""

from dataclasses import dataclass, fields

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.device import Device

FIRST_CELLS = 2048  # the KV cache grows by doubling from here
MIN_CELLS = 1024  # a conversation that is shorter is of no use
_MAX_CELLS = 32768
_CELL_STEP = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Sizes under the manifest's names."""

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

    def cell_bytes(self, value_bytes: int) -> int:
        """Bytes of the KV cache per token: keys and values of all layers."""
        return 2 * value_bytes * self.num_layers * self.num_kv_heads * self.head_dim


def file_bytes(manifest: Manifest, *roles: str) -> int:
    """Size of the files with these roles."""
    return sum(record["bytes"] for record in manifest.files.values() if record["role"] in roles)


def memory_obstacle(needed: int, device: Device) -> str | None:
    """Why ``needed`` bytes do not fit into the free memory, else None."""
    if 0 < device.ram_available_bytes < needed:
        return (
            f"needs about {needed / 1e9:.1f} GB of memory, "
            f"{device.ram_available_bytes / 1e9:.1f} GB are free: close programs, or export a "
            "smaller target"
        )
    return None


def longest_conversation(spare_bytes: int, cell_bytes: int) -> int:
    """Tokens of the longest conversation: half of the memory that the weights leave."""
    return max(MIN_CELLS, min(_MAX_CELLS, affordable_cells(spare_bytes, cell_bytes)))


def affordable_cells(spare_bytes: int, cell_bytes: int) -> int:
    """Tokens that fit into half of the memory that the weights leave; 0 when there is none."""
    return max(0, int(spare_bytes / 2 / cell_bytes) // _CELL_STEP * _CELL_STEP)
