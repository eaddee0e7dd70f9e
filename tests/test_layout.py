"""The house keeps its shape: light imports, no leaked names, packages and help as printed."""

import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import medmo_edge

ROOT = Path(__file__).parent.parent
ROOMS = ("calibration", "evaluation", "export", "runtime", "train")
HEAVY = {
    "gguf",
    "llama_cpp",
    "matplotlib",
    "onnxruntime",
    "pydicom",
    "scipy",
    "torch",
    "transformers",
}


def _run_python(code: str) -> str:
    """Run ``code`` in a fresh interpreter that does not see the repository root on its path."""
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "module",
    [
        "medmo_edge",
        "medmo_edge.boxes",
        "medmo_edge.checkpoint",
        "medmo_edge.cli",
        "medmo_edge.images",
        "medmo_edge.manifest",
        "medmo_edge.prompts",
        "medmo_edge.runtime.backends",
        "medmo_edge.runtime.llamacpp",
        "medmo_edge.runtime.session",
        "medmo_edge.tokenizer",
    ],
)
def test_importing_core_and_runtime_loads_nothing_heavy(module: str) -> None:
    loaded = set(_run_python(f"import sys, {module}; print(*sys.modules)").split())
    assert not loaded & HEAVY


def test_public_names_resolve_and_match_all() -> None:
    for name in medmo_edge.__all__:
        assert getattr(medmo_edge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = medmo_edge.nonsense


def test_offline_switches_are_set_before_any_backend_loads() -> None:
    code = "import os, medmo_edge; print(*(os.environ[name] for name in {!r}))"
    names = ("ORT_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    assert _run_python(code.format(names)).split() == ["1", "1", "1"]


def test_room_names_do_not_leak_to_the_top_level() -> None:
    for room in ROOMS:
        code = f"import importlib.util as u; print(u.find_spec({room!r}))"
        assert _run_python(code).strip() == "None"


def test_listed_packages_are_the_folders_with_code() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    ours = [name for name in tools["packages"] if name.startswith("medmo_edge")]
    listed = {name.split(".")[-1] for name in ours}
    assert listed == folders == {"medmo_edge", *ROOMS}
    for room in ROOMS:
        link = ROOT / "medmo_edge" / room
        assert link.is_symlink() and os.readlink(link) == f"../{room}"


def test_wheel_holds_our_package_with_its_data_and_the_optimum_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # Not in the tree: what an interrupted or older build left there would get into the wheel.
    settings = tmp_path / "build.cfg"
    settings.write_text(f"[build]\nbuild_base = {tmp_path / 'build'}\n")
    places = {**os.environ, "DIST_EXTRA_CONFIG": str(settings)}
    command += ["-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300, env=places)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"medmo_edge", "optimum"}
    in_optimum = [name for name in names if name.startswith("optimum/")]
    assert in_optimum == ["optimum/commands/register/register_medmo_edge.py"]
    for needed in (
        "medmo_edge/py.typed",
        "medmo_edge/evaluation/gates.toml",
        "medmo_edge/evaluation/report.html",
        "medmo_edge/runtime/session.py",
        "medmo_edge/runtime/viewer.css",
        "medmo_edge/runtime/viewer.html",
        "medmo_edge/runtime/viewer.js",
        "medmo_edge/train/nano.toml",
        "medmo_edge/medmo-nano/model.safetensors",
        "medmo_edge/medmo-nano/README.md",
    ):
        assert needed in names


def test_readme_shows_the_real_help() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"```\n(Usage: medmo-edge .*?)```", readme, re.DOTALL)
    assert shown, "README.md has no block with the output of `medmo-edge --help`"
    environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    command = [sys.executable, "-m", "medmo_edge", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    assert shown.group(1).strip() == help_text.strip()


def test_the_page_of_modules_is_up_to_date() -> None:
    page = (ROOT / "docs" / "modules.md").read_text()
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "write_modules.py")
    assert spec and spec.loader
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert page == writer.page(), "docs/modules.md is out of date: run `make docs`"


def test_documents_link_to_files_that_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    targets = [
        (page.name, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert targets == []


def test_help_is_fast() -> None:
    command = [sys.executable, "-m", "medmo_edge", "--help"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    # 0.3 s on an idle machine; the bound leaves room for a busy one.
    assert min(seconds) < 1.0


def test_no_file_grows_past_its_job() -> None:
    folders = ("medmo_edge", *ROOMS, "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    too_long = {p.name: n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert too_long == {}
