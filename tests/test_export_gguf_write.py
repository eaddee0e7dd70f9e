"""The streaming writer and the quantiser: blocks change no byte, bad values are found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmo_edge.calibration.imatrix import Imatrix, write_imatrix
from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import ExportError
from medmo_edge.export import gguf_quantise, gguf_write
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.gguf_names import plan_tensors
from medmo_edge.export.gguf_quantise import Quantiser, row_bytes

gguf = pytest.importorskip("gguf")

INPUTS_256 = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"]
KINDS = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q5_1", "Q5_0", "IQ4_NL"]


def overwrite(checkpoint: Path, tensor: str, position: int, bf16: int) -> None:
    """Set one value of a one-shard bf16 checkpoint."""
    info = open_checkpoint(checkpoint).tensors[tensor]
    with info.path.open("r+b") as file:
        file.seek(info.offset + 2 * position)
        file.write(bf16.to_bytes(2, "little"))


def test_formats_are_ggmls() -> None:
    for kind, (number, block, size) in gguf_quantise._FORMATS.items():
        assert gguf.GGMLQuantizationType[kind] == number
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block, size)
    assert row_bytes("Q4_K", 512) == 288
    with pytest.raises(ValueError, match="do not fit Q4_K"):
        row_bytes("Q4_K", 300)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_rows_do_not_depend_on_blocks_or_threads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    rows = np.random.default_rng(0).standard_normal((13, 512)).astype(np.float32)
    results = []
    for threads in (1, 3, 16):
        monkeypatch.setattr(gguf_quantise, "_usable_cores", lambda count=threads: count)
        with Quantiser() as quantiser:
            whole = quantiser.quantise("w", kind, rows)
            parts = [quantiser.quantise("w", kind, rows[a : a + 5].copy()) for a in (0, 5, 10)]
        assert np.array_equal(whole, np.concatenate(parts))
        results.append(whole)
    assert all(np.array_equal(results[0], each) for each in results)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1"])
def test_quantised_rows_against_numpy(kind: str) -> None:
    """Independent reference where the gguf package has a numpy implementation."""
    pytest.importorskip("llama_cpp")
    rows = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    with Quantiser() as quantiser:
        ours = quantiser.quantise("w", kind, rows)
    expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(ours, expected.reshape(ours.shape))


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "IQ4_XS"])
def test_importance_lowers_the_error_where_it_counts(kind: str) -> None:
    pytest.importorskip("llama_cpp")
    random = np.random.default_rng(2)
    rows = random.standard_normal((64, 512)).astype(np.float32)
    importance = random.lognormal(0, 2, 512).astype(np.float32)

    def error(matrix: dict[str, NDArray[np.float32]]) -> float:
        with Quantiser(matrix) as quantiser:
            packed = quantiser.quantise("w", kind, rows)
        back = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
        return float((importance * (back.reshape(rows.shape) - rows) ** 2).mean())

    assert error({"w": importance}) < 0.95 * error({})
    assert error({"another": importance}) == error({})


@pytest.mark.parametrize("target", ["gguf-q6_k", "gguf-q4_k_m", "gguf-iq4_xs"])
def test_channels_that_calibration_never_met_keep_their_weights(
    tiny_checkpoint: Path, tmp_path: Path, target: str
) -> None:
    """llama.cpp alone would write zeros for them, which the second half shows."""
    pytest.importorskip("llama_cpp")
    importance = np.ones(256, np.float32)
    importance[:64] = 0
    names = [f"blk.{layer}.{name}.weight" for layer in range(4) for name in INPUTS_256]
    means = dict.fromkeys(names, importance)
    means |= {f"blk.{layer}.ffn_down.weight": np.ones(512, np.float32) for layer in range(4)}
    write_imatrix(tmp_path / "i.gguf", Imatrix(means=means, counts=dict.fromkeys(means, 1.0)))
    manifest = export_checkpoint(
        tiny_checkpoint, target, tmp_path / "a", imatrix=tmp_path / "i.gguf"
    )
    tensors = {each.name: each for each in gguf.GGUFReader(manifest.path_of("language")).tensors}
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weights = open_checkpoint(tiny_checkpoint).read(name)
    stored = tensors["blk.0.ffn_up.weight"]
    kept = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.abs(kept - weights)[:, :64].mean() < 0.1 * np.abs(weights).mean()
    if target == "gguf-q6_k":
        with Quantiser({"w": importance}) as quantiser:
            lost = quantiser.quantise("w", "Q6_K", weights)
        assert not gguf.quants.dequantize(lost, stored.tensor_type)[:, :64].any()


def test_small_blocks_write_the_same_files(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    for target in ("gguf-f16", "gguf-q4_k_m"):
        whole = export_checkpoint(
            tiny_checkpoint, target, tmp_path / f"{target}-whole", golden=False
        )
        with monkeypatch.context() as patch:
            patch.setattr(gguf_write, "_BLOCK_BYTES", 5000)  # four rows of 256 and some
            blocks = export_checkpoint(
                tiny_checkpoint, target, tmp_path / f"{target}-blocks", golden=False
            )
        assert blocks.files == whole.files


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_rounds_as_the_gguf_package_does(values: list[float]) -> None:
    block = np.array([values], np.float32)
    expected = gguf.quants.quantize(block, gguf.GGMLQuantizationType.BF16)
    largest = np.abs(block) > 3.38e38  # these round to infinity in both
    ours = gguf_write._to_bfloat16(block)
    assert np.array_equal(ours.view(np.uint8).reshape(-1), expected.reshape(-1)) or largest.any()


@pytest.mark.parametrize(
    ("target", "tensor", "file", "name"),
    [
        (
            "gguf-f16",
            "model.language_model.layers.2.mlp.up_proj.weight",
            "model.gguf",
            "blk.2.ffn_up.weight",
        ),
        (
            "gguf-bf16",
            "model.visual.merger.linear_fc1.weight",
            "mmproj.gguf",
            "mm.0.weight",
        ),
        (
            "gguf-f16",
            "model.visual.patch_embed.proj.weight",
            "mmproj.gguf",
            "v.patch_embd.weight",
        ),
    ],
)
def test_values_beyond_float16_keep_their_tensor_in_f32(
    make_checkpoint: Any, tmp_path: Path, target: str, tensor: str, file: str, name: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "large")
    overwrite(checkpoint, tensor, 7, 0x4780)  # 65536.0, just above float16's 65504
    manifest = export_checkpoint(checkpoint, target, tmp_path / "a", golden=False)
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "a" / file).tensors}
    assert tensors[name].tensor_type.name == "F32"
    assert tensors[name].data.reshape(-1)[7] == 65536.0
    part = manifest.weights["language" if file == "model.gguf" else "vision"]
    assert part["fallbacks"] == {name: "F16 -> F32"}


@pytest.mark.parametrize("value", [0x7FC0, 0x7F80, 0xFF80])
@pytest.mark.parametrize("target", ["gguf-f16", "gguf-bf16", "gguf-q8_0"])
@pytest.mark.parametrize("part", ["language_model.layers.1.mlp.up_proj", "visual.merger.norm"])
def test_nan_and_infinity_are_named_and_leave_nothing(
    make_checkpoint: Any, tmp_path: Path, value: int, target: str, part: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "diverged")
    overwrite(checkpoint, f"model.{part}.weight", 3, value)
    with pytest.raises(ExportError, match="holds NaN or infinity") as caught:
        export_checkpoint(checkpoint, target, tmp_path / "a", golden=False)
    assert f"model.{part}.weight" in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["diverged"]


def test_a_missing_library_says_what_to_install(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp._ggml", None)
    with pytest.raises(ExportError, match=r"pip install 'medmo-edge\[llamacpp\]'"):
        export_checkpoint(tiny_checkpoint, "gguf-q8_0", tmp_path / "a", golden=False)
    assert export_checkpoint(tiny_checkpoint, "gguf-f16", tmp_path / "b").target == "gguf-f16"


def test_a_missing_gguf_package_says_what_to_install(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install 'medmo-edge\[export\]'"):
        export_checkpoint(tiny_checkpoint, "gguf-f16", tmp_path / "a", golden=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("target", ["gguf-f16", "gguf-bf16"])
def test_every_value_survives_as_far_as_its_type_holds_it(
    make_checkpoint: Any, tmp_path: Path, dtype: str, target: str
) -> None:
    """Independent reference: numpy's rounding of the checkpoint's own values."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", dtype=dtype))
    manifest = export_checkpoint(checkpoint.path, target, tmp_path / "a", golden=False)
    language, vision = plan_tensors(checkpoint)
    for role, planned in (("language", language), ("vision", vision)):
        stored = {t.name: t for t in gguf.GGUFReader(manifest.path_of(role)).tensors}
        assert len(stored) == len(planned)
        for each in planned:
            values = checkpoint.read(each.source)
            values = values if each.frame is None else values[:, :, each.frame]
            kind = stored[each.name].tensor_type.name
            if kind == "F16":
                values = values.astype(np.float16).astype(np.float32)
            elif kind == "BF16":
                as_bf16 = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
                values = gguf.quants.dequantize(as_bf16, gguf.GGMLQuantizationType.BF16)
            found = gguf.quants.dequantize(stored[each.name].data, stored[each.name].tensor_type)
            assert found.shape == each.shape and np.array_equal(found, values), each.name
