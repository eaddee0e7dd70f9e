"""The choice of artifact and backend, pinned on eight machines that are described, not present."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from medmo_edge.errors import ArtifactError, BackendUnavailable
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest, read_manifest, write_manifest
from medmo_edge.runtime import certified, llamacpp, llamacpp_fit, ort, ort_fit, ort_native
from medmo_edge.runtime import choice as choice_module
from medmo_edge.runtime import device as device_module
from medmo_edge.runtime.backends import BACKENDS
from medmo_edge.runtime.choice import ORDER, Row, find_artifacts, open_best, rank
from medmo_edge.runtime.device import Cuda, Device, Jetson, probe
from medmo_edge.runtime.doctor import doctor, format_findings
from medmo_edge.runtime.session import load

GB = 1 << 30
# Bytes of a 4B model: language model and vision tower of each target.
SIZES = {"onnx-fp16": 9.7, "onnx-int8": 6.3, "onnx-int4": 4.2, "gguf-q4_k_m": 3.3, "gguf-f16": 8.9}
DTYPES = {"onnx-fp16": "float16", "onnx-int8": "float32", "onnx-int4": "float32"}
FACTS = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "deepstack_levels": 3,
    "num_layers": 36,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_positions": 262144,
}


def _artifact(target: str) -> Manifest:
    """A 4B artifact that exists only as its manifest."""
    roles = ("decoder_data", "vision_data") if target.startswith("onnx") else ("language", "vision")
    sizes = (int((SIZES[target] - 0.8) * 1e9), int(0.8e9))
    return Manifest(
        target=target,
        backend="ort" if target.startswith("onnx") else "llamacpp",
        model=dict(FACTS),
        coords="norm1000",
        preprocessing={},
        files={
            role: {"sha256": "", "bytes": size, "role": role}
            for role, size in zip(roles, sizes, strict=True)
        },
        weights={"graph_dtype": DTYPES[target]} if target in DTYPES else {},
        checkpoint={"name": "4b", "sha256": "same"},
        calibration=None,
        exporter={},
        certificate=None,
        licence="",
        folder=Path(target),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A device, and whether its onnxruntime is the one for GPUs."""

    device: Device
    gpu_library: bool


def _machine(
    memory_gb: float,
    *features: str,
    system: str = "Linux x86_64",
    gpu: Cuda | None = None,
    cuda: str | None = None,
    jetson: Jetson | None = None,
) -> Machine:
    device = Device(
        system=system,
        cpu="a CPU",
        cores=8,
        features=features,
        ram_bytes=int(memory_gb * GB),
        ram_available_bytes=int(memory_gb * GB * 0.8),
        cuda=(gpu,) if gpu else (),
        jetson=jetson,
        driver="580.65.06" if gpu else None,
        cuda_version=cuda,
    )
    return Machine(device=device, gpu_library=gpu is not None)


def _jetson(model: str, jetpack: str) -> Jetson:
    return Jetson(model=model, l4t="36.4.3" if jetpack < "7" else "38.4", jetpack=jetpack)


ARM = ("neon", "dotprod", "i8mm")
MACHINES = {
    "H200": _machine(
        1500, "avx2", "avx512", gpu=Cuda(name="H200", sm=90, memory_bytes=141 * GB), cuda="13.0"
    ),
    "RTX 4090": _machine(
        64, "avx2", gpu=Cuda(name="RTX 4090", sm=89, memory_bytes=24 * GB), cuda="13.0"
    ),
    "RTX 2080": _machine(
        32, "avx2", gpu=Cuda(name="RTX 2080", sm=75, memory_bytes=8 * GB), cuda="13.0"
    ),
    "Orin Nano JP6": _machine(
        8,
        *ARM,
        system="Linux aarch64",
        gpu=Cuda(name="Orin", sm=87, memory_bytes=8 * GB),
        cuda="12.6",
        jetson=_jetson("NVIDIA Jetson Orin Nano", "6.2"),
    ),
    "Orin JP7": _machine(
        64,
        *ARM,
        system="Linux aarch64",
        gpu=Cuda(name="Orin", sm=87, memory_bytes=64 * GB),
        cuda="13.2",
        jetson=_jetson("NVIDIA Jetson AGX Orin", "7.2"),
    ),
    "Thor": _machine(
        128,
        *ARM,
        system="Linux aarch64",
        gpu=Cuda(name="Thor", sm=110, memory_bytes=128 * GB),
        cuda="13.0",
        jetson=_jetson("NVIDIA Jetson AGX Thor", "7.0"),
    ),
    "AVX2 laptop": _machine(16, "avx2", "fma"),
    "ARM server": _machine(256, *ARM, "sve", system="Linux aarch64"),
}
CPU_ORDER = ["onnx-int4", "gguf-q4_k_m", "onnx-int8", "gguf-f16", "onnx-fp16"]
# Where each machine would run what, best first, and why the rest not.
EXPECTED = {
    "H200": ["onnx-fp16 cuda", *CPU_ORDER[:-1]],
    "RTX 4090": ["onnx-fp16 cuda", *CPU_ORDER[:-1]],
    "RTX 2080": CPU_ORDER,
    "Orin Nano JP6": CPU_ORDER[:2],
    "Orin JP7": ["onnx-fp16 cuda", *CPU_ORDER[:-1]],
    "Thor": ["onnx-fp16 cuda", *CPU_ORDER[:-1]],
    "AVX2 laptop": CPU_ORDER,
    "ARM server": CPU_ORDER,
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Device]:
    """``on(machine) -> device``: both libraries are installed, onnxruntime in its flavour."""

    def pretend(name: str) -> Device:
        machine = MACHINES[name]
        for module in (ort, llamacpp):
            monkeypatch.setattr(module, "unavailable", lambda: None)
        monkeypatch.setattr(ort_native, "has_cuda", lambda: machine.gpu_library)
        return machine.device

    return pretend


@pytest.mark.parametrize("name", MACHINES)
def test_the_decisions_on_eight_machines(name: str, on: Callable[[str], Device]) -> None:
    ranked = rank([_artifact(target) for target in sorted(SIZES)], on(name))
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
        ("H200", "onnx-int4", "comes after onnx-fp16"),
    ],
)
def test_the_reasons(name: str, target: str, reason: str, on: Callable[[str], Device]) -> None:
    ranked = rank([_artifact(each) for each in SIZES], on(name))
    (found,) = (each for each in ranked if each.manifest.target == target)
    assert reason in found.reason


def test_a_gpu_without_the_library_for_gpus(
    on: Callable[[str], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = on("H200")
    monkeypatch.setattr(ort_native, "has_cuda", lambda: False)
    (found,) = rank([_artifact("onnx-fp16")], device)
    assert found.place == "cpu"
    assert "pip install 'medmo-edge[gpu]'" in found.reason


def test_old_gpus_and_old_drivers_are_not_used(on: Callable[[str], Device]) -> None:
    device = on("H200")
    for machine, reason in (
        (replace(device, cuda=(replace(device.cuda[0], sm=70),)), "SM 70 is older than CUDA 13"),
        (replace(device, cuda_version="12.8"), "needs CUDA 13, the NVIDIA driver has 12.8"),
    ):
        (found,) = rank([_artifact("onnx-fp16")], machine)
        assert (found.place, reason in found.reason) == ("cpu", True)


def test_a_bfloat16_graph_needs_a_gpu(on: Callable[[str], Device]) -> None:
    manifest = replace(_artifact("onnx-fp16"), weights={"graph_dtype": "bfloat16"})
    assert rank([manifest], on("H200"))[0].place == "cuda"
    assert "runs on CUDA only" in rank([manifest], on("AVX2 laptop"))[0].reason


def test_a_certified_artifact_goes_first(
    on: Callable[[str], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(manifest: Manifest, backend: str, where: str) -> certified.Coverage:
        passes = manifest.target == "onnx-int8" and where.startswith("cpu ")
        return certified.Coverage(None if passes else "no certificate")

    monkeypatch.setattr(choice_module, "coverage", judge)
    ranked = rank([_artifact(target) for target in SIZES], on("AVX2 laptop"))
    assert ranked[0].manifest.target == "onnx-int8"
    assert "certified here" in ranked[0].reason
    assert "comes after onnx-int8" in ranked[1].reason


def test_the_table_names_known_backends_and_no_row_twice() -> None:
    assert {row.backend for row in ORDER} <= set(BACKENDS)
    keys = [(row.backend, row.place, row.target) for row in ORDER]
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
