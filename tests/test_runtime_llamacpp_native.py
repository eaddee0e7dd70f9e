"""llama.cpp's library and files: what is missing, too old or damaged is said in one line."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.errors import ArtifactError
from medmo_edge.runtime import llamacpp, llamacpp_native
from medmo_edge.runtime.session import load

pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")


def _damaged(artifact: Path, folder: Path, changes: dict[str, bytes]) -> Path:
    """A copy whose manifest vouches for ``changes``: damage that no hash can find."""
    folder.mkdir()
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        content = changes.get(record["role"], (artifact / name).read_bytes())
        (folder / name).write_bytes(content)
        record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("role", ["language", "vision"])
@pytest.mark.parametrize("damage", ["empty", "noise", "header", "half", "end", "exchanged"])
def test_weights_that_are_no_weights_give_one_line(
    role: str,
    damage: str,
    tiny_artifact: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = {"language": "model.gguf", "vision": "mmproj.gguf"}
    other = {"language": "vision", "vision": "language"}[role]
    content = (tiny_artifact / names[role]).read_bytes()
    damaged = {
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(5000),
        "header": content[:100],
        "half": content[: len(content) // 2],
        "end": content[:-1000],
        "exchanged": (tiny_artifact / names[other]).read_bytes(),
    }[damage]
    folder = _damaged(tiny_artifact, tmp_path / "artifact", {role: damaged})
    with pytest.raises(ArtifactError) as caught:
        load(folder, threads=1)
    assert names[role] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_manifest_that_lies_about_the_model(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = _damaged(tiny_artifact, tmp_path / "artifact", {})
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, value, message in (
        ("vocab_size", 1000, "vocabulary 448, the manifest says 1000"),
        ("deepstack_levels", 3, "image embedding size 512, the manifest says 1024"),
        ("tokenizer_length", 5, "tokenizer has 443 ids"),
        ("vocab_size", 400, "vocabulary 448, the manifest says 400"),
        ("num_layers", "four", "model num_layers 'four', which is no positive number"),
        ("image_token", None, "image_token"),
    ):
        changed = manifest | {"model": manifest["model"] | {key: value}}
        if value is None:
            del changed["model"][key]
        path.write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=message):
            load(folder, threads=1)


def test_why_the_library_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert llamacpp.unavailable() is None
    for installed, reason in ((None, "not installed"), ("0.3.9", "places boxes wrongly")):
        monkeypatch.setattr(llamacpp_native, "version", lambda value=installed: value)
        assert reason in str(llamacpp.unavailable())
    monkeypatch.setattr(llamacpp_native, "version", lambda: "1.0.0")
    required = {**llamacpp_native._REQUIRED, "llama_cpp.mtmd_cpp": ("mtmd_absent",)}
    monkeypatch.setattr(llamacpp_native, "_REQUIRED", required)
    monkeypatch.setattr(llamacpp_native, "load_library", llamacpp_native.load_library.__wrapped__)
    assert "has no mtmd_absent" in str(llamacpp.unavailable())


@pytest.mark.parametrize(
    ("setup", "environment", "spins"),
    [
        ("import medmo_edge", {}, False),
        ("import medmo_edge; sys.modules['torch'] = sys", {}, False),
        ("sys.modules['torch'] = sys; import medmo_edge", {}, True),
        ("sys.modules['torch'] = sys; import medmo_edge", {"GOMP_SPINCOUNT": "0"}, False),
        ("import medmo_edge", {"GOMP_SPINCOUNT": "500"}, True),
    ],
)
def test_openmp_that_started_before_us_is_noticed(
    setup: str, environment: dict[str, str], spins: bool
) -> None:
    code = f"import sys; {setup}; from medmo_edge.runtime.llamacpp_native import openmp_spins as s"
    outside = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; print(s())"],
        env=outside | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(spins)


@pytest.mark.parametrize(("info", "repacks"), [(b"AVX2 = 1 | AMX_INT8 = 1", False), (b"", True)])
def test_weights_never_meet_amx_kernels(
    info: bytes, repacks: bool, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = llamacpp_native.load_library()
    asked: list[bool] = []

    def load_model(path: bytes, parameters: Any) -> None:
        asked.append(parameters.use_extra_bufts)

    monkeypatch.setattr(library.llama, "llama_print_system_info", lambda: info)
    monkeypatch.setattr(library.llama, "llama_model_load_from_file", load_model)
    with pytest.raises(ArtifactError):
        load(tiny_artifact, threads=1)
    assert asked == [repacks]
