"""The choice of artifact and backend, pinned on eight machines that are described, not present."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from machines import MACHINES, SIZES, artifact, engines_of

from medmo_edge.errors import ArtifactError, BackendUnavailable
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest, read_manifest, write_manifest
from medmo_edge.runtime import certified, llamacpp, llamacpp_fit, ort, ort_fit, ort_native, trt
from medmo_edge.runtime import choice as choice_module
from medmo_edge.runtime import device as device_module
from medmo_edge.runtime.backends import BACKENDS
from medmo_edge.runtime.choice import ORDER, Row, find_artifacts, open_best, rank
from medmo_edge.runtime.device import Device, probe
from medmo_edge.runtime.doctor import doctor, format_findings
from medmo_edge.runtime.session import load
from medmo_edge.runtime.trt_engines import Search

CPU_ORDER = ["onnx-int4", "gguf-q4_k_m", "onnx-int8", "gguf-f16", "onnx-fp16"]
ON_GPU = ["onnx-fp16 cuda", *CPU_ORDER[:-1]]
# Where each machine would run what, best first, and why the rest not.
EXPECTED = {
    "H200": ["trt-bf16 cuda", "trt-fp8 cuda", "trt-int4-awq cuda", *ON_GPU],
    "RTX 4090": ["trt-bf16 cuda", "trt-fp8 cuda", "trt-int4-awq cuda", *ON_GPU],
    "RTX 2080": ["trt-int4-awq cuda", *CPU_ORDER],
    "Orin Nano JP6": CPU_ORDER[:2],
    "Orin JP7": ["trt-bf16 cuda", "trt-int4-awq cuda", *ON_GPU],
    "Thor": ["trt-bf16 cuda", "trt-fp8 cuda", "trt-int4-awq cuda", "trt-nvfp4 cuda", *ON_GPU],
    "AVX2 laptop": CPU_ORDER,
    "ARM server": CPU_ORDER,
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Device]:
    """``on(machine) -> device``: all libraries are installed, onnxruntime in its flavour.

    Engines of every trt artifact were built there.
    """

    def pretend(name: str) -> Device:
        machine = MACHINES[name]
        for module in (ort, llamacpp, trt):
            monkeypatch.setattr(module, "unavailable", lambda: None)
        monkeypatch.setattr(ort_native, "has_cuda", lambda: machine.gpu_library)
        monkeypatch.setattr(trt, "_search", lambda manifest, _: Search(engines_of(manifest)))
        return machine.device

    return pretend


@pytest.mark.parametrize("name", MACHINES)
def test_the_decisions_on_eight_machines(name: str, on: Callable[[str], Device]) -> None:
    ranked = rank([artifact(target) for target in sorted(SIZES)], on(name))
    able = [each for each in ranked if each.obstacle is None]
    assert [
        each.manifest.target + (" cuda" if each.place == "cuda" else "") for each in able
    ] == EXPECTED[name]
    assert ranked[: len(able)] == able
    assert all(each.reason and "\n" not in each.reason for each in ranked)


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("RTX 2080", "onnx-fp16", "not on the GPU: needs about 10.9 GB, the GPU has 8.6 GB"),
        ("RTX 2080", "onnx-int4", "needs 16-bit activations on CUDA: export onnx-fp16"),
        ("RTX 2080", "gguf-q4_k_m", "llama.cpp is used without GPUs"),
        ("Orin Nano JP6", "onnx-int4", "needs CUDA 13, JetPack 6.2 has 12.6"),
        ("Orin Nano JP6", "onnx-fp16", "needs about 10.3 GB of memory, 6.9 GB are free"),
        ("H200", "onnx-int4", "comes after trt-bf16"),
        ("H200", "trt-nvfp4", "nvfp4 needs SM 100, this H200 is SM 90: export --target trt-fp8"),
        ("RTX 2080", "trt-fp8", "fp8 needs SM 89, this RTX 2080 is SM 75: export --target trt-int"),
        ("RTX 2080", "trt-bf16", "bfloat16 needs SM 80, this RTX 2080 is SM 75: export --target t"),
        ("Orin JP7", "trt-fp8", "this Orin is SM 87: export --target trt-int4-awq"),
        ("Orin JP7", "trt-nvfp4", "this Orin is SM 87: export --target trt-int4-awq"),
        ("Orin Nano JP6", "trt-int4-awq", "JetPack 6.2 has a TensorRT that is too old"),
        ("Orin Nano JP6", "trt-int4-awq", "export a gguf target for llama.cpp"),
        ("Thor", "trt-nvfp4", "experimental"),
        ("AVX2 laptop", "trt-bf16", "no CUDA GPU: TensorRT needs one"),
    ],
)
def test_the_reasons(name: str, target: str, reason: str, on: Callable[[str], Device]) -> None:
    ranked = rank([artifact(each) for each in SIZES], on(name))
    (found,) = (each for each in ranked if each.manifest.target == target)
    assert reason in found.reason


def test_a_gpu_without_the_library_for_gpus(
    on: Callable[[str], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = on("H200")
    monkeypatch.setattr(ort_native, "has_cuda", lambda: False)
    (found,) = rank([artifact("onnx-fp16")], device)
    assert found.place == "cpu"
    assert "pip install 'medmo-edge[gpu]'" in found.reason


def test_old_gpus_and_old_drivers_are_not_used(on: Callable[[str], Device]) -> None:
    device = on("H200")
    for machine, reason in (
        (replace(device, cuda=(replace(device.cuda[0], sm=70),)), "SM 70 is older than CUDA 13"),
        (replace(device, cuda_version="12.8"), "needs CUDA 13, the NVIDIA driver has 12.8"),
    ):
        (found,) = rank([artifact("onnx-fp16")], machine)
        assert (found.place, reason in found.reason) == ("cpu", True)


def test_a_bfloat16_graph_needs_a_gpu(on: Callable[[str], Device]) -> None:
    manifest = replace(artifact("onnx-fp16"), weights={"graph_dtype": "bfloat16"})
    assert rank([manifest], on("H200"))[0].place == "cuda"
    assert "runs on CUDA only" in rank([manifest], on("AVX2 laptop"))[0].reason


def test_a_certified_artifact_goes_first(
    on: Callable[[str], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(manifest: Manifest, backend: str, where: str) -> certified.Coverage:
        passes = manifest.target == "onnx-int8" and where.startswith("cpu ")
        return certified.Coverage(None if passes else "no certificate")

    monkeypatch.setattr(choice_module, "coverage", judge)
    ranked = rank([artifact(target) for target in SIZES], on("AVX2 laptop"))
    assert ranked[0].manifest.target == "onnx-int8"
    assert "certified here" in ranked[0].reason
    assert "comes after onnx-int8" in ranked[1].reason


def test_int8_goes_first_where_it_is_fast(on: Callable[[str], Device]) -> None:
    """Prompts are most of the wait for a short answer; without VNNI int8 saves nothing of them."""
    laptop = on("AVX2 laptop")
    for feature, first in (("avx_vnni", "onnx-int8"), ("avx512_vnni", "onnx-int8"), ("", "")):
        device = replace(laptop, features=(*laptop.features, feature))
        ranked = rank([artifact(target) for target in SIZES], device)
        able = [each.manifest.target for each in ranked if each.obstacle is None]
        expected = sorted(CPU_ORDER, key=lambda target: target != first)
        assert able == expected
    small = replace(laptop, features=("avx_vnni",), ram_available_bytes=int(5.5e9))
    assert rank([artifact(target) for target in SIZES], small)[0].manifest.target == "onnx-int4"


def test_the_table_names_known_backends_and_no_row_twice() -> None:
    assert {row.backend for row in ORDER} <= set(BACKENDS)
    keys = [(row.backend, row.place, row.target, row.needs) for row in ORDER]
    assert len(set(keys)) == len(keys)


@pytest.fixture
def shelf(tmp_path: Path, tiny_artifacts: Callable[..., Path]) -> Path:
    """A folder with two artifacts of one checkpoint."""
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")
    for target in ("gguf-f16", "onnx-fp32"):
        (tmp_path / target).symlink_to(tiny_artifacts(target))
    return tmp_path


def test_the_best_of_a_folder_is_loaded_and_says_why(shelf: Path) -> None:
    with load(shelf, threads=1) as session:
        assert session.manifest.target == "gguf-f16"
        answer = session.ask([], "Is it?", max_new_tokens=1)
    assert answer.provenance.chosen == "gguf-f16 on llamacpp: 16-bit weights"
    with load(shelf, "ort", threads=1) as session:
        assert session.manifest.target == "onnx-fp32"
    assert "not gguf-f16: --backend ort was asked for" in session.chosen


def test_a_gguf_artifact_gets_the_faster_vision_tower_beside_it(
    shelf: Path, tiny_artifacts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shelf / "onnx-int8").symlink_to(tiny_artifacts("onnx-int8"))
    monkeypatch.setattr(choice_module, "ORDER", (Row("llamacpp", "cpu", "gguf-f16", "for a test"),))
    with load(shelf, threads=1) as session:
        assert session.backend.name == "llamacpp+ort"
        answer = session.ask(_frame(), "Is it?", max_new_tokens=2)
    assert answer.provenance.chosen == "gguf-f16 on llamacpp: for a test; vision tower of onnx-int8"
    assert answer.provenance.device.endswith("vision tower of onnx-int8")
    with load(shelf, "llamacpp", threads=1) as session:  # asked for by name: nothing else
        assert session.backend.name == "llamacpp"
    with load(shelf / "gguf-f16", threads=1) as session:
        assert session.backend.name == "llamacpp"


def _frame() -> Frame:
    return Frame.from_pixels(np.full((64, 96, 3), 90, np.uint8))


def test_doctor_shows_the_candidates_of_a_folder(shelf: Path) -> None:
    findings = doctor(shelf)
    assert [each["target"] for each in findings["candidates"]] == ["gguf-f16", "onnx-fp32"]
    assert findings["artifact"]["target"] == "gguf-f16"
    lines = format_findings(findings).splitlines()
    assert any(line.startswith("choice 2") and "comes after gguf-f16" in line for line in lines)


def test_the_next_is_taken_when_the_best_cannot_be_opened(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "unavailable", lambda: "it is not installed")
    with load(shelf, threads=1) as session:
        assert session.manifest.target == "onnx-fp32"
        assert "not gguf-f16: it is not installed" in session.chosen
    monkeypatch.setattr(ort, "unavailable", lambda: "nor is this")
    with pytest.raises(BackendUnavailable, match="no artifact in .* can run here") as caught:
        open_best(shelf, probe())
    assert caught.value.reasons == {"gguf-f16": "it is not installed", "onnx-fp32": "nor is this"}


def test_artifacts_of_different_checkpoints_are_refused(
    shelf: Path, tiny_artifacts: Callable[..., Path]
) -> None:
    (shelf / "other").symlink_to(tiny_artifacts("gguf-f16", "tiny_untied_checkpoint"))
    with pytest.raises(ArtifactError, match="different checkpoints, gguf-f16 .* and other"):
        load(shelf)


def test_damage_is_not_passed_over(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    broken = tmp_path_factory.mktemp("broken")
    for file in (shelf / "gguf-f16").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    manifest = read_manifest(broken)
    changed = dict(manifest.files)
    changed["tokenizer.json"] = {**changed["tokenizer.json"], "sha256": "0" * 64}
    write_manifest(broken, replace(manifest, files=changed))
    (shelf / "gguf-f16").unlink()
    (shelf / "gguf-f16").symlink_to(broken)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json was changed"):
        load(shelf)


def test_a_folder_without_artifacts(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no manifest.json"):
        find_artifacts(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        find_artifacts(tmp_path / "absent")


def test_too_little_memory_for_one_leaves_the_other(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ort_fit.weight_bytes(read_manifest(shelf / "onnx-fp32"))
    monkeypatch.setattr(llamacpp_fit, "memory_obstacle", lambda *_: "too large")
    monkeypatch.setattr(device_module, "_memory", lambda: (8 << 30, (1 << 30) + needed))
    with load(shelf, threads=1) as session:
        assert session.manifest.target == "onnx-fp32"
