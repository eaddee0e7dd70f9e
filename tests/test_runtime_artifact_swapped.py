"""Files of an artifact that change between being hashed and being read refuse the artifact."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, run_here
from node_bench import write_lone_rules
from PIL import Image

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import read_manifest
from medmo_edge.runtime import choice, combined
from medmo_edge.runtime.artifact_watch import ArtifactWatch
from medmo_edge.runtime.backends import open_backend
from medmo_edge.runtime.session import load
from medmo_edge.tokenizer import Tokenizer

pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")
Tiny = Callable[..., Path]


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


@pytest.fixture
def other(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """An artifact of the same sizes with other weights, as a new release would be."""
    pytest.importorskip("gguf", reason="exporting needs the export extra")
    from medmo_edge.export.export import export_checkpoint

    checkpoint = make_checkpoint(tmp_path / "checkpoint", seed=9)
    export_checkpoint(checkpoint, "gguf-f16", tmp_path / "other", golden=False)
    return tmp_path / "other"


def before(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[], Any]
) -> None:
    """Call ``change`` once, right before ``owner.name`` runs."""
    real = getattr(owner, name)
    done: list[object] = []

    def changed(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(change())
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, changed)


def swap(folder: Path, other: Path) -> None:
    """Another artifact in the place of one: the way a careful update does it."""
    folder.rename(folder.with_name("old"))
    other.rename(folder)


def rewrite(path: Path) -> None:
    """Another byte, with the size, inode and modification time of before."""
    found = os.stat(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("command", ["ask", "serve", "node"])
def test_every_command_refuses_what_was_swapped_behind_the_hashes(
    command: str,
    artifact: Path,
    other: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    if command == "serve":
        pytest.importorskip("uvicorn", reason="needs the serve extra")
    if command == "node":
        pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
    write_lone_rules(tmp_path)
    options: dict[str, list[str | Path]] = {
        "ask": [picture, "Where?"],
        "serve": ["--port", "0"],
        "node": ["--config", tmp_path / "rules.toml"],
    }
    before(monkeypatch, choice, "open_backend", lambda: swap(artifact, other))
    result = run_here(monkeypatch, capsys, command, artifact, *options[command])
    assert_refused(
        result, f"{artifact}/", "was changed on disk while the artifact was loaded: try again"
    )


@pytest.mark.parametrize("name", ["manifest.json", "model.gguf", "mmproj.gguf", "tokenizer.json"])
def test_one_file_rewritten_in_place_is_enough(
    name: str, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, choice, "open_backend", lambda: rewrite(artifact / name))
    with pytest.raises(ArtifactError, match=rf"/{name} was changed on disk while") as caught:
        load(artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verify", [True, False])
def test_a_tokenizer_swapped_after_the_weights_were_loaded(
    verify: bool, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    def opened(*arguments: Any) -> Any:
        backend = open_backend(*arguments)
        monkeypatch.setattr(backend, "close", lambda: closed.append(True))
        return backend

    monkeypatch.setattr(choice, "open_backend", opened)
    path = artifact / "tokenizer.json"
    before(monkeypatch, Tokenizer, "load", lambda: path.write_bytes(path.read_bytes()[:-40]))
    with pytest.raises(ArtifactError, match="tokenizer.json was changed on disk while"):
        load(artifact, verify=verify)
    assert closed


def test_what_the_change_breaks_is_not_taken_for_damage(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file is there while it is copied: llama.cpp refuses it, which is not the reason."""
    model = artifact / "model.gguf"
    before(monkeypatch, choice, "open_backend", lambda: os.truncate(model, 4096))
    with pytest.raises(ArtifactError, match="was changed on disk while"):
        load(artifact)


def test_damage_is_still_called_damage(artifact: Path) -> None:
    rewrite(artifact / "model.gguf")
    with pytest.raises(ArtifactError, match="another sha256; copy the artifact again"):
        load(artifact)


def test_a_vision_tower_swapped_while_it_is_loaded(
    artifact: Path, tiny_artifacts: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    shelf = tmp_path / "shelf"
    shutil.copytree(artifact, shelf / "gguf")
    tower = Path(shutil.copytree(tiny_artifacts("onnx-int8"), shelf / "onnx"))
    monkeypatch.setattr(choice, "ORDER", (choice.Row("llamacpp", "cpu", "gguf-f16", "for a test"),))
    before(monkeypatch, combined, "Vision", lambda: rewrite(tower / "vision.onnx.data"))
    with pytest.raises(ArtifactError, match=r"vision\.onnx\.data was changed on disk while"):
        load(shelf)


def test_the_watch_begins_before_the_hashes(artifact: Path) -> None:
    """What changes between the end of loading and the first request is seen by server and node."""
    with load(artifact) as session:
        path = artifact / "model.gguf"
        os.utime(path, ns=(0, 0))
        assert ArtifactWatch.of(session).changed()


def test_backups_of_a_served_artifact_are_no_change(artifact: Path, tmp_path: Path) -> None:
    """They link files and reset access times, which moves the time of the status alone."""
    manifest = read_manifest(artifact)
    found = os.stat(artifact / "model.gguf")
    os.link(artifact / "model.gguf", tmp_path / "backup")
    os.utime(artifact / "model.gguf", ns=(0, found.st_mtime_ns))
    assert not ArtifactWatch([manifest]).changed()
