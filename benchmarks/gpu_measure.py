"""What benchmarks/gpu.py measures of one artifact on one GPU, and the bandwidth it is held against.

    python benchmarks/gpu_measure.py ARTIFACT [--quick]       prints one JSON object

Run in a process of its own, so that the memory figure is the artifact's alone.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.errors import MedmoError
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest
from medmo_edge.phantoms import draw
from medmo_edge.runtime.backends import START
from medmo_edge.runtime.model_facts import Facts, file_bytes
from medmo_edge.runtime.ort_values import NUMBERS
from medmo_edge.runtime.session import Session, load
from medmo_edge.runtime.trt_cuda import Gpu

QUESTION = "Is there a nodule in this radiograph?"
_PICTURE = (512, 512)  # 256 vision tokens, as in the peers' published runs (about 265)
_STREAM_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long to measure: ``rounds`` of a question, ``steps`` tokens, after ``prompt`` tokens."""

    rounds: int = 5
    steps: int = 128
    prompt: int = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Medians: seconds from question to first token (``again``: of a second question about the
    same picture), parts of it, tokens per second, bytes that one token needs, memory of the GPU.
    """

    backend: str
    device: str
    load_seconds: float
    first_token_seconds: float
    first_token_again_seconds: float
    image_seconds: float
    prompt_tokens: int
    decode_tokens_per_second: float
    bytes_per_token: int
    gpu_bytes: int


def measure(artifact: Path, settings: Settings, backend: str = "auto") -> Figures:
    """Load an artifact and time it. Errors: as ``load`` and ``Study.ask``."""
    gpu = Gpu()
    try:
        free = gpu.free_bytes()
        with load(artifact, backend) as session:
            frame = Frame.from_pixels(draw(910_000, size=_PICTURE).pixels)
            _first_token(session, frame)  # caches, kernels, graphs
            waits = [_first_token(session, frame) for _ in range(settings.rounds)]
            rate = _decode_rate(session, settings)
            used = free - gpu.free_bytes()
            return Figures(
                backend=session.backend.name,
                device=session.backend.device,
                load_seconds=round(session.load_seconds, 3),
                first_token_seconds=_median(waits, "first"),
                first_token_again_seconds=_median(waits, "again"),
                image_seconds=_median(waits, "image"),
                prompt_tokens=int(waits[0]["tokens"]),
                decode_tokens_per_second=round(rate, 2),
                bytes_per_token=bytes_per_token(session.manifest, settings),
                gpu_bytes=used,
            )
    finally:
        gpu.close()


def _median(waits: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(each[name] for each in waits), 5)


def _first_token(session: Session, frame: Frame) -> dict[str, float]:
    """Waits for the first token of two questions about one new picture."""
    with session.study(frame) as study:
        start = time.perf_counter()
        answer = study.ask(QUESTION, max_new_tokens=1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        study.ask("Locate the nodule.", max_new_tokens=1)
        again = time.perf_counter() - start
    times = answer.timings
    return {
        "first": first,
        "again": again,
        "image": times.image_seconds,
        "tokens": times.prompt_tokens,
    }


def _decode_rate(session: Session, settings: Settings) -> float:
    """Tokens per second of greedy decoding, the choice of the token included."""
    backend = session.backend
    rates = []
    for _ in range(settings.rounds):
        backend.rewind(START)
        logits = backend.decode_tokens(list(range(1, settings.prompt + 1)))
        for _ in range(4):
            logits = backend.decode_tokens([int(logits.argmax())])
        start = time.perf_counter()
        for _ in range(settings.steps):
            logits = backend.decode_tokens([int(logits.argmax())])
        rates.append(settings.steps / (time.perf_counter() - start))
    backend.rewind(START)
    return statistics.median(rates)


def bytes_per_token(manifest: Manifest, settings: Settings) -> int:
    """What a step must read at least: the decoder's weights once, and the cache in use."""
    dtype = str(manifest.weights.get("graph_dtype", "float16"))
    cell = Facts.of(manifest).cell_bytes(np.dtype(NUMBERS[dtype].storage).itemsize)
    weights = file_bytes(manifest, "decoder_data", "language")
    return weights + cell * (settings.prompt + settings.steps // 2)


def bandwidth(rounds: int = 20) -> float:
    """Bytes per second that a copy within the GPU reads and writes: the roofline of decoding."""
    gpu = Gpu()
    try:
        size = min(_STREAM_BYTES, gpu.free_bytes() // 4)
        source, target = (gpu.allocate(size, "a copy") for _ in range(2))
        gpu.clear(source)
        gpu.on_device(target.address, source.address, size)
        gpu.wait()
        start = time.perf_counter()
        for _ in range(rounds):
            gpu.on_device(target.address, source.address, size)
        gpu.wait()
        return 2 * size * rounds / (time.perf_counter() - start)
    finally:
        gpu.close()


def main() -> None:
    """Print the figures of one artifact, or only the bandwidth without one; an error as a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    settings = Settings(rounds=2, steps=32) if options.quick else Settings()
    try:
        if options.artifact is None:
            found: dict[str, Any] = {"bytes_per_second": bandwidth()}
        else:
            found = asdict(measure(options.artifact, settings))
    except MedmoError as error:
        sys.exit(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
