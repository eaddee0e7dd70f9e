"""What a Jetson needs comes as wheels: nothing has to be compiled there.

Asks the package index of this machine what pip would install on 64-bit ARM; installs nothing.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a hospital's Jetson runs: the base install, ONNX Runtime on its CPU, TensorRT's bindings,
# server and DICOM node. llama-cpp-python is source everywhere and compiles for the machine.
EXTRAS = ("cpu", "tensorrt", "serve", "dicom")
# glibc of Ubuntu 22.04 (JetPack 6); JetPack 7 is Ubuntu 24.04 with 2.39.
NEWEST_GLIBC = 35


def _requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(each for name in EXTRAS for each in extras[name])]


def _resolve(python: str, report: Path) -> subprocess.CompletedProcess[str]:
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, NEWEST_GLIBC + 1)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"]
    command += ["--ignore-installed", "--target", str(report.parent / "nothing")]
    command += ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    for platform in (*platforms, "manylinux2014_aarch64"):
        command += ["--platform", platform]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--report", str(report)]
    return subprocess.run([*command, *_requirements()], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])  # the oldest supported; that of JetPack 7
def test_every_dependency_of_a_jetson_is_a_wheel(python: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = _resolve(python, report)
    if re.search("connection|resolve host|Max retries|timed out", result.stderr, re.IGNORECASE):
        pytest.skip("needs a package index")
    assert result.returncode == 0, result.stderr[-2000:]
    chosen = json.loads(report.read_text())["install"]
    files = {each["metadata"]["name"]: each["download_info"]["url"] for each in chosen}
    assert all(url.endswith(".whl") for url in files.values())
    native = [name for name, url in files.items() if "aarch64" in url]
    assert {"cuda-bindings", "numpy", "onnxruntime", "python-gdcm", "tokenizers"} <= set(native)
    assert not any("x86_64" in url for url in files.values())
