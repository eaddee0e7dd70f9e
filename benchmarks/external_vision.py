"""Would a vision tower outside llama.cpp be closer to transformers, or faster?

    python benchmarks/external_vision.py CHECKPOINT ARTIFACT [--pictures N]

For drawn pictures of several shapes, the logits after a prompt are computed with llama.cpp's own
vision tower (mtmd, f16 weights) and with embeddings of transformers' fp32 tower, fed to the same
language file as rows [main | deepstack levels] with M-RoPE positions of our own; both are compared
with transformers in fp32 throughout. Not part of the runtime: it shows what one could gain.
"""

import argparse
import ctypes
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
from medmo_edge.preprocess import grid_thw, mrope_positions, patchify
from medmo_edge.runtime.backends import START, Mark
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


def append_embeddings(
    backend: LlamaCpp, rows: NDArray[np.float32], height: int, width: int
) -> None:
    """Put vision embeddings of a ``height`` x ``width`` token grid into the context."""
    llama = backend._library.llama
    start = backend.mark()
    # mrope_positions of image tokens alone: time, row and column, all from the present position.
    grid = (1, 2 * height, 2 * width)
    positions, _ = mrope_positions([0] * len(rows), [grid], image_token_id=0, merge_size=2)
    sections = np.zeros((4, len(rows)), np.int32)  # llama.cpp wants t, row, column and a fourth
    sections[:3] = positions + start.position
    for first in range(0, len(rows), 512):
        part = np.ascontiguousarray(rows[first : first + 512], np.float32)
        places = np.ascontiguousarray(sections[:, first : first + 512])
        batch = llama.llama_batch()
        batch.n_tokens = len(part)
        batch.embd = part.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.pos = places.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        silent = np.zeros(len(part), np.int8)
        batch.logits = silent.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        if llama.llama_decode(backend._context(), batch) != 0:
            raise SystemExit(f"llama_decode failed{backend._library.messages.last()}")
    backend._end = Mark(start.cells + len(rows), start.position + max(height, width))


def measure(session: Session, tower: Tower, frame: Frame) -> dict[str, Any]:
    """One picture both ways."""
    chat, backend = session._chat, session._backend
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
                append_embeddings(backend, rows, grid[1] // 2, grid[2] // 2)
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
