"""Kill -9 at random, in small; benchmarks/node_endurance.py is the same trial with 1,000."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
TRIAL = Path(__file__).parents[1] / "benchmarks" / "node_endurance.py"


def _run(*options: str) -> None:
    if shutil.which("storescu") is None or shutil.which("storescp") is None:
        pytest.skip("storescu and storescp are not installed")
    command = [sys.executable, str(TRIAL), "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout, run.stderr
    result = json.loads(run.stdout)
    assert result["passed"] and run.returncode == 0, result
    assert result["kills"] >= 1 and result["exit_code"] == 0
    assert result["status"]["instances"]["answered"] == result["instances"]


def test_every_accepted_instance_is_answered_once() -> None:
    _run("--instances", "8", "--kills", "2", "--chunk", "2")


@pytest.mark.slow
def test_every_one_of_a_thousand_instances_is_answered_once() -> None:
    _run("--instances", "1000", "--kills", "20")
