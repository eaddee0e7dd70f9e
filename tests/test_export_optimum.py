"""The real optimum-cli finds our command and runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medmo_edge.manifest import read_manifest

ROOT = Path(__file__).parent.parent
CLI = Path(sys.executable).with_name("optimum-cli")

pytestmark = pytest.mark.skipif(not CLI.exists(), reason="needs the optimum extra")


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """optimum-cli with our registration file on its path, as an installation has it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(each) for each in (CLI, "export", *arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def test_a_checkpoint_becomes_an_artifact(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_checkpoint, "--target", "onnx-int4")
    done = run("medmo-edge", *options, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert f"artifact: {tmp_path / 'a'}  onnx-int4" in done.stdout
    assert read_manifest(tmp_path / "a").target == "onnx-int4"


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run("medmo-edge", "--model", "nano", "--target", "onnx-int5", tmp_path / "a")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "optimum-cli" in line]
    assert "unknown target 'onnx-int5'" in line
    assert not (tmp_path / "a").exists()
