"""Would a vision tower outside llama.cpp be closer to transformers, or faster?

    python benchmarks/external_vision.py CHECKPOINT ARTIFACT [--pictures N]

For drawn pictures of several shapes, the logits after a prompt are computed with llama.cpp's own
vision tower (mtmd, f16 weights) and with embeddings of transformers' fp32 tower, fed to the same
language file as rows [main | deepstack levels] with M-RoPE positions of our own; both are compared
with transformers in fp32 throughout. It shows what an exact tower in fp32 could gain.
"""

import argparse
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.images import Frame
from medmo_edge.phantoms import draw
from medmo_edge.preprocess import grid_thw, patchify
from medmo_edge.runtime.backends import START
from medmo_edge.runtime.chat import Picture
from medmo_edge.runtime.llamacpp import LlamaCpp
from medmo_edge.runtime.session import Session, load

SIZES = ((256, 256), (448, 320), (768, 96), (130, 700), (512, 512))


class Tower:
    """transformers in fp32: vision embeddings for llama.cpp, and the logits to compare with."""

    def __init__(self, checkpoint: Path) -> None:
        self.torch: Any = import_module("torch")
        transformers: Any = import_module("transformers")
        self.model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=self.torch.float32, attn_implementation="sdpa"
        ).eval()

    def embed(self, patches: NDArray[np.float32], grid: tuple[int, int, int]) -> Any:
        """Rows [N, hidden * (1 + levels)]: main, then the deepstack levels."""
        with self.torch.no_grad():
            found = self.model.model.visual(
                self.torch.tensor(patches), grid_thw=self.torch.tensor([grid])
            )
        rows = self.torch.cat([found.pooler_output, *found.deepstack_features], dim=1)
        return np.ascontiguousarray(rows.numpy())

    def logits(
        self, ids: list[int], patches: NDArray[np.float32], grid: tuple[int, int, int]
    ) -> NDArray[np.float32]:
        """Logits [V] after the prompt."""
        prompt = self.torch.tensor([ids])
        with self.torch.no_grad():
            found = self.model(
                input_ids=prompt,
                mm_token_type_ids=(prompt == self.model.config.image_token_id).int(),
                pixel_values=self.torch.tensor(patches),
                image_grid_thw=self.torch.tensor([grid]),
            )
        return np.asarray(found.logits[0, -1].numpy())


def measure(session: Session, tower: Tower, frame: Frame) -> dict[str, Any]:
    """One picture both ways."""
    chat, backend = session._chat, session.backend
    assert isinstance(backend, LlamaCpp)
    picture = chat.picture(frame)
    kept, rest = chat.prompt("Locate the nodule.", [picture])
    height, width = picture.resized_HWC.shape[:2]
    grid = grid_thw(height, width, chat.preprocessing)
    patches = patchify(picture.resized_HWC, chat.preprocessing)
    expected = tower.logits(kept + rest, patches, grid)
    found: dict[str, Any] = {"tokens": picture.num_tokens, "logit_std": float(expected.std())}
    for name in ("mtmd", "external"):
        backend.rewind(START)
        for segment in chat.segments(kept, [picture]):
            if not isinstance(segment, Picture):
                backend.decode_tokens(segment)
                continue
            start, cpu = time.perf_counter(), time.process_time()
            if name == "mtmd":
                backend.append_image(segment.resized_HWC)
            else:
                rows = tower.embed(patches, grid)
                backend.append_rows(rows, grid[1] // 2, grid[2] // 2)
            found[f"{name}_ms"] = 1e3 * (time.perf_counter() - start)
            found[f"{name}_cpu_ms"] = 1e3 * (time.process_time() - cpu)
        logits = backend.decode_tokens(rest)
        found[f"{name}_max_difference"] = float(np.abs(logits - expected).max())
    return found


def main() -> None:
    """Measure all pictures and print one JSON line each, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder, or nano")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--pictures", type=int, default=10)
    arguments = parser.parse_args()
    tower = Tower(open_checkpoint(arguments.checkpoint).path)
    tower.torch.set_num_threads(1)
    with load(arguments.artifact, threads=1) as session:
        found = []
        for seed in range(arguments.pictures):
            pixels = draw(910_000 + seed, size=SIZES[seed % len(SIZES)]).pixels
            found.append(measure(session, tower, Frame.from_pixels(pixels)))
            print(json.dumps({name: round(value, 5) for name, value in found[-1].items()}))
    medians = {name: float(np.median([each[name] for each in found])) for name in found[0]}
    print(json.dumps({"median": {name: round(value, 5) for name, value in medians.items()}}))


if __name__ == "__main__":
    main()
