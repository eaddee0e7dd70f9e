"""Artifacts for TensorRT: what is written, by which recipe it is built, and what is refused."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from medmo_edge.calibration.record import Record, read_record, write_record
from medmo_edge.calibration.statistics import LinearStats
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import CalibrationError, ExportError, MedmoError, UsageError
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.read_back import compare_weights
from medmo_edge.manifest import Manifest, read_manifest
from medmo_edge.runtime.golden import read_golden

pytestmark = pytest.mark.usefixtures("short_search")
LAYERS = 4  # of the tiny checkpoints, language and vision
TARGETS = ("bf16", "fp16", "fp8", "int4-awq", "nvfp4")
NARROW = {"fp8": "FLOAT8E4M3FN", "int4-awq": "INT4", "nvfp4": "FLOAT4E2M1"}
MATRICES = 7 * LAYERS


def make_record(checkpoint: Checkpoint, folder: Path, amax: Mapping[str, float]) -> Record:
    """A record without an observation: inputs of size 1 to 4, ``amax`` by parts of names."""
    random = np.random.default_rng(0)
    linears = {}
    for name, info in checkpoint.tensors.items():
        if not name.startswith("model.language_model.layers") or len(info.shape) != 2:
            continue
        mean_abs = random.uniform(0.1, 1, info.shape[1]).astype(np.float32)
        largest = next((value for part, value in amax.items() if part in name), 4.0)
        linears[name.removesuffix(".weight")] = LinearStats(
            amax=largest,
            p999=1.0,
            p9999=2.0,
            sum_sq=mean_abs * mean_abs * 100,
            mean_abs=mean_abs,
            weight_amax=1.0,
            count_text=100,
            count_image=0,
        )
    folder.mkdir(parents=True)
    record = Record(
        path=folder,
        checkpoint=checkpoint.identity(),
        samples={"file": "samples.jsonl", "sha256": "0", "count": 1},
        preprocessing=checkpoint.preprocessing.sha256,
        coords=checkpoint.coords,
        seed=0,
        run={},
        linears=linears,
    )
    write_record(record)
    return record


@pytest.fixture(scope="module")
def record(tiny_untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    pytest.importorskip("safetensors", reason="writing a record needs the train extra")
    folder = tmp_path_factory.mktemp("trt") / "record"
    return make_record(open_checkpoint(tiny_untied_checkpoint), folder, {})


@pytest.fixture(scope="module")
def artifacts(
    tiny_untied_checkpoint: Path, record: Record, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Manifest]:
    """Every target of TensorRT."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        name: export_checkpoint(
            tiny_untied_checkpoint,
            f"trt-{name}",
            folder / name,
            calibration=record.path if name in NARROW else None,
            golden=name == "fp8",
        )
        for name in TARGETS
    }


@pytest.mark.parametrize("name", TARGETS)
def test_what_an_artifact_holds(name: str, artifacts: dict[str, Manifest]) -> None:
    manifest = read_manifest(artifacts[name].folder)
    assert (manifest.backend, manifest.target) == ("trt", f"trt-{name}")
    roles = {each["role"] for each in manifest.files.values()}
    graphs = {"vision", "vision_data", "decoder", "decoder_data", "embeddings"}
    folded = {"folding"} if name in ("int4-awq", "nvfp4") else set()
    golden = {"golden"} if name == "fp8" else set()
    assert roles == graphs | folded | golden | {"tokenizer", "chat_template"}
    weights = manifest.weights
    half = "float16" if name in ("fp16", "int4-awq") else "bfloat16"
    assert (weights["form"], weights["opset"], weights["graph_dtype"]) == ("scatter", 24, half)
    label = {"int4-awq": "int4"}.get(name, name)
    narrow = {label: MATRICES} if name in NARROW else {}
    plain = sum(weights["language"]["types"].values()) - sum(narrow.values())
    assert weights["language"]["types"] == narrow | {half: plain}
    assert set(weights["vision"]["types"]) == {half} and weights["language"]["fallbacks"] == {}
    for role in ("vision", "decoder"):
        onnx.checker.check_model(str(manifest.path_of(role)), full_check=True)


@pytest.mark.parametrize("name", TARGETS)
def test_operators_and_number_types(name: str, artifacts: dict[str, Manifest]) -> None:
    graph = onnx.load(artifacts[name].path_of("decoder"), load_external_data=False).graph
    census = Counter(node.op_type for node in graph.node)
    assert {node.domain for node in graph.node} == {""}
    assert census["TensorScatter"] == 2 * LAYERS and census["Attention"] == LAYERS
    assert census["RotaryEmbedding"] == 2 * LAYERS and census["MatMul"] == MATRICES + 1
    # q k v share one rounding of their input, gate and up another.
    rounded = 4 * LAYERS if name == "fp8" else 0
    assert census["QuantizeLinear"] == rounded
    widened = {"fp8": MATRICES, "int4-awq": MATRICES, "nvfp4": 2 * MATRICES}.get(name, 0)
    assert census["DequantizeLinear"] == rounded + widened
    kinds = Counter(onnx.TensorProto.DataType.Name(each.data_type) for each in graph.initializer)
    if name in NARROW:
        assert kinds[NARROW[name]] == {"fp8": MATRICES + 1}.get(name, MATRICES)  # + the zero point
    head = next(each for each in graph.initializer if each.name == "lm_head.weight")
    assert head.data_type in (10, 16)
    cells = {each.type.tensor_type.shape.dim[2].dim_value for each in graph.input[-2 * LAYERS :]}
    assert cells == {4096}


def test_the_recipe_for_engines(artifacts: dict[str, Manifest]) -> None:
    """MedMO-nano's limits are 384 to 768 patches, the tiny checkpoint's 16 to 1024."""
    builds = {name: manifest.weights["build"] for name, manifest in artifacts.items()}
    assert builds["bf16"] == {
        "capacity": 4096,
        "chunk": 1024,
        "opt": 512,
        "max_batch": 1,
        "vision_patches": [16, 1024, 1024],
        "min_tensorrt": "10.15",
        "min_sm": 80,
        "refused_sm": {"75": "trt-fp16"},
    }
    assert {name: build["min_sm"] for name, build in builds.items()} == {
        "bf16": 80,
        "fp16": 75,
        "fp8": 89,
        "int4-awq": 75,
        "nvfp4": 100,
    }
    assert builds["fp8"]["refused_sm"] == {"75": "trt-int4-awq"}
    assert builds["nvfp4"]["refused_sm"] == {"75": "trt-int4-awq", "89": "trt-fp8"}
    assert "refused_sm" not in builds["fp16"] and "refused_sm" not in builds["int4-awq"]


@pytest.mark.parametrize(
    ("limits", "cells", "patches", "chunk"),
    [
        ((65536, 16777216), 4096, [256, 4096, 16384], 1024),  # Qwen3-VL's own limits
        ((65536, 16777216), 300, [256, 1200, 1200], 300),  # no picture larger than the cache
        ((65536, 1048576), None, [256, 4096, 4096], 1024),
    ],
)
def test_profiles_follow_preprocessing_and_cache(
    make_checkpoint: Any,
    tmp_path: Path,
    limits: tuple[int, int],
    cells: int | None,
    patches: list[int],
    chunk: int,
) -> None:
    folder = make_checkpoint(tmp_path / "c", min_pixels=limits[0], max_pixels=limits[1])
    manifest = export_checkpoint(
        folder, "trt-bf16", tmp_path / "a", cache_length=cells, golden=False
    )
    build = manifest.weights["build"]
    assert build["vision_patches"] == patches
    assert (build["chunk"], build["opt"]) == (chunk, min(512, chunk))
    graph = onnx.load(manifest.path_of("decoder"), load_external_data=False).graph
    assert graph.input[-1].type.tensor_type.shape.dim[2].dim_value == (cells or 4096)


def test_golden_cases_come_from_the_checkpoint_alone(
    artifacts: dict[str, Manifest], tiny_untied_checkpoint: Path
) -> None:
    golden = read_golden(artifacts["fp8"])
    assert golden.source["exported"] == {"obstacle": "its engines are built where they run"}
    assert all(case.exported is None and case.answer is None for case in golden.cases)
    located, *others = golden.cases
    tokenizer = open_checkpoint(tiny_untied_checkpoint).load_tokenizer()
    assert tokenizer.decode(located.tokens) == located.box_text  # decoding is tested along a box
    assert all(case.tokens == case.top_ids[:1] for case in others)
    assert all(len(case.truth.chosen) == len(case.tokens) for case in golden.cases)


def test_values_beyond_float16_change_the_target_or_are_refused(
    tiny_untied_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(tiny_untied_checkpoint)

    def export(target: str, amax: float) -> Manifest:
        folder = tmp_path / f"{target}-{amax}"
        record = make_record(checkpoint, folder / "record", {"2.mlp.down_proj": amax})
        return export_checkpoint(
            tiny_untied_checkpoint, target, folder / "a", calibration=record.path, golden=False
        )

    wide = export("trt-int4-awq", 3.1e4).weights
    assert wide["graph_dtype"] == "bfloat16" and wide["build"]["min_sm"] == 80
    assert wide["build"]["refused_sm"] == {"75": "gguf-q4_k_m"}
    assert "layers.2.mlp.down_proj" in wide["notes"][0] and wide["notes"][0] in caplog.messages
    assert export("trt-int4-awq", 2.9e4).weights["graph_dtype"] == "float16"
    caplog.clear()
    narrow = export("trt-fp16", 3.1e4).weights
    assert narrow["graph_dtype"] == "float16" and "may overflow" in caplog.messages[0]
    with pytest.raises(ExportError, match="layers.2.mlp.down_proj.*export trt-bf16 instead"):
        export("trt-fp16", 7e4)
    assert export("trt-fp8", 7e4).weights["notes"] == []


def test_a_record_that_lacks_a_matrix_is_refused(
    tiny_untied_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    whole = make_record(checkpoint, tmp_path / "whole", {})
    missing = "model.language_model.layers.1.mlp.up_proj"
    linears = {name: stats for name, stats in whole.linears.items() if name != missing}
    (tmp_path / "part").mkdir()
    write_record(replace(whole, path=tmp_path / "part", linears=linears))
    with pytest.raises(CalibrationError, match="up_proj.weight: calibrate again"):
        export_checkpoint(
            tiny_untied_checkpoint, "trt-fp8", tmp_path / "a", calibration=tmp_path / "part"
        )
    assert not (tmp_path / "a").exists() and len(read_record(tmp_path / "part").linears) == 27


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        ("trt-fp8", {}, UsageError, "takes its scales from a calibration record"),
        ("trt-int4-awq", {}, UsageError, "medmo-edge calibrate CHECKPOINT"),
        ("trt-bf16", {"calibration": True}, UsageError, "not changed by calibration"),
        ("trt-fp8", {"imatrix": Path("i.gguf")}, UsageError, "not changed by an importance"),
        ("trt-bf16", {"cache_length": 100}, UsageError, "100 is not within 256 and the 4096 po"),
        ("trt-bf16", {"cache_length": 9999}, UsageError, "9999 is not within"),
        ("gguf-f16", {"cache_length": 4096}, UsageError, "gguf-f16 has no fixed cache"),
        ("trt-int4", {}, UsageError, "did you mean trt-int4-awq"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    record: Record,
    tmp_path: Path,
    target: str,
    options: dict[str, Any],
    error: type[MedmoError],
    words: str,
) -> None:
    if options.get("calibration"):
        options = options | {"calibration": record.path}
    with pytest.raises(error, match=words) as caught:
        export_checkpoint("nano", target, tmp_path / "a", **options)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_record_of_another_checkpoint_is_refused(record: Record, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="made from another checkpoint"):
        export_checkpoint("nano", "trt-fp8", tmp_path / "a", calibration=record.path)


def test_no_torch_no_tensorrt_no_runtime(tmp_path: Path) -> None:
    """From the command line, with every heavy library out of reach, golden cases included."""
    blocked = ("torch", "transformers", "tensorrt", "tensorrt_rtx", "onnxruntime", "cuda")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "from medmo_edge.cli import main\n"
        "main()\n"
    )
    command = ["export", "nano", "--target", "trt-bf16", "--cache-length", "1024", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "-o", str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"]["build"]["vision_patches"] == [384, 768, 768]
    assert len(read_golden(read_manifest(tmp_path / "a")).cases) == 3


@pytest.mark.parametrize("name", TARGETS)
def test_verify_reads_back_what_was_stored(
    name: str, artifacts: dict[str, Manifest], tiny_untied_checkpoint: Path
) -> None:
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    gaps = compare_weights(artifacts[name], checkpoint, lambda *_: None)
    assert gaps is not None and len(gaps) == len(checkpoint.tensors)
    found = {gap.name: gap for gap in gaps}
    narrow = [gap for gap in gaps if gap.stored_as in ("fp8", "nvfp4", "4 bits, blocks of 128")]
    assert len(narrow) == (MATRICES if name in NARROW else 0)
    # Rounding of normally distributed weights: 3 bits of mantissa, and 4 bits in blocks.
    low, high = {"fp8": (0.02, 0.03), "int4-awq": (0.09, 0.13), "nvfp4": (0.07, 0.1)}.get(
        name, (0.0, 0.0)
    )
    assert all(low < gap.error < high and abs(gap.scale - 1) < 0.02 for gap in narrow)
    assert found["lm_head.weight"].error < 1e-3


@pytest.mark.parametrize("name", list(NARROW))
def test_a_changed_scale_shows_in_what_is_read_back(
    name: str, artifacts: dict[str, Manifest], tiny_untied_checkpoint: Path, tmp_path: Path
) -> None:
    """One byte among the scales: of the last row's channel, or of one block."""
    folder = tmp_path / "a"
    folder.mkdir()
    for path in artifacts[name].folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    matrix = "model.language_model.layers.2.self_attn.o_proj.weight"
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    scales = next(each for each in graph.initializer if each.name == f"{matrix}.scales")
    where = {
        entry.key: int(entry.value) for entry in scales.external_data if entry.key != "location"
    }
    data = bytearray((folder / "decoder.onnx.data").read_bytes())
    part = slice(where["offset"], where["offset"] + where["length"])
    values = np.frombuffer(bytes(data[part]), np.uint8).copy()
    values[values.size // 2 :] = 0
    data[part] = values.tobytes()
    (folder / "decoder.onnx.data").write_bytes(data)
    changed = artifacts[name].moved_to(folder)
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    gaps = compare_weights(changed, checkpoint, lambda *_: None)
    assert gaps is not None
    worst = max(gaps, key=lambda gap: gap.error)
    assert worst.name == matrix and worst.error > 0.5
