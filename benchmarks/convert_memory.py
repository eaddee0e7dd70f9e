"""Measures memory, time and size of an export from a real-shaped checkpoint with random weights.

    python benchmarks/convert_memory.py --work-dir DIR --tokenizer DIR [--size 4b|8b]

Writes a sharded bf16 checkpoint of Qwen3-VL's 4B or 8B shape (9 or 18 GB; kept with --keep),
exports it in a child process and reads that process's memory from /proc (Linux). Peak RSS counts
everything resident, mapped file pages included; anonymous memory leaves those out. CPU seconds, all
threads together, are the fair time on a busy machine. --tokenizer
names a folder with Qwen3's tokenizer.json. The weights say nothing about accuracy.
"""

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.manifest import read_manifest
from medmo_edge.model_config import expected_tensors, read_config

_SHARD_BYTES = 4 << 30
_TILE_VALUES = 1 << 22
_POLL_SECONDS = 0.05
_HEADER = f"{'target':14}{'seconds':>9}{'CPU':>9}{'peak RSS':>12}{'anonymous':>12}{'artifact':>17}"
# The published shapes of Qwen3-VL-4B-Instruct and -8B-Instruct.
_TEXT = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288},
}
_VISION: dict[str, dict[str, Any]] = {
    "4b": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "8b": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}


def main() -> None:
    """Print one row per target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(_TEXT), default="4b")
    parser.add_argument("--target", nargs="+", default=["gguf-q8_0", "gguf-q4_k_m"])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    checkpoint = options.work_dir / f"qwen3-vl-{options.size}-random"
    try:
        if not checkpoint.exists():
            write_checkpoint(checkpoint, options.size, options.tokenizer)
        print(_HEADER)
        for target in options.target:
            print(_row(target, measure(checkpoint, target, options.work_dir / target)), flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _row(target: str, found: dict[str, int | float]) -> str:
    return (
        f"{target:14}{found['seconds']:9.1f}{found['cpu']:9.1f}{found['peak'] / 1e6:9.0f} MB"
        f"{found['anonymous'] / 1e6:9.0f} MB{found['bytes']:15,} B"
    )


def measure(checkpoint: Path, target: str, output: Path) -> dict[str, int | float]:
    """Export in a child process; peaks in bytes. The artifact is checked, then removed."""
    command = [sys.executable, "-m", "medmo_edge", "export", str(checkpoint)]
    started, cpu_before = time.monotonic(), _children_cpu()
    process = subprocess.Popen([*command, "--target", target, "-o", str(output)])
    peak = anonymous = 0
    while process.poll() is None:
        status = _memory(process.pid)
        peak = max(peak, status.get("VmHWM", 0))
        anonymous = max(anonymous, status.get("RssAnon", 0))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"export of {target} failed with code {process.returncode}")
    seconds = time.monotonic() - started
    size = sum(record["bytes"] for record in read_manifest(output).files.values())
    shutil.rmtree(output)
    return {
        "seconds": seconds,
        "cpu": _children_cpu() - cpu_before,
        "peak": peak,
        "anonymous": anonymous,
        "bytes": size,
    }


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory(pid: int) -> dict[str, int]:
    """Memory lines of /proc/PID/status in bytes; empty when the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def write_checkpoint(folder: Path, size: str, tokenizer: Path) -> None:
    """A Hugging Face folder of the size's shape; weights repeat one block of random values."""
    folder.mkdir(parents=True)
    config, generation = _config(size), {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "preprocessor_config.json", _preprocessor())
    shutil.copy(tokenizer / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    is_untied = not config["tie_word_embeddings"]
    model = read_config(config, generation, str(folder), has_lm_head=is_untied)
    tile = _random_tile()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(expected_tensors(model))):
        name = f"model-{number + 1:05}.safetensors"
        _write_shard(folder / name, shard, tile)
        weight_map |= dict.fromkeys(shard, name)
    _write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def _config(size: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        **_TEXT[size],
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_parameters": {**rope, "rope_theta": 5_000_000},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "model_type": "qwen3_vl_text",
    }
    vision = {
        **_VISION[size],
        "num_heads": 16,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": _TEXT[size]["hidden_size"],
        "model_type": "qwen3_vl",
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": size == "4b",
        "text_config": {**text, "tie_word_embeddings": size == "4b"},
        "vision_config": vision,
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _random_tile() -> NDArray[np.uint16]:
    values = np.random.default_rng(0).normal(0, 0.02, _TILE_VALUES).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _shards(
    shapes: dict[str, tuple[int, ...]],
) -> Iterator[dict[str, tuple[int, ...]]]:
    rest = iter(shapes.items())
    while shard := dict(islice(rest, 1)):
        size = 2 * sum(math.prod(shape) for shape in shard.values())
        for name, shape in rest:
            shard[name] = shape
            size += 2 * math.prod(shape)
            if size > _SHARD_BYTES:
                break
        yield shard


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], tile: NDArray[np.uint16]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            whole, part = divmod(math.prod(shape), tile.size)
            for _ in range(whole):
                file.write(tile.data)
            file.write(tile[:part].data)


if __name__ == "__main__":
    main()
