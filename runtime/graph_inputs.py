"""What every backend that runs our graphs computes on the host, read from the artifact once.

The embedding table in its mapped file, rotary angles of a conversation, and the sizes of the vision
tower. It runs no graph and knows no library.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.model_facts import Facts
from medmo_edge.runtime.ort_values import decode_rows
from medmo_edge.vision_inputs import VisionGeometry, rope_cos_sin


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """What rotary angles depend on, under the manifest's names."""

    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> "Rope":
        """Errors: ArtifactError when the manifest does not say."""
        model = manifest.model
        try:
            return cls(
                head_dim=int(model["head_dim"]),
                rope_theta=float(model["rope_theta"]),
                mrope_section=tuple(int(size) for size in model["mrope_section"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{manifest.folder}: manifest.json lacks or garbles model entry {error}: "
                "export again"
            ) from error

    def angles(
        self, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines [S, head_dim / 2] at ``positions`` [3, S]."""
        return rope_cos_sin(
            positions,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            mrope_section=self.mrope_section,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """The embedding table [V, hidden] in its mapped file, in the format ``dtype``."""

    table: NDArray[Any]
    dtype: str

    @classmethod
    def of(cls, manifest: Manifest, facts: Facts) -> "Embeddings":
        """Errors: ArtifactError when the table cannot be read or is another one."""
        path = manifest.path_of("embeddings")
        try:
            table: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} cannot be read: {error}: copy the artifact again"
            ) from error
        dtype = str(manifest.weights.get("embeddings_dtype"))
        storage = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}.get(dtype)
        shape = (facts.vocab_size, facts.hidden_size)
        if table.shape != shape or table.dtype != storage:
            raise ArtifactError(
                f"{path} holds {table.dtype} {list(table.shape)}, the manifest says {dtype} "
                f"{list(shape)}: export again"
            )
        return cls(table, dtype)

    def rows(self, ids: list[int]) -> NDArray[np.float32]:
        """Embeddings [S, hidden] of ``ids``."""
        return decode_rows(self.table[ids], self.dtype)


def vision_geometry(manifest: Manifest) -> VisionGeometry:
    """Sizes of the vision tower. Errors: ArtifactError when the manifest lacks them."""
    try:
        return VisionGeometry.from_manifest(manifest.model["vision"])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"{manifest.folder}: manifest.json lacks or garbles the sizes of the vision tower "
            f"({error}): export again"
        ) from error
