"""What an artifact needs of a machine: threads, memory, context length."""

from dataclasses import replace
from pathlib import Path

import pytest

from medmo_edge.errors import BackendUnavailable
from medmo_edge.manifest import Manifest, read_manifest
from medmo_edge.runtime import device, llamacpp_fit
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.session import load

GB = 1 << 30


def _large(manifest: Manifest, size: int) -> Manifest:
    """The same artifact with the weights of a real model: Qwen3-VL-4B's layers, ``size`` bytes."""
    records = {
        name: {**record, "bytes": size if record["role"] == "language" else 0}
        for name, record in manifest.files.items()
    }
    shape = {"num_layers": 36, "num_kv_heads": 8, "head_dim": 128}
    return replace(manifest, files=records, model=manifest.model | shape)  # type: ignore[arg-type]


def test_a_token_of_the_4b_model_takes_144_kib(tiny_artifact: Path) -> None:
    manifest = _large(read_manifest(tiny_artifact), GB)
    # keys and values x 36 layers x 8 heads x 128 x 2 bytes
    assert llamacpp_fit.cell_bytes(manifest) == 147_456


@pytest.mark.parametrize(
    ("free_gb", "cells", "mapped", "fits"),
    [
        (2, 1024, True, False),  # 2.5 GB of weights do not fit
        (3.1, 1024, True, True),
        (4, 4352, True, True),
        (8, 18944, False, True),
        (64, 32768, False, True),
    ],
)
def test_what_4b_does_with_the_memory_there_is(
    free_gb: float, cells: int, mapped: bool, fits: bool, tiny_artifact: Path
) -> None:
    # E.g. 8 GB: half of (8 - 2.5 GB - 300 MB) is 2666 MB, or 18958 tokens of 144 KB, cut to 256s.
    manifest = _large(read_manifest(tiny_artifact), int(2.5 * GB))
    machine = replace(probe(), ram_available_bytes=int(free_gb * GB))
    assert (llamacpp_fit.memory_obstacle(manifest, machine) is None) == fits
    assert llamacpp_fit.max_cells(manifest, machine, None) == cells
    assert llamacpp_fit.should_map(manifest, machine) == mapped
    assert llamacpp_fit.max_cells(manifest, machine, 77) == 77


def test_a_small_model_uses_one_thread_and_a_large_one_all_cores(tiny_artifact: Path) -> None:
    machine = replace(probe(), cores=8)
    small = read_manifest(tiny_artifact)
    records = {name: {**record, "bytes": 1 << 30} for name, record in small.files.items()}
    large = replace(small, files=records)  # type: ignore[arg-type]
    assert llamacpp_fit.default_threads(small, machine) == 1
    assert llamacpp_fit.default_threads(large, machine) == 8


def test_too_little_memory_is_a_reason(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_memory", lambda: (8 << 30, 100 << 20))
    with pytest.raises(BackendUnavailable, match=r"llamacpp: needs about 0\.3 GB of memory"):
        load(tiny_artifact)
