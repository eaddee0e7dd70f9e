"""Importance matrices: llama.cpp's GGUF form byte for byte, and refusal of everything else."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmo_edge.calibration.imatrix import Imatrix, read_imatrix, write_imatrix
from medmo_edge.errors import CalibrationError

gguf = pytest.importorskip("gguf")


def matrix(count: float = 7.0) -> Imatrix:
    random = np.random.default_rng(0)
    means = {
        f"blk.{layer}.{name}.weight": random.random(width, np.float32)
        for layer in range(2)
        for name, width in {"attn_q": 8, "ffn_down": 16}.items()
    }
    return Imatrix(
        means=means,
        counts=dict.fromkeys(means, count),
        datasets=("a.jsonl", "b.jsonl"),
        chunk_count=3,
        chunk_size=256,
    )


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def refusal(path: Path) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_imatrix(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_raw(path: Path, tensors: dict[str, NDArray[np.float32]]) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", matrix())
    read = read_imatrix(tmp_path / "i.gguf")
    assert read.counts == matrix().counts
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("a.jsonl", "b.jsonl"), 3, 256)
    assert list(read.means) == list(matrix().means)
    for name, mean in matrix().means.items():
        np.testing.assert_allclose(read.means[name], mean, rtol=2e-7)


@given(count=st.integers(1, 1 << 24), power=st.integers(0, 12))
def test_means_that_are_powers_of_two_survive_exactly(
    tmp_path_factory: pytest.TempPathFactory, count: int, power: int
) -> None:
    path = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    mean = np.full(4, 2.0**-power, np.float32)
    write_imatrix(path, Imatrix(means={"w": mean}, counts={"w": count}))
    assert np.array_equal(read_imatrix(path).means["w"], mean)


def test_the_file_is_as_llama_imatrix_writes_it(tmp_path: Path) -> None:
    """The keys and tensors that tools/imatrix/imatrix.cpp writes, and no architecture."""
    write_imatrix(tmp_path / "i.gguf", matrix())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    keys = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.jsonl", "b.jsonl"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 256,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 8
    sums, counts = tensors["blk.1.attn_q.weight.in_sum2"], tensors["blk.1.attn_q.weight.counts"]
    assert list(sums.shape) == [8, 1] and list(counts.shape) == [1, 1]
    assert sums.tensor_type == counts.tensor_type == gguf.GGMLQuantizationType.F32
    mean = matrix().means["blk.1.attn_q.weight"]
    assert np.array_equal(sums.data.reshape(-1), mean * np.float32(7))
    assert counts.data.reshape(-1) == [7]


def test_a_refused_matrix_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        write_imatrix(tmp_path / "i.gguf", matrix(count=0))
    assert not list(tmp_path.iterdir())


def test_one_dimensional_sums_are_read_too(tmp_path: Path) -> None:
    """GGUF drops trailing dimensions of one, so llama-imatrix may write one dimension."""
    path = write_raw(
        tmp_path / "i.gguf",
        {"w.in_sum2": f32(2, 4), "w.counts": f32(2)},
    )
    assert np.array_equal(read_imatrix(path).means["w"], f32(1, 2))


def test_files_that_are_no_importance_matrix(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "nowhere")
    assert "cannot be read" in refusal(tmp_path)
    legacy = tmp_path / "old.dat"
    legacy.write_bytes(struct.pack("<ii1sii2f", 1, 1, b"w", 1, 2, 1.0, 2.0))
    assert "convert the old .dat form" in refusal(legacy)
    (tmp_path / "empty").write_bytes(b"")
    assert "not a GGUF" in refusal(tmp_path / "empty")
    model = write_raw(tmp_path / "model.gguf", {"w": f32(1, 2)})
    assert "holds no importance matrix" in refusal(model)


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "whole.gguf", matrix())
    content = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(4, len(content) - 32, 37):  # the last 32 bytes may be padding
        cut.write_bytes(content[:size])
        assert "damaged" in refusal(cut) or "counts" in refusal(cut)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_values_that_are_no_mean_squares(tmp_path: Path, bad: float) -> None:
    tensors = {"w.in_sum2": f32(1, bad), "w.counts": f32(2)}
    assert "mean squares" in refusal(write_raw(tmp_path / "i.gguf", tensors))
    with pytest.raises(CalibrationError, match="mean squares"):
        write_imatrix(tmp_path / "j.gguf", Imatrix(means={"w": f32(1, bad)}, counts={"w": 2}))


@pytest.mark.parametrize("count", [0.0, -1.0, np.nan])
def test_entries_that_saw_nothing(tmp_path: Path, count: float) -> None:
    tensors = {"w.in_sum2": f32(1, 2), "w.counts": f32(count)}
    assert "w saw" in refusal(write_raw(tmp_path / "i.gguf", tensors))


def test_entries_that_are_zero_everywhere(tmp_path: Path) -> None:
    tensors = {"w.in_sum2": f32(0, 0), "w.counts": f32(5)}
    assert "w is zero everywhere" in refusal(write_raw(tmp_path / "i.gguf", tensors))


def test_experts_and_missing_counts(tmp_path: Path) -> None:
    tensors = {"w.in_sum2": np.ones((2, 4), np.float32), "w.counts": np.ones((2, 1), np.float32)}
    assert "w has 2 counts" in refusal(write_raw(tmp_path / "i.gguf", tensors))
    assert "w has 0 counts" in refusal(
        write_raw(tmp_path / "j.gguf", {"w.in_sum2": tensors["w.in_sum2"]})
    )
