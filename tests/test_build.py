"""The ``build`` command as a user meets it, on a machine whose GPU is a fake."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, run_here
from trt_machine import Machine, pretend

from medmo_edge import build as build_module
from medmo_edge.runtime.session import load

pytest.importorskip("onnxruntime", reason="the fake GPU computes with it")
pytest.importorskip("onnx", reason="the fake TensorRT parses with it")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def artifact(tiny_scatter: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_scatter, tmp_path / "artifact"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with a GPU and TensorRT."""
    with pretend() as made:
        monkeypatch.setattr(build_module, "probe", lambda: made.device)
        yield made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("build", ...)``: exit code, stdout, stderr."""
    return partial(run_here, monkeypatch, capsys)


def test_engines_are_built_once(machine: Machine, artifact: Path, run: Run) -> None:
    first = run("build", artifact)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"engines: {artifact}/engines/tensorrt-10.16.1-sm89-")
    assert "tensorrt 10.16.1.11, SM 89" in first.stdout and "(Example GPU)" in first.stdout
    assert "built" in first.stdout and len(first.stdout.splitlines()) == 1
    (record,) = (artifact / "engines").glob("*/engine.json")
    made = record.stat().st_mtime_ns
    again = run("build", artifact)
    assert "there already" in again.stdout
    assert record.stat().st_mtime_ns == made
    assert "built" in run("build", artifact, "--force").stdout
    assert record.stat().st_mtime_ns > made
    with load(artifact) as session:
        assert session.backend.name == "trt"


def test_a_record_that_cannot_be_read_is_built_over(
    machine: Machine, artifact: Path, run: Run
) -> None:
    run("build", artifact)
    (record,) = (artifact / "engines").glob("*/engine.json")
    record.write_text("{}")
    assert run("build", artifact).stdout.strip().endswith("built")
    assert json.loads(record.read_text())["sm"] == 89


def test_json_is_the_record(machine: Machine, artifact: Path, tmp_path: Path, run: Run) -> None:
    result = run("build", artifact, "-o", tmp_path / "engines", "--level", "5", "--json")
    found = json.loads(result.stdout)
    assert found["built"] is True
    assert found["settings"] == {"level": 5}
    assert Path(found["path"]).parent == tmp_path / "engines"
    assert found.items() >= json.loads((Path(found["path"]) / "engine.json").read_text()).items()


def test_what_cannot_be_built_is_one_line(
    machine: Machine, artifact: Path, tiny_artifacts: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    assert_refused(run("build", tmp_path / "absent"), "does not exist")
    assert_refused(run("build", tiny_artifacts("onnx-fp32")), "onnx-fp32", "needs no engines")
    assert_refused(run("build", artifact, "--sm", "89"), "--sm is for --check and --rtx")
    assert_refused(run("build", artifact, "--rtx"), "tensorrt-rtx is not installed: pip install")
    assert_refused(run("build", artifact, "--check"), "--check needs a GPU", "--sm 89")
    assert_refused(run("build", artifact, "--check", "--sm", "89", "-o", "x"), "leave -o out")
    assert_refused(run("build", artifact, "--rtx", "--sm", "89", "--sm", "86"), "one GPU at a")
    machine.become(cuda=())
    assert_refused(run("build", artifact), "no CUDA GPU here", "--check --sm 89")
    machine.packages = {}
    assert_refused(run("build", artifact, "--check", "--sm", "89"), "TensorRT is not installed")
    assert not (artifact / "engines").exists()


def test_an_interrupted_build_is_one_line(machine: Machine, artifact: Path, run: Run) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "make_engines", stop)
        result = run("build", artifact)
    line = "medmo-edge: interrupted, nothing was left: run the same command again"
    assert (result.returncode, result.stderr.strip()) == (130, line)
    assert not (artifact / "engines").exists()
