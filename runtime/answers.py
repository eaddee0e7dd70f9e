"""What an answer is: text, boxes in source pixels, how it ended, its cost, where it came from.

Plain values only; nothing here computes an answer or reads a file.
"""

from dataclasses import dataclass
from typing import Any

from medmo_edge.boxes import Box
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.backends import Backend
from medmo_edge.runtime.generate import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds and tokens of one answer.

    ``image_seconds``: vision tower and its tokens; ``prefill_seconds``: text of the prompt;
    ``prompt_tokens`` counts vision tokens too; ``reused_tokens`` of them were already evaluated.
    """

    load_seconds: float
    image_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    reused_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an answer came from: runtime, artifact and pictures (``Source.to_dict``).

    ``checkpoint`` and ``checkpoint_sha256`` name the weights that the artifact was made from;
    ``chosen`` says why this artifact and backend were taken.
    """

    backend: str
    device: str
    target: str
    manifest_sha256: str
    sources: tuple[dict[str, Any], ...]
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    chosen: str = ""


def provenance_of(
    backend: Backend, manifest: Manifest, sources: tuple[dict[str, Any], ...], chosen: str = ""
) -> Provenance:
    """Where the answers of an opened artifact about the pictures ``sources`` come from."""
    return Provenance(
        backend=backend.name,
        device=backend.device,
        target=manifest.target,
        manifest_sha256=manifest.sha256,
        sources=sources,
        checkpoint=str(manifest.checkpoint.get("name", "")),
        checkpoint_sha256=str(manifest.checkpoint.get("sha256", "")),
        chosen=chosen,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished answer; ``rejected_boxes`` says in words which coordinates could not be used."""

    text: str
    boxes: tuple[Box, ...]
    rejected_boxes: tuple[str, ...]
    finish_reason: FinishReason
    timings: Timings
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of ``medmo-edge ask --json``; ``source`` is a list for several images."""
        times, origin = self.timings, self.provenance
        sources: Any = list(origin.sources)
        if len(sources) < 2:
            sources = sources[0] if sources else None
        return {
            "text": self.text,
            "boxes": [box.to_dict() for box in self.boxes],
            "finish_reason": self.finish_reason,
            "backend": origin.backend,
            "device": origin.device,
            "timings": {
                "load_seconds": round(times.load_seconds, 4),
                "image_seconds": round(times.image_seconds, 4),
                "prefill_seconds": round(times.prefill_seconds, 4),
                "decode_seconds": round(times.decode_seconds, 4),
                "prompt_tokens": times.prompt_tokens,
                "new_tokens": times.new_tokens,
            },
            "source": sources,
            "artifact": {"target": origin.target, "manifest_sha256": origin.manifest_sha256},
        }
