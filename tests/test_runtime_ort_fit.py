"""What an ONNX artifact needs of a machine, and the number formats of its graphs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medmo_edge.manifest import read_manifest
from medmo_edge.runtime import ort as ort_module
from medmo_edge.runtime import ort_fit, ort_native, ort_values
from medmo_edge.runtime.device import cpu_features, probe
from medmo_edge.runtime.session import load

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


@pytest.mark.parametrize(
    ("features", "exact"),
    [
        (("avx2", "fma", "avx512", "avx512_vnni"), True),
        (("avx2", "fma", "avx_vnni"), True),
        (("neon", "dotprod"), True),
        (("avx2", "fma"), False),
        (("avx2", "fma", "avx512"), False),
        ((), False),  # the system does not say
    ],
)
def test_the_slow_int8_kernels_are_for_processors_that_need_them(
    features: tuple[str, ...], exact: bool
) -> None:
    assert ort_native.sums_int8_exactly(features) is exact


def test_int8_means_the_same_with_slow_and_fast_kernels(
    tiny_artifacts: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integer sums are exact in both, so that only their use as floats can differ."""
    if not ort_native.sums_int8_exactly(cpu_features()):
        pytest.skip("this processor has the slow kernels alone")
    picture = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    found = []
    for exact in (True, False):
        monkeypatch.setattr(ort_native, "sums_int8_exactly", lambda features, exact=exact: exact)
        with load(tiny_artifacts("onnx-int8"), verify=False, threads=1) as session:
            features = session.backend.encode_image(picture)
            found.append((features, session.backend.decode_tokens([1, 2, 3])))
    for fast, slow in zip(*found, strict=True):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-5 * np.abs(slow).max())
