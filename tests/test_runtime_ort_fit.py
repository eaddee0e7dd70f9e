"""What an ONNX artifact needs of a machine, and the number formats of its graphs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medmo_edge.manifest import read_manifest
from medmo_edge.runtime import ort as ort_module
from medmo_edge.runtime import ort_fit, ort_values
from medmo_edge.runtime.device import probe

pytest.importorskip("onnxruntime", reason="needs the cpu extra")

Tiny = Callable[..., Path]


def test_bfloat16_rounds_as_ml_dtypes_does() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    random = np.random.default_rng(0)
    values = random.standard_normal(4096).astype(np.float32) * 10.0 ** random.integers(-9, 9, 4096)
    values = values.astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 3.3895314e38]
    encoded = ort_values.NUMBERS["bfloat16"].encode(values)
    assert np.array_equal(encoded, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    decoded = ort_values.decode_rows(encoded, "bfloat16")
    assert np.array_equal(decoded, encoded.view(ml_dtypes.bfloat16).astype(np.float32))


def test_memory_and_threads_by_size(tiny_artifacts: Tiny) -> None:
    manifest = read_manifest(tiny_artifacts("onnx-fp32"))
    shape = {"num_layers": 36, "num_kv_heads": 8, "head_dim": 128}
    files = {
        name: {**record, "bytes": (4 << 30) if record["role"] == "decoder_data" else 0}
        for name, record in manifest.files.items()
    }
    large = replace(manifest, files=files, model=manifest.model | shape)  # type: ignore[arg-type]
    assert ort_fit.cell_bytes(large) == 2 * 147_456  # float32
    assert ort_fit.default_threads(large, replace(probe(), cores=8)) == 8
    assert ort_fit.default_threads(manifest, replace(probe(), cores=8)) == 1
    roomy = replace(probe(), ram_available_bytes=64 << 30)
    tight = replace(probe(), ram_available_bytes=3 << 30)
    assert ort_fit.max_cells(large, roomy, "cpu", None) == 32768
    assert ort_fit.max_cells(large, tight, "cpu", None) == 1024
    assert ort_fit.max_cells(large, tight, "cpu", 99) == 99
    assert ort_module.unsuited(large, roomy) is None
    assert "are free: close programs" in str(ort_module.unsuited(large, tight))
