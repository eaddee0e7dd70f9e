"""benchmarks/gpu.py: what it does on a machine with a (fake) GPU, and what it says without one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trt_machine import Machine, pretend

from medmo_edge.runtime.device import probe
from medmo_edge.runtime.trt_fit import cache_bytes

pytest.importorskip("onnxruntime", reason="the fake GPU computes with it")
pytest.importorskip("onnx", reason="the fake TensorRT parses with it")

FOLDER = Path(__file__).parents[1] / "benchmarks"


def _module(name: str) -> ModuleType:
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu, gpu_measure = _module("gpu"), _module("gpu_measure")


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A GPU of SM 89."""
    with pretend() as made:
        yield made


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with nano as trt-fp16, whose cache is short so that the fake is quick."""
    folder = tmp_path_factory.mktemp("work")
    gpu.export_checkpoint("nano", "trt-fp16", folder / "trt-fp16", cache_length=512)
    return folder


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if probe().cuda:
        pytest.skip("there is a GPU")
    command = [sys.executable, str(FOLDER / "gpu.py"), "nano", "--work-dir", str(tmp_path / "w")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == ("gpu.py: no CUDA GPU here: run this on the machine to be measured\n")
    assert not (tmp_path / "w").exists()


def test_every_target_is_built_verified_measured_or_refused(
    machine: Machine, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    settings = gpu_measure.Settings(rounds=1, steps=4, prompt=8)

    def measure(artifact: Path | None, quick: bool) -> dict[str, Any]:
        if artifact is None:
            return {"bytes_per_second": gpu_measure.bandwidth(rounds=2)}
        if artifact.name == "trt-bf16":  # numbers that the fake cannot compute with
            raise gpu.GenerationError("measuring failed: out of memory")
        return asdict(gpu_measure.measure(artifact, settings, "trt"))

    task = gpu.Task(
        checkpoint="nano",
        work_dir=tmp_path,
        targets=("trt-fp16", "trt-bf16", "trt-fp8", "trt-nvfp4"),
    )
    monkeypatch.setattr(gpu, "_verify", lambda manifest, task: "pass (2 golden cases)")
    rows, speed = gpu.run(task, machine.device, measure)
    assert machine.cuda.leaks() == []
    assert speed > 0
    fp16, bf16, fp8, nvfp4 = rows
    assert fp16.obstacle == "" and fp16.built["library"] == "tensorrt 10.16.1.11"
    assert fp16.figures["backend"] == "trt"
    assert fp16.figures["prompt_tokens"] > 64
    assert fp16.figures["first_token_again_seconds"] < fp16.figures["first_token_seconds"]
    manifest = gpu.read_manifest(tmp_path / "trt-fp16")
    assert fp16.figures["gpu_bytes"] > cache_bytes(manifest)
    weights = manifest.files["decoder.onnx.data"]["bytes"]
    assert fp16.figures["bytes_per_token"] == weights + 10 * cache_bytes(manifest) // 512
    assert "out of memory" in bf16.obstacle
    assert "--calibration" in fp8.obstacle
    assert nvfp4.obstacle == "needs SM 100, this Example GPU is SM 89"
    gpu.write_report(tmp_path / "report.md", task, machine.device, rows, speed)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# nano on Example GPU\n")
    (line,) = (each for each in page.splitlines() if each.startswith("| trt-fp16"))
    assert "| pass (2 golden cases) |" in line and "%" in line
    assert "- trt-nvfp4: not measured: needs SM 100" in page
    assert "| AGX Orin 64 | Qwen3-VL-8B | INT4 AWQ | 57.2 | 225.1 | 32.3 |" in page
    values = json.loads((tmp_path / "report.json").read_text())
    assert [each["target"] for each in values["targets"]] == list(task.targets)


def test_the_golden_cases_of_an_artifact_are_replayed(machine: Machine, half: Path) -> None:
    """Or it is said that nothing was verified."""
    task = gpu.Task(checkpoint="nano", work_dir=half)
    manifest = gpu._export("trt-fp16", task)
    gpu._build(manifest, machine.device)
    said = gpu._verify(manifest, task)
    has_cases = any(record["role"] == gpu.GOLDEN for record in manifest.files.values())
    assert said.startswith("pass (") if has_cases else said == "not verified: give --samples"


def test_a_child_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if probe().cuda:
        pytest.skip("there is a GPU")
    with pytest.raises(gpu.GenerationError, match="measuring failed: .*CUDA") as caught:
        gpu.measure_apart(tmp_path, True)
    assert "\n" not in str(caught.value)
