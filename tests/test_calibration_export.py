"""From one record to each format: what the exporters make of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("torch", reason="calibrating needs the train extra")
pytest.importorskip("safetensors", reason="calibrating needs the train extra")
gguf = pytest.importorskip("gguf", reason="exporting needs the export extra")

from medmo_edge.calibration.imatrix import Imatrix, write_imatrix  # noqa: E402
from medmo_edge.calibration.observe import calibrate  # noqa: E402
from medmo_edge.calibration.record import Record, read_record  # noqa: E402
from medmo_edge.checkpoint import open_checkpoint  # noqa: E402
from medmo_edge.errors import ArtifactError, CalibrationError, UsageError  # noqa: E402
from medmo_edge.export.export import export_checkpoint  # noqa: E402
from medmo_edge.export.gguf_importance import importance_of  # noqa: E402
from medmo_edge.export.onnx_calibrated import can_fold, round_trip  # noqa: E402
from medmo_edge.export.onnx_linear import Encoding  # noqa: E402
from medmo_edge.phantoms import draw  # noqa: E402

NBITS = Encoding(kind="nbits", bits=4, block=32)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """MedMO-nano, observed over two drawn radiographs."""
    folder = tmp_path_factory.mktemp("record")
    lines = []
    for seed in range(2):
        Image.fromarray(draw(seed, size=(192, 256)).pixels).save(folder / f"{seed}.png")
        content = [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "Yes."},
        ]
        lines.append(
            {"id": str(seed), "task": "vqa", "images": [f"{seed}.png"], "messages": messages}
        )
    samples = folder / "samples.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return calibrate("nano", samples, folder / "record")


def tensors(artifact: Path) -> dict[str, bytes]:
    reader = gguf.GGUFReader(artifact / "model.gguf")
    return {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}


def test_gguf_gets_the_importance_matrix_that_a_file_would_give(
    record: Record, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="quantising needs the llamacpp extra")
    query = record.linears["model.language_model.layers.2.self_attn.q_proj"]
    matrix = importance_of(record, open_checkpoint("nano"))
    np.testing.assert_array_equal(
        matrix.means["blk.2.attn_q.weight"], query.sum_sq / np.float32(query.count)
    )
    np.testing.assert_array_equal(
        matrix.means["token_embd.weight"], record.linears["lm_head"].mean_sq
    )
    write_imatrix(tmp_path / "matrix.gguf", Imatrix(means=matrix.means, counts=matrix.counts))
    target = "gguf-iq4_xs"
    options: dict[str, Any] = {"golden": False}
    made = export_checkpoint("nano", target, tmp_path / "a", calibration=record.path, **options)
    imatrix = tmp_path / "matrix.gguf"
    export_checkpoint("nano", target, tmp_path / "b", imatrix=imatrix, **options)
    export_checkpoint("nano", target, tmp_path / "plain", **options)
    calibrated, from_file, plain = (tensors(tmp_path / name) for name in ("a", "b", "plain"))
    assert calibrated.keys() == from_file.keys() == plain.keys()
    different = [name for name, data in calibrated.items() if data != plain[name]]
    assert {"blk.0.attn_q.weight", "blk.3.ffn_down.weight"} <= set(different)
    # The file holds sums, which divide back to the same means but for rounding.
    same = sum(calibrated[name] == from_file[name] for name in calibrated)
    assert same >= len(calibrated) - 2
    assert made.calibration is not None
    assert made.calibration["sha256"] == record.sha256
    assert made.calibration["checkpoint"] == open_checkpoint("nano").identity()


def test_onnx_int4_is_folded_by_the_record(record: Record, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="exporting needs the export extra")
    from onnx import numpy_helper

    norm = "model.language_model.layers.0.post_attention_layernorm.weight"
    norms = {}
    for name, calibration in (("plain", None), ("folded", record.path)):
        folder = tmp_path / name
        export_checkpoint("nano", "onnx-int4", folder, calibration=calibration, golden=False)
        graph = onnx.load(str(folder / "decoder.onnx")).graph
        (found,) = (each for each in graph.initializer if each.name == norm)
        norms[name] = numpy_helper.to_array(found, base_dir=str(folder))
    np.testing.assert_array_equal(norms["plain"], open_checkpoint("nano").read(norm))
    scale = norms["plain"] / norms["folded"]
    assert scale.max() > 1 > scale.min() > 0
    manifest = json.loads((tmp_path / "folded" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["calibration"]["sha256"] == record.sha256


def test_folded_weights_are_compared_with_what_was_folded(record: Record, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="exporting needs the export extra")
    from medmo_edge.export.read_back import compare_weights

    options: dict[str, Any] = {"calibration": record.path, "golden": False}
    made = export_checkpoint("nano", "onnx-int4", tmp_path / "a", **options)
    checkpoint = open_checkpoint("nano")

    def gaps() -> dict[str, Any]:
        found = compare_weights(made, checkpoint, lambda stage, done, total: None)
        assert found is not None
        return {gap.name: gap for gap in found}

    healthy = gaps()
    assert max(abs(gap.scale - 1) for gap in healthy.values()) < 0.02
    assert max(gap.error for gap in healthy.values()) < 0.15
    # Scales that do not belong to the weights: the maker and its reader are named.
    path = made.path_of("folding")
    with np.load(path) as held:
        scales = {name: held[name] for name in held.files}
    maker = next(name for name in scales if name.endswith("layers.1.mlp.up_proj.weight"))
    np.savez(path, **scales | {maker: scales[maker] * 2})
    wrong = gaps()
    reader = maker.replace("up_proj", "down_proj")
    assert wrong[maker].scale > 1.9 and wrong[reader].scale < 0.6
    assert wrong.keys() == healthy.keys() and {
        name for name, gap in wrong.items() if gap != healthy[name]
    } == {maker, reader}
    path.write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match="awq_scales.npz cannot be read"):
        gaps()


def test_a_folded_model_still_says_the_same(record: Record, tmp_path: Path) -> None:
    """A mistake in folding would show at once: nano's answer stays, whatever the rounding."""
    pytest.importorskip("onnxruntime", reason="running needs onnxruntime")
    pytest.importorskip("onnx", reason="exporting needs the export extra")
    from medmo_edge import load, read_image

    export_checkpoint("nano", "onnx-int4", tmp_path / "a", calibration=record.path, golden=False)
    picture = read_image(record.path.parent / "0.png")
    with load(tmp_path / "a") as session:
        assert session.ask(picture, "What kind of image is this?").text == "Chest radiograph."


@pytest.mark.parametrize("kind", ["nbits", "int4", "nvfp4"])
def test_what_the_search_rounds_is_what_the_graph_stores(kind: Any) -> None:
    """Candidates by hand: the search may take any, but none that is worse than all of them."""
    encoding = Encoding(kind=kind, bits=4, block=16)
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    found = round_trip(rows, encoding, np.dtype(np.float32))
    for row, stored in zip(rows.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        tries = rounded_by_hand(kind, row, rows)
        best = min(tries, key=lambda each: float(np.sum((each - row) ** 2)))
        np.testing.assert_allclose(stored, best, rtol=1e-6, atol=1e-7)


def rounded_by_hand(kind: str, row: NDArray[Any], rows: NDArray[Any]) -> list[NDArray[Any]]:
    """Every way in which an encoding may store a block."""
    largest = np.abs(row).max()
    if kind == "nbits":
        step = row[np.abs(row).argmax()] / -8
        return [np.clip(np.round(row / step), -8, 7) * step]
    if kind == "int4":
        steps = [largest * part / 7 for part in (1, 0.9, 0.8)]
        return [np.clip(np.round(row / step), -8, 7) * step for step in steps]
    grid = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    unit = 2.0 ** np.ceil(np.log2(np.abs(rows).max() / (6 * 448)))
    tries = []
    for top in (6, 4):
        # Three bits of mantissa: eighths of the power of two below.
        power = 2.0 ** np.floor(np.log2(largest / top / unit))
        step = np.round(largest / top / unit / power * 8) / 8 * power * unit
        tries.append(grid[np.abs(grid - (row / step)[:, None]).argmin(axis=1)] * step)
    return tries


def test_only_four_bits_are_folded() -> None:
    assert can_fold(NBITS) and can_fold(Encoding(kind="int4", block=128))
    assert can_fold(Encoding(kind="nvfp4", block=16)) and not can_fold(Encoding(kind="fp8"))
    assert not can_fold(Encoding(kind="nbits", bits=8, block=32))
    odd: NDArray[np.float32] = np.ones((2, 33), np.float32)
    assert round_trip(odd, NBITS, np.dtype(np.float32)) is odd


def test_calibration_that_cannot_be_used_is_refused(
    record: Record, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="gguf-q8_0 is not changed by calibration"):
        export_checkpoint("nano", "gguf-q8_0", tmp_path / "a", calibration=record.path)
    with pytest.raises(UsageError, match="give one of them"):
        export_checkpoint(
            "nano", "gguf-q4_k_m", tmp_path / "a", calibration=record.path, imatrix=tmp_path
        )
    for target in ("gguf-q4_k_m", "onnx-int4"):
        with pytest.raises(CalibrationError, match="made from another checkpoint"):
            export_checkpoint(tiny_checkpoint, target, tmp_path / "a", calibration=record.path)
    with pytest.raises(CalibrationError, match="no calibration record"):
        export_checkpoint("nano", "onnx-int4", tmp_path / "a", calibration=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert read_record(record.path).linears.keys() == record.linears.keys()
