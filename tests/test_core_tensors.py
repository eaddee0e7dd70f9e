"""Safetensors reading: exact values, foreign files, and memory that stays flat."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmo_edge.errors import CheckpointError
from medmo_edge.tensors import TensorInfo, map_tensor, read_header, read_rows, to_float32


def write(path: Path, dtype: str, shape: tuple[int, ...], nbytes: int) -> Path:
    """A file of one zero tensor "a"; sparse, so that it needs no disk."""
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)
    return path


@given(bits=st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_bfloat16_is_exact(bits: list[int]) -> None:
    torch = pytest.importorskip("torch", reason="the reference bfloat16 is torch's")
    stored = np.array(bits, np.uint16)
    expected = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).float().numpy()
    # Compared as bits: NaN must stay the same NaN.
    assert np.array_equal(to_float32(stored, "BF16").view(np.uint32), expected.view(np.uint32))


def test_files_of_the_safetensors_package(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "odd": random.standard_normal((3, 5, 7)).astype(np.float32),
        "half": random.standard_normal(11).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "np"})
    infos = read_header(tmp_path / "a.safetensors")
    assert infos.keys() == arrays.keys()
    for name, array in arrays.items():
        assert infos[name].shape == array.shape and infos[name].nbytes == array.nbytes
        assert np.array_equal(map_tensor(infos[name], name), array)
        rows = [block.reshape(-1) for block in read_rows(infos[name], name, max_bytes=64)]
        assert np.array_equal(np.concatenate([*rows, np.zeros(0, np.float32)]), array.reshape(-1))


def test_any_header_length_may_leave_data_unaligned(tmp_path: Path) -> None:
    for pad in range(8):
        path = tmp_path / f"{pad}.safetensors"
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        text = json.dumps({"a": entry}).encode() + b" " * pad
        data = np.array([1.5, -2.5], np.float32).tobytes()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        info = read_header(path)["a"]
        assert map_tensor(info, "a").tolist() == [1.5, -2.5]
        assert next(read_rows(info, "a", 100)).tolist() == [1.5, -2.5]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", "F32", (100, 100), 40_000)
    info = read_header(path)["a"]
    os.truncate(path, info.offset + 20_000)
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        list(read_rows(info, "a", 4_000))
    path.unlink()
    with pytest.raises(CheckpointError, match="a.safetensors cannot be read: No such file"):
        list(read_rows(info, "a", 4_000))


def test_unreadable_type(tmp_path: Path) -> None:
    info = read_header(write(tmp_path / "a.safetensors", "F8_E4M3", (8,), 8))["a"]
    assert isinstance(info, TensorInfo) and info.dtype == "F8_E4M3"
    with pytest.raises(CheckpointError, match="stored as F8_E4M3"):
        map_tensor(info, "a")
    with pytest.raises(CheckpointError, match="stored as F8_E4M3"):
        list(read_rows(info, "a", 8))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident size is read in /proc")
def test_reading_rows_keeps_memory_flat(tmp_path: Path) -> None:
    """256 MB of tensor through blocks of 1 MB: mapped pages would count as resident."""
    shape = (32_768, 4_096)
    info = read_header(write(tmp_path / "a.safetensors", "BF16", shape, 1 << 28))["a"]

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, peak, rows = resident_bytes(), 0, 0
    for block in read_rows(info, "a", 1 << 20):
        assert block.nbytes <= 1 << 20
        rows += len(block)
        peak = max(peak, resident_bytes())
    assert rows == shape[0]
    assert peak - before < 16 << 20
