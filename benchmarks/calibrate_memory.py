"""Measures memory and time of a calibration run on a real-shaped checkpoint with random weights.

    python benchmarks/calibrate_memory.py --work-dir DIR --tokenizer DIR [--size 4b|8b]

Writes a sharded bf16 checkpoint of Qwen3-VL's 4B or 8B shape (9 or 18 GB; kept with --keep) and as
many samples as asked, each a drawn radiograph with a question and an answer. Runs
`medmo-edge calibrate` in a child process and reads that process's memory from /proc (Linux). Peak
RSS counts everything resident, torch's libraries included. The record says nothing about accuracy.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from random_checkpoints import TEXT, write_checkpoint

from medmo_edge.calibration.record import read_record
from medmo_edge.phantoms import draw
from medmo_edge.prompts import user_message
from medmo_edge.samples import Sample, write_samples

_POLL_SECONDS = 0.05


def main() -> None:
    """Write, run, print one row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(TEXT), default="4b")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--side", type=int, default=448, help="of each picture, in pixels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    checkpoint = options.work_dir / f"qwen3-vl-{options.size}-random"
    samples = options.work_dir / "samples"
    try:
        if not checkpoint.exists():
            write_checkpoint(checkpoint, options.size, options.tokenizer)
        path = make_samples(samples, options.samples, options.side)
        measure(checkpoint, path, options.work_dir / "record", options.dtype)
    finally:
        shutil.rmtree(samples, ignore_errors=True)
        if not options.keep:
            shutil.rmtree(checkpoint, ignore_errors=True)


def make_samples(folder: Path, number: int, side: int) -> Path:
    """A sample file with ``number`` square pictures."""
    folder.mkdir(parents=True)
    made = []
    for seed in range(number):
        picture = (folder / f"{seed}.png").absolute()
        Image.fromarray(np.ascontiguousarray(draw(seed, size=(side, side)).pixels)).save(picture)
        answer = {"role": "assistant", "content": "No nodule. Normal heart size. " * 3}
        messages = [user_message("Generate a detailed radiology report for this image.", 1), answer]
        made.append(Sample(id=str(seed), task="report", images=(picture,), messages=messages))
    write_samples(folder / "samples.jsonl", made)
    return folder / "samples.jsonl"


def measure(checkpoint: Path, samples: Path, output: Path, dtype: str) -> None:
    """Run the command and print its figures; the record is checked, then removed."""
    command = [sys.executable, "-m", "medmo_edge", "calibrate", str(checkpoint)]
    command += ["--samples", str(samples), "-o", str(output), "--device", "cpu", "--dtype", dtype]
    started = time.monotonic()
    process = subprocess.Popen(command)
    peak = anonymous = 0
    while process.poll() is None:
        status = _memory(process.pid)
        peak = max(peak, status.get("VmHWM", 0))
        anonymous = max(anonymous, status.get("RssAnon", 0))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"calibration failed with code {process.returncode}")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = read_record(output)
    tokens = record.samples["tokens_text"] + record.samples["tokens_image"]
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    shutil.rmtree(output)
    print(
        f"{checkpoint.name}: weights {weights / 1e9:.2f} GB, {record.samples['count']} samples, "
        f"{tokens} tokens, {len(record.linears)} linears, {dtype}: peak RSS {peak / 1e6:.0f} MB "
        f"(anonymous {anonymous / 1e6:.0f} MB), {usage.ru_utime + usage.ru_stime:.0f} s CPU, "
        f"{time.monotonic() - started:.0f} s wall"
    )


def _memory(pid: int) -> dict[str, int]:
    """Bytes by name from /proc/PID/status; empty once the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in rows}


if __name__ == "__main__":
    main()
