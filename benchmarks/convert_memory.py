"""Measures memory, time and size of an export from a real-shaped checkpoint with random weights.

    python benchmarks/convert_memory.py --work-dir DIR --tokenizer DIR [--size 4b|8b]

Writes a sharded bf16 checkpoint of Qwen3-VL's 4B or 8B shape (9 or 18 GB; kept with --keep),
exports it in a child process and reads that process's memory from /proc (Linux). Peak RSS counts
everything resident, mapped file pages included; anonymous memory leaves those out. CPU seconds, all
threads together, are the fair time on a busy machine. --tokenizer
names a folder with Qwen3's tokenizer.json. The weights say nothing about accuracy.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from random_checkpoints import TEXT, write_checkpoint

from medmo_edge.manifest import read_manifest

_POLL_SECONDS = 0.05
# The conversion alone: golden cases would load the artifact and pass through the checkpoint.
_EXPORT = (
    "import sys; from medmo_edge.export.export import export_checkpoint; "
    "export_checkpoint(*sys.argv[1:], golden=False)"
)
_HEADER = f"{'target':14}{'seconds':>9}{'CPU':>9}{'peak RSS':>12}{'anonymous':>12}{'artifact':>17}"


def main() -> None:
    """Print one row per target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(TEXT), default="4b")
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
    command = [sys.executable, "-c", _EXPORT, str(checkpoint), target, str(output)]
    started, cpu_before = time.monotonic(), _children_cpu()
    process = subprocess.Popen(command)
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


if __name__ == "__main__":
    main()
