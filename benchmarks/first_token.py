"""The wait a radiologist feels: picture to first token on the CPU, against llama.cpp's own tool.

    python benchmarks/first_token.py --tokenizer DIR --work-dir DIR --tool PATH [--quick]

A checkpoint of the 4B shape with random weights is exported to gguf-q4_k_m, onnx-int4 and
onnx-int8. For a 448x448 and a 1024x1024 picture it times, each in a process of its own with the
weights in the page cache: llama-mtmd-cli on the same GGUF; our llama.cpp backend; our ONNX Runtime
backend with either artifact; and llama.cpp's decoder fed by the ONNX vision tower. "wait" is vision
tower + image tokens + question; the question and its template are the same length everywhere. "CPU"
is processor time of the wait, which a busy machine disturbs least; the tool's own spans loading.

llama-mtmd-cli is not in the llama-cpp-python wheel, but its source is in the source distribution:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*
    F="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"   # x86: see cmake/llama-runtime-only.cmake
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B tool -DCMAKE_BUILD_TYPE=Release \\
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_C_FLAGS="$F" -DCMAKE_CXX_FLAGS="$F"
    cmake --build tool --target llama-mtmd-cli -j       # about 8 minutes on two cores
    --tool tool/bin/llama-mtmd-cli

With LLAMA_CPP_LIB_PATH=tool/bin llama-cpp-python uses the very same library. --tokenizer names a
folder with Qwen3's tokenizer.json. The first run builds 25 GB in --work-dir (about 10 minutes on
two cores); then about 6 minutes, --quick (448 only, one round) about 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from random_checkpoints import write_checkpoint

from medmo_edge.manifest import read_manifest

_TOOLS_TARGET = "gguf-q4_k_m"
# row -> artifacts it needs: the one that decodes, and the one whose vision tower it uses
_ROWS = {
    "llamacpp": ("gguf-q4_k_m", "gguf-q4_k_m"),
    "ort, onnx-int4": ("onnx-int4", "onnx-int4"),
    "ort, onnx-int8": ("onnx-int8", "onnx-int8"),
    "llamacpp + ort vision": ("gguf-q4_k_m", "onnx-int4"),
}
_QUESTION = "Is there a nodule in this radiograph?"
_TOOL_LINES = {
    "vision": r"encoding done in (\d+) ms",
    "image": r"image decoded \(batch \d+/\d+\) in (\d+) ms",
    "prompt": r"prompt eval time\s*=\s*([\d.]+) ms",
}


def main() -> None:
    """Build what is missing, measure in rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--tool", type=Path, help="llama-mtmd-cli")
    parser.add_argument("--size", default="4b", choices=["0.6b", "4b", "8b"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sides", type=int, nargs="+", default=[448, 1024])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=list(_ROWS), default=list(_ROWS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--child", nargs=3, metavar=("ROW", "SIDE", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.quick:
        options.sides, options.rounds = [448], 1
    if options.child:
        print(
            json.dumps(
                _ours(options.child[0], int(options.child[1]), Path(options.child[2]), options)
            )
        )
        return
    folder = options.work_dir / options.size
    _build(folder, options)
    for side in options.sides:
        _print(side, [_round(side, folder, options) for _ in range(options.rounds)])


def _build(folder: Path, options: argparse.Namespace) -> None:
    checkpoint = folder / "checkpoint"
    needed = {target for row in options.rows for target in _ROWS[row]} | {_TOOLS_TARGET}
    for target in sorted(needed):
        if (folder / target).exists():
            continue
        if not checkpoint.exists():
            write_checkpoint(checkpoint, options.size, options.tokenizer)
        command = [sys.executable, "-m", "medmo_edge", "export", str(checkpoint)]
        subprocess.run([*command, "--target", target, "-o", str(folder / target)], check=True)


def _round(side: int, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    picture = folder / f"picture-{side}.png"
    if not picture.exists():
        Image.fromarray(_pixels(side)).save(picture)
    found = {}
    if options.tool:
        found["llama-mtmd-cli"] = _tool(picture, folder / _TOOLS_TARGET, options)
    for row in options.rows:
        command = [sys.executable, __file__, "--threads", str(options.threads)]
        result = subprocess.run(
            [*command, "--child", row, str(side), str(folder)], capture_output=True, text=True
        )
        if result.returncode:
            raise SystemExit(f"{row} failed: {result.stderr.strip()[-500:]}")
        found[row] = json.loads(result.stdout.splitlines()[-1])
    return found


def _pixels(side: int) -> Any:
    """Smooth noise: a picture that no library skips."""
    random = np.random.default_rng(side).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(random).resize((side, side), Image.Resampling.BICUBIC))


def _tool(picture: Path, artifact: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds as llama-mtmd-cli reports them itself."""
    files = {path.name: path for path in artifact.glob("*.gguf")}
    vision = next(path for name, path in files.items() if "mmproj" in name or "vision" in name)
    language = next(path for path in files.values() if path != vision)
    command = [str(options.tool), "-m", str(language), "--mmproj", str(vision)]
    command += ["--image", str(picture), "-p", _QUESTION, "-n", "2", "--temp", "0"]
    command += ["-t", str(options.threads), "-c", "2048", "--no-warmup"]
    command += ["--perf", "-lv", "4"]
    before = os.times()
    result = subprocess.run(command, capture_output=True, text=True)
    after = os.times()
    log = result.stdout + result.stderr
    if result.returncode:
        raise SystemExit(f"{options.tool} failed: {log.strip()[-500:]}")
    parts = {key: re.findall(pattern, log) for key, pattern in _TOOL_LINES.items()}
    if not parts["vision"] or not parts["image"]:
        raise SystemExit(f"{options.tool} printed no timings: {log.strip()[-500:]}")
    seconds = {key: sum(map(float, values)) / 1e3 for key, values in parts.items()}
    # Its "prompt eval time" spans everything before the first token, the vision tower included.
    wait = max(seconds["prompt"], seconds["vision"] + seconds["image"])
    cpu = after.children_user - before.children_user + after.children_system
    cpu -= before.children_system
    return {"vision": seconds["vision"], "wait": wait, "cpu": cpu}


def _ours(row: str, side: int, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the vision tower alone and of the whole wait, the second of two equal runs."""
    from medmo_edge.images import Frame
    from medmo_edge.runtime.combined import Combined
    from medmo_edge.runtime.llamacpp import LlamaCpp
    from medmo_edge.runtime.session import load

    decoder, tower = (folder / name for name in _ROWS[row])
    with load(decoder, verify=False, threads=options.threads, max_context=2048) as session:
        backend = session.backend
        if tower != decoder:
            assert isinstance(backend, LlamaCpp)
            manifest = read_manifest(tower, verify=False)
            backend = Combined(backend, manifest, threads=options.threads)
            session._stage.backend = session._stage.prefixes._backend = backend
        small = Frame.from_pixels(_pixels(256))
        session.ask(small, _QUESTION, max_new_tokens=1)  # pages in the weights
        frame = Frame.from_pixels(_pixels(side))
        pixels = session._chat.picture(frame).resized_HWC
        start = time.perf_counter()
        backend.encode_image(pixels)
        vision = time.perf_counter() - start
        cpu = time.process_time()
        times = session.ask(frame, _QUESTION, max_new_tokens=1).timings
        cpu = time.process_time() - cpu
    return {"vision": vision, "wait": times.image_seconds + times.prefill_seconds, "cpu": cpu}


def _print(side: int, rounds: list[dict[str, dict[str, float]]]) -> None:
    median = {
        row: {key: float(np.median([each[row][key] for each in rounds])) for key in first}
        for row, first in rounds[0].items()
    }
    peer = median.get("llama-mtmd-cli")
    print(f"\n{side} x {side} pixels{'':8}{'vision s':>10}{'wait s':>10}{'CPU s':>10}", end="")
    print(f"{'ratios to the tool':>24}")
    for row, found in median.items():
        ratios = [found[key] / peer[key] for key in ("vision", "wait")] if peer else []
        shown = "".join(f"{ratio:12.2f}" for ratio in ratios)
        times = "".join(f"{found[key]:10.2f}" for key in ("vision", "wait", "cpu"))
        print(f"{row:26}{times}{shown}")


if __name__ == "__main__":
    main()
