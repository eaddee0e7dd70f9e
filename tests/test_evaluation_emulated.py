"""Artifacts for TensorRT asked without a GPU: who answers, what is said about it, what is left."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from medmo_edge.boxes import iou
from medmo_edge.errors import ArtifactError, BackendUnavailable, UsageError
from medmo_edge.evaluation.emulated import emulate, open_session
from medmo_edge.evaluation.emulated_graph import dequantised, emulate_graph
from medmo_edge.evaluation.models import open_model
from medmo_edge.export.export import export_checkpoint
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest, read_manifest, write_manifest
from medmo_edge.phantoms import draw
from medmo_edge.runtime.certified import coverage, device_class, run_key, subject_sha256
from medmo_edge.runtime.device import Cuda, probe

pytest.importorskip("onnxruntime", reason="emulating needs the cpu extra")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MedMO-nano for TensorRT, with a cache of 512 tokens."""
    folder = tmp_path_factory.mktemp("trt") / "nano"
    export_checkpoint("nano", "trt-bf16", folder, cache_length=512, golden=False)
    return folder


@pytest.fixture(scope="module")
def frame() -> Frame:
    """Its answers lead by more than rounding to bfloat16 moves."""
    return Frame.from_pixels(draw(9, size=(512, 576), nodule=True).pixels, path="drawn")


def test_an_evaluation_says_that_it_was_emulated_and_why(
    artifact: Path, frame: Frame, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "medmo_edge"), open_model(artifact) as model:
        found = model.identity()
        said = model.answer([frame], "What kind of image is this?")
    assert said.text == "Chest radiograph." and said.prompt_tokens > 50
    assert found["target"] == "trt-bf16" and found["backend"] == "ort"
    assert found["device"].startswith("emulated in bfloat16 on cpu (")
    assert f"{artifact} is emulated on the CPU: " in caplog.messages[0]


def test_asked_for_by_name_it_needs_no_reason(
    artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_session(artifact, "emulated") as session:
        assert session.backend.device.startswith("emulated") and session.backend.max_cells == 512
    assert caplog.messages == []


def test_boxes_are_those_of_the_checkpoint(artifact: Path, frame: Frame) -> None:
    """Two answers that rounding to bfloat16 after every operator leaves as they are."""
    pytest.importorskip("transformers", reason="the reference needs the train extra")
    with open_model("nano") as model:
        expected = [model.answer([frame], question) for question in QUESTIONS]
    with emulate(artifact) as session:
        found = [session.ask(frame, question) for question in QUESTIONS]
    assert [each.text for each in found] == [each.text for each in expected]
    assert found[0].boxes == expected[0].boxes != ()


def test_answers_about_any_picture_are_close_to_the_checkpoints(artifact: Path) -> None:
    """The same words, and boxes that rounding to bfloat16 after every operator moves a little."""
    pytest.importorskip("transformers", reason="the reference needs the train extra")
    frames = [
        Frame.from_pixels(draw(seed, size=(512, 576), nodule=True).pixels, path="drawn")
        for seed in range(1, 7)
    ]
    with open_model("nano") as model:
        expected = [[model.answer([one], question) for question in QUESTIONS] for one in frames]
    with emulate(artifact) as session:
        found = [[session.ask(one, question) for question in QUESTIONS] for one in frames]
    assert [each[1].text for each in found] == [each[1].text for each in expected]
    overlaps = [
        iou(mine[0].boxes[0].xyxy, theirs[0].boxes[0].xyxy)
        for mine, theirs in zip(found, expected, strict=True)
    ]
    assert max(overlaps) == 1 and np.mean(overlaps) > 0.85 and min(overlaps) > 0.5


QUESTIONS = ("Locate the nodule.", "Is there a pleural effusion?")


def test_two_questions_of_a_study_share_the_cache(artifact: Path, frame: Frame) -> None:
    with emulate(artifact) as session, session.study(frame) as study:
        first, second, again = (study.ask(each) for each in (*QUESTIONS, QUESTIONS[0]))
    assert again.text == first.text != second.text
    assert second.timings.reused_tokens > 50


def test_what_is_written_for_it_is_gone_when_it_is_closed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(path.name for path in artifact.iterdir())
    with emulate(artifact):
        (folder,) = tmp_path.iterdir()
        assert {path.name for path in folder.iterdir()} >= {"decoder.onnx", "vision.onnx.data"}
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in artifact.iterdir()) == before


@pytest.mark.parametrize(("role", "words"), [("decoder", "no ONNX graph"), ("build", "the cache")])
def test_a_damaged_artifact_leaves_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, words: str
) -> None:
    folder, temporary = tmp_path / "a", tmp_path / "t"
    folder.mkdir()
    temporary.mkdir()
    for path in artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(folder)
    if role == "build":
        write_manifest(folder, replace(manifest, weights=manifest.weights | {"build": {}}))
    else:
        path = manifest.path_of(role)
        path.write_bytes(b"\xff" * path.stat().st_size)
        monkeypatch.setattr("medmo_edge.evaluation.emulated.read_manifest", lambda _: manifest)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(ArtifactError, match=words):
        emulate(folder)
    assert list(temporary.iterdir()) == []


def test_only_artifacts_for_tensorrt_are_emulated(tiny_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gguf-f16 needs no emulation: leave --backend out"):
        open_session(tiny_artifact, "emulated")
    with pytest.raises(UsageError, match="no backend is called 'emulated'"):
        open_session("fake:hello", "emulated")
    with pytest.raises(ArtifactError, match="does not exist"):
        open_session(tmp_path / "nothing")


def test_a_missing_library_is_named(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailable, match=r"medmo-edge\[export,cpu\]"):
        emulate(artifact)


def test_too_little_memory_is_said_before_anything_is_written(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.7 million parameters in float32, twice, are 38 MB."""
    small = replace(probe(), ram_available_bytes=30_000_000)
    monkeypatch.setattr("medmo_edge.evaluation.emulated.probe", lambda: small)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BackendUnavailable, match="cannot be emulated: it needs about 0.0 GB"):
        emulate(artifact)
    assert list(tmp_path.iterdir()) == []


def test_its_certificate_counts_for_no_gpu(artifact: Path) -> None:
    """Whatever an emulated verification found, an engine has to be verified itself."""
    with emulate(artifact) as session:
        own = session.backend
        emulated = device_class(probe(), own.device)
    gpu = replace(probe(), cuda=(Cuda(name="GPU", sm=89, memory_bytes=1 << 34),))
    assert emulated.startswith("emulated ")
    manifest = certified(read_manifest(artifact), run_key(own.name, emulated))
    assert coverage(manifest, own.name, emulated).obstacle is None
    for name in ("trt", "ort"):
        found = coverage(manifest, name, device_class(gpu, "cuda (GPU)"))
        assert f"covers ort on {emulated}, not {name} on cuda sm89" in str(found.obstacle)


def certified(manifest: Manifest, key: str) -> Manifest:
    """With a passing certificate of these circumstances."""
    from medmo_edge.runtime.certified import SCHEMA, libraries_of

    run = {"verdict": "pass", "libraries": libraries_of("ort")}
    certificate = {
        "schema": SCHEMA,
        "subject_sha256": subject_sha256(manifest),
        "runs": {key: run},
    }
    return replace(manifest, certificate=certificate)


def test_dequantising_is_the_operator_of_onnx() -> None:
    """By the reference implementation of the standard: per tensor, per axis, and in blocks."""
    from onnx.reference import ReferenceEvaluator

    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (32, 6)).astype(np.int8)
    for axis, block, shape in ((0, 8, (4, 6)), (1, 2, (32, 3)), (1, 0, (6,)), (1, 0, ())):
        scales = random.uniform(0.1, 1, shape).astype(np.float32)
        settings: dict[str, Any] = {"block_size": block} if block else {}
        node = onnx.helper.make_node("DequantizeLinear", ["x", "s"], ["y"], axis=axis, **settings)
        (wanted,) = ReferenceEvaluator(node).run(None, {"x": codes, "s": scales})
        np.testing.assert_array_equal(dequantised(codes, scales, axis, block), wanted)


def test_a_rewritten_graph_is_a_valid_graph(artifact: Path, tmp_path: Path) -> None:
    for name in ("vision", "decoder"):
        target = tmp_path / f"{name}.onnx"
        emulate_graph(artifact / f"{name}.onnx", target)
        onnx.checker.check_model(str(target), full_check=True)
