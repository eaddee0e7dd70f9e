"""What int8 costs the vision tower in accuracy and saves in time, encoding by encoding.

    python benchmarks/vision_encodings.py [CHECKPOINT] [--pictures N] [--side PIXELS] [--threads N]

Builds the tower of a checkpoint (default nano) once per encoding and runs it with ONNX Runtime on
the CPU on drawn radiographs. Prints, against float32: the mean and the worst cosine of a vision
token for the main features and each deepstack level, and processor seconds per picture (all
threads; the least of the pictures). Time says something about a shape, accuracy only about trained
weights.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.export.onnx_graph import save_graph
from medmo_edge.export.onnx_linear import FLOAT, Encoding
from medmo_edge.export.onnx_vision import VisionPlan, build_vision
from medmo_edge.phantoms import draw
from medmo_edge.preprocess import grid_thw, patchify, resize
from medmo_edge.vision_inputs import VisionGeometry, vision_inputs

_DYNAMIC, _ROWS = Encoding(kind="dynamic"), Encoding(kind="dynamic", per_token=True)
_BLOCKS = Encoding(kind="nbits", bits=8, block=32)
#: the first is the reference; "shipped" is what onnx-int8 and onnx-int4 hold
PLANS = {
    "float32": VisionPlan(normed=FLOAT, free=FLOAT),
    "shipped": VisionPlan(normed=_DYNAMIC, free=_ROWS),
    "per tensor": VisionPlan(normed=_DYNAMIC, free=_DYNAMIC),
    "per row": VisionPlan(normed=_ROWS, free=_ROWS),
    "blocks of 32": VisionPlan(normed=_BLOCKS, free=_BLOCKS),
}

Floats = NDArray[np.float32]


def main() -> None:
    """Print one row per encoding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="nano")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--side", type=int, help="resize all to a square of this side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", nargs="+", choices=list(PLANS), default=list(PLANS))
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    feeds = [
        _feeds(checkpoint, draw(seed, size=(352, 384)).pixels, options.side)
        for seed in range(options.pictures)
    ]
    print(f"{'encoding':14}{'CPU s':>8}   mean and worst cosine of a token, per level")
    reference: list[Floats] = []
    for name in dict.fromkeys(["float32", *options.plan]):
        outputs, seconds = _run(checkpoint, PLANS[name], feeds, options.threads)
        reference = reference or outputs
        print(f"{name:14}{seconds:8.3f}   {_agreement(reference, outputs)}", flush=True)


def _feeds(checkpoint: Checkpoint, pixels: NDArray[np.uint8], side: int | None) -> dict[str, Any]:
    """The inputs of vision.onnx for one grey picture."""
    image = np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels
    if side:
        image = np.asarray(Image.fromarray(image).resize((side, side)))
    else:
        image = resize(image, checkpoint.preprocessing)
    vision = checkpoint.config.vision
    geometry = VisionGeometry(
        head_dim=vision.hidden_size // vision.num_heads,
        num_position_embeddings=vision.num_position_embeddings,
        merge_size=vision.merge_size,
    )
    grid = grid_thw(image.shape[0], image.shape[1], checkpoint.preprocessing)
    given = vision_inputs(grid, geometry)
    return {
        "pixel_values": patchify(image, checkpoint.preprocessing)[None],
        "pos_idx": given.pos_idx,
        "pos_weight": given.pos_weight,
        "cos": given.cos,
        "sin": given.sin,
    }


def _run(
    checkpoint: Checkpoint, plan: VisionPlan, feeds: list[dict[str, Any]], threads: int
) -> tuple[list[Floats], float]:
    """Features [1 + levels, tokens, D] of every picture, and the least processor time of one."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vision.onnx"
        save_graph(build_vision(checkpoint, plan).graph, path, lambda size: None)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, feeds[0])
        outputs, seconds = [], []
        for feed in feeds:
            before = time.process_time()
            main_features, levels = session.run(None, feed)
            seconds.append(time.process_time() - before)
            outputs.append(np.concatenate([main_features[None], levels])[:, 0])
    return outputs, min(seconds)


def _agreement(reference: list[Floats], outputs: list[Floats]) -> str:
    expected, found = np.concatenate(reference, axis=1), np.concatenate(outputs, axis=1)
    lengths = np.linalg.norm(expected, axis=-1) * np.linalg.norm(found, axis=-1)
    cosines = (expected * found).sum(axis=-1) / lengths
    return "  ".join(f"{level.mean():.6f} {level.min():.5f}" for level in cosines)


if __name__ == "__main__":
    main()
