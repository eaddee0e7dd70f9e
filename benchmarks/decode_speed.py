"""Decode and prefill speed of our ONNX targets against onnxruntime-genai, llama.cpp and the memory.

    python benchmarks/decode_speed.py --tokenizer DIR --work-dir DIR [--threads N] [--quick]

Exports a random checkpoint of the 0.6B shape to every target, lets onnxruntime-genai build the same
text decoder its own way (plain Qwen3, which spares it M-RoPE and DeepStack; int4 in blocks of 32
with an int8 head, as ours), and times each in processes of its own, in rounds, so that a machine
that slows down slows all. The roofline is what a measured stream of reads would allow for the bytes
of weights and KV cache that one token needs. Greedy choice is included everywhere. llama.cpp should
be the build that the Makefile makes: with AMX code in it, its fast kernels stay off (see
runtime/llamacpp_native.py), and LLAMA_CPP_LIB_PATH may name another build.

Needs onnxruntime-genai and onnx_ir for its builder; runtimes that are missing are left out.
--tokenizer names a folder with Qwen3's tokenizer.json and tokenizer_config.json. About 8 minutes on
two cores with building, 4 without (--work-dir keeps what was built); --quick: about 2.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The stream below counts its own threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from random_checkpoints import write_checkpoint, write_text_checkpoint

from medmo_edge.manifest import read_manifest

_SIZE = "0.6b"
_OURS = ("onnx-int4", "onnx-int8", "onnx-fp16", "onnx-fp32", "gguf-q4_k_m")
_GENAI = {
    "genai-int4": ("int4", ["accuracy_level=4", "matmul_mixed_precision=last_matmul:int8"]),
    "genai-fp16": ("fp16", []),
    "genai-fp32": ("fp32", []),
}
# (ours, the other): the ratios that are asked for. Where genai cannot run its fp16 graph on a CPU,
# its fp32 graph stands in: ONNX Runtime widens fp16 weights on CPUs when it loads them.
_PAIRS = (
    ("onnx-int4", "genai-int4"),
    ("onnx-fp16", "genai-fp16"),
    ("onnx-fp16", "genai-fp32"),
    ("onnx-fp32", "genai-fp32"),
    ("onnx-int4", "gguf-q4_k_m"),
    ("onnx-int8", "gguf-q4_k_m"),
)
_STREAM_BYTES = 512 << 20


def main() -> None:
    """Build what is missing, measure in rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of the table's rows")
    parser.add_argument("--quick", action="store_true", help="one round, 128 tokens, 24 steps")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.prompt, options.steps = 1, 128, 24
    if options.child:
        print(json.dumps(_time(options.child[0], options.child[1], options)))
        return
    paths = _build(options.work_dir, options.tokenizer, options.only)
    rounds, refused = _rounds(paths, options)
    stream = float(np.median([_stream(options.threads) for _ in range(3)]))
    _print(paths, rounds, stream, options)
    for name, reason in refused.items():
        print(f"{name:14}cannot run: {reason}")


def _build(folder: Path, tokenizer: Path, only: list[str] | None) -> dict[str, Path]:
    """The artifact folder of every row that can be measured here."""
    wanted = [name for name in (*_OURS, *_GENAI) if not only or name in only]
    paths = {}
    for name in wanted:
        path = folder / name
        if name in _GENAI and not (find_spec("onnxruntime_genai") and find_spec("onnx_ir")):
            print(f"{name}: onnxruntime-genai or onnx_ir is not installed, left out")
            continue
        if not path.exists():
            (_build_genai if name in _GENAI else _export)(folder, tokenizer, name)
        paths[name] = path
    return paths


def _export(folder: Path, tokenizer: Path, name: str) -> None:
    checkpoint = folder / f"checkpoint-{_SIZE}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, _SIZE, tokenizer)
    command = [sys.executable, "-m", "medmo_edge", "export", str(checkpoint)]
    subprocess.run([*command, "--target", name, "-o", str(folder / name)], check=True)


def _build_genai(folder: Path, tokenizer: Path, name: str) -> None:
    checkpoint = folder / f"text-{_SIZE}"
    if not checkpoint.exists():
        write_text_checkpoint(checkpoint, _SIZE, tokenizer)
    precision, extra = _GENAI[name]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    command += ["-o", str(folder / name), "-p", precision, "-e", "cpu"]
    command += ["--extra_options", *extra] if extra else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _rounds(
    paths: dict[str, Path], options: argparse.Namespace
) -> tuple[list[dict[str, dict[str, float]]], dict[str, str]]:
    """The figures of every round, and why a peer has none; a peer that fails is not tried again."""
    rounds: list[dict[str, dict[str, float]]] = []
    refused: dict[str, str] = {}
    for _ in range(options.rounds):
        found = {}
        for name, path in paths.items():
            if name in refused:
                continue
            times = _child(name, path, options)
            if isinstance(times, str):
                refused[name] = times
            else:
                found[name] = times
        rounds.append(found)
    return rounds, refused


def _child(name: str, path: Path, options: argparse.Namespace) -> dict[str, float] | str:
    """What one process measured, or why a peer could not. Our own must run."""
    command = [sys.executable, __file__, "--child", name, str(path)]
    for option in ("threads", "prompt", "steps"):
        command += [f"--{option}", str(getattr(options, option))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode and name in _GENAI:
        return " ".join(result.stderr.split()).rpartition("FAIL : ")[2][-300:]
    if result.returncode:
        raise SystemExit(f"{name} failed: {result.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _time(name: str, path: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the prompt and of the median step, wall and CPU, and the peak memory."""
    ids = [int(id) for id in np.random.default_rng(0).integers(1000, 9000, options.prompt)]
    run = _genai if name in _GENAI else _ours
    prefill, steps, cpu = run(path, ids, options)
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    peak = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")]
    return {
        "prefill": prefill,
        "step": float(np.median(steps)),
        "step_cpu": cpu / len(steps),
        "peak": float(peak[0] if peak else 0),
    }


def _ours(
    path: str, ids: list[int], options: argparse.Namespace
) -> tuple[float, list[float], float]:
    from medmo_edge.runtime.backends import START
    from medmo_edge.runtime.session import load

    with load(path, verify=False, threads=options.threads) as session:
        backend = session.backend
        backend.decode_tokens(ids[:16])  # pages in the weights
        backend.decode_tokens(ids[:1])
        backend.rewind(START)
        start = time.perf_counter()
        token = int(backend.decode_tokens(ids).argmax())
        prefill, steps = time.perf_counter() - start, []
        cpu = time.process_time()
        for _ in range(options.steps):
            start = time.perf_counter()
            token = int(backend.decode_tokens([token]).argmax())
            steps.append(time.perf_counter() - start)
        return prefill, steps, time.process_time() - cpu


def _genai(
    path: str, ids: list[int], options: argparse.Namespace
) -> tuple[float, list[float], float]:
    import medmo_edge  # noqa: F401  first: it keeps the libraries off the network

    library: Any = __import__("onnxruntime_genai")
    config = library.Config(path)
    threads = {"session_options": {"intra_op_num_threads": options.threads}}
    config.overlay(json.dumps({"model": {"decoder": threads}}))
    model = library.Model(config)

    def start_generator() -> Any:
        parameters = library.GeneratorParams(model)
        length = options.prompt + options.steps + 8
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return library.Generator(model, parameters)

    warm = start_generator()
    warm.append_tokens(ids[:16])
    warm.generate_next_token()
    del warm
    generator = start_generator()
    start = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    prefill, steps = time.perf_counter() - start, []
    cpu = time.process_time()
    for _ in range(options.steps):
        start = time.perf_counter()
        generator.generate_next_token()
        steps.append(time.perf_counter() - start)
    return prefill, steps, time.process_time() - cpu


def _stream(threads: int) -> float:
    """Bytes read per second by ``threads`` dot products over memory that no cache holds."""
    arrays = [np.ones(_STREAM_BYTES // 4 // threads, np.float32) for _ in range(threads)]
    best = float("inf")
    for _ in range(4):
        workers = [threading.Thread(target=np.dot, args=(each, each)) for each in arrays]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - start)
    return sum(each.nbytes for each in arrays) / best


def _bytes_per_token(name: str, path: Path, context: int) -> int | None:
    """Weights and KV cache that one step reads; None for builds of others."""
    if name in _GENAI:
        return None
    manifest = read_manifest(path, verify=False)
    roles = ("decoder_data", "language")
    weights = sum(each["bytes"] for each in manifest.files.values() if each["role"] in roles)
    model = manifest.model
    value = 4 if manifest.weights.get("graph_dtype") == "float32" else 2
    heads = model["num_layers"] * model["num_kv_heads"] * model["head_dim"]
    return int(weights + 2 * value * heads * context)


def _print(
    paths: dict[str, Path],
    rounds: list[dict[str, dict[str, float]]],
    stream: float,
    options: argparse.Namespace,
) -> None:
    median = {
        name: {key: float(np.median([each[name][key] for each in rounds])) for key in first}
        for name, first in rounds[0].items()
    }
    print(
        f"\n{options.threads} threads, prompt {options.prompt}, {options.steps} steps, medians of"
    )
    print(f"{options.rounds} rounds; stream of reads {stream / 1e9:.1f} GB/s")
    print(f"{'':14}{'ms/token':>10}{'CPU ms':>9}{'tok/s':>8}{'prefill tok/s':>15}", end="")
    print(f"{'peak RSS':>11}{'read/token':>12}{'roofline':>10}")
    for name, found in median.items():
        size = _bytes_per_token(name, paths[name], options.prompt + options.steps // 2)
        share = f"{size / found['step'] / stream:10.2f}" if size else ""
        print(
            f"{name:14}{1e3 * found['step']:10.1f}{1e3 * found['step_cpu']:9.1f}"
            f"{1 / found['step']:8.1f}{options.prompt / found['prefill']:15.1f}"
            f"{found['peak'] / 1e6:8.0f} MB{f'{size / 1e6:.0f} MB' if size else '':>12}{share}"
        )
    for ours, other in _PAIRS:
        if ours in median and other in median:
            ratios = {
                key: [each[other][key] / each[ours][key] for each in rounds]
                for key in ("step", "step_cpu", "prefill")
            }
            shown = ", ".join(f"{key} {np.median(values):.2f}" for key, values in ratios.items())
            print(f"{ours} is faster than {other} by the factor: {shown}")


if __name__ == "__main__":
    main()
