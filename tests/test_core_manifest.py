"""Manifests and staging: whole artifacts or nothing, and every kind of damage named in one line."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.errors import ArtifactError, ExportError
from medmo_edge.manifest import (
    Manifest,
    new_artifact,
    read_manifest,
    record_file,
    sha256_file,
    write_manifest,
)


def write_artifact(output: Path) -> Manifest:
    with new_artifact(output) as staging:
        (staging / "model.gguf").write_bytes(b"weights")
        (staging / "tokenizer.json").write_bytes(b"{}")
        files = {
            "model.gguf": record_file(staging / "model.gguf", "language"),
            "tokenizer.json": record_file(staging / "tokenizer.json", "tokenizer"),
        }
        return write_manifest(
            staging,
            Manifest(
                target="gguf-q8_0",
                backend="llamacpp",
                model={"name": "m", "vocab_size": 8},
                coords="norm1000",
                preprocessing={"patch_size": 16},
                files=files,
                weights={"types": {"Q8_0": 1}},
                checkpoint={"name": "m", "sha256": "0" * 64},
                calibration=None,
                exporter={"name": "medmo-edge"},
                certificate=None,
                licence="see checkpoint",
            ),
        )


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refusal(folder: Path, *, verify: bool = True) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(folder, verify=verify)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_written_artifact_reads_back_equal(tmp_path: Path) -> None:
    written = write_artifact(tmp_path / "a")
    read = read_manifest(tmp_path / "a")
    assert read == written
    assert read.sha256 == written.sha256
    assert (
        read.sha256 == hashlib.sha256((tmp_path / "a" / "manifest.json").read_bytes()).hexdigest()
    )
    assert read.path_of("language") == tmp_path / "a" / "model.gguf"
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "model.gguf", "tokenizer.json"]


def test_an_unknown_role_is_named(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match="names no 'engine' file"):
        read_manifest(tmp_path / "a").path_of("engine")


def test_hash_is_streamed_and_counted(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # more than two blocks
    (tmp_path / "f").write_bytes(content)
    counted: list[int] = []
    assert sha256_file(tmp_path / "f", counted.append) == hashlib.sha256(content).hexdigest()
    assert sum(counted) == len(content) and len(counted) == 3


def test_folders_that_are_no_artifact(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is a file" in refusal(tmp_path / "model.gguf")
    assert "did not finish" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b'{"schema": 1', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "JSON object"),
        (b"{}", "schema None"),
        (b'{"schema": 2}', "schema 2, this version reads 1"),
        (b'{"schema": true}', "schema True"),
        (b'{"schema": 1}', "'target' is missing"),
        (b" " * ((16 << 20) + 1), "larger than"),
    ],
)
def test_damaged_manifests(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    "key", ["target", "files", "model", "calibration", "certificate", "weights"]
)
def test_each_field_is_required_and_typed(tmp_path: Path, key: str) -> None:
    write_artifact(tmp_path / "a")
    edit(tmp_path / "a", lambda values: values.update({key: 3}))
    assert repr(key) in refusal(tmp_path / "a")
    edit(tmp_path / "a", lambda values: values.pop(key))
    assert repr(key) in refusal(tmp_path / "a")


@pytest.mark.parametrize("record", [None, {}, {"sha256": "", "bytes": "7", "role": "language"}])
def test_incomplete_file_records(tmp_path: Path, record: Any) -> None:
    write_artifact(tmp_path / "a")
    edit(tmp_path / "a", lambda values: values["files"].update({"model.gguf": record}))
    assert "lacks sha256, bytes or role" in refusal(tmp_path / "a")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b", "a\\b", "C:x"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    write_artifact(tmp_path / "a")
    (tmp_path / "secret").write_bytes(b"weights")
    edit(
        tmp_path / "a", lambda values: values["files"].update({name: values["files"]["model.gguf"]})
    )
    assert "not a plain file name" in refusal(tmp_path / "a")


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a")
    model = tmp_path / "a" / "model.gguf"
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    assert "leads out of its folder" in refusal(tmp_path / "a", verify=False)
    model.unlink()
    model.symlink_to(model)
    assert "cannot be read" in refusal(tmp_path / "a") or "is missing" in refusal(tmp_path / "a")


def test_an_artifact_reached_through_a_link_is_fine(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_manifest(tmp_path / "link").target == "gguf-q8_0"


def test_missing_and_changed_files(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a")
    model = tmp_path / "a" / "model.gguf"
    model.write_bytes(b"Weights")
    assert "was changed" in refusal(tmp_path / "a")
    assert read_manifest(tmp_path / "a", verify=False).target == "gguf-q8_0"
    model.write_bytes(b"weight")
    message = refusal(tmp_path / "a", verify=False)
    assert "model.gguf" in message and " 6 bytes" in message and "says 7" in message
    model.unlink()
    assert "model.gguf is missing" in refusal(tmp_path / "a", verify=False)
    model.mkdir()
    assert "model.gguf is missing" in refusal(tmp_path / "a", verify=False)


def test_an_existing_output_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "dangling"):
        with pytest.raises(ExportError, match="exists already"):
            write_artifact(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="exists already"),
        new_artifact(tmp_path / "a") as staging,
    ):
        (staging / "manifest.json").write_text("{}")
        (tmp_path / "a").mkdir()
    assert os.listdir(tmp_path) == ["a"] and not os.listdir(tmp_path / "a")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("a bug")])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_artifact(tmp_path / "deep" / "er" / "a") as staging:
        (staging / "model.gguf").write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_second_interrupt_does_not_keep_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shutil.rmtree, []

    def interrupted(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(folder)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), new_artifact(tmp_path / "a") as staging:
        (staging / "model.gguf").write_bytes(b"half")
        raise KeyboardInterrupt
    assert len(calls) == 2 and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "disk full"), (errno.EIO, "Input.output")],
)
def test_write_errors_are_one_line(tmp_path: Path, code: int, words: str) -> None:
    with (
        pytest.raises(ExportError, match=words) as caught,
        new_artifact(tmp_path / "a") as staging,
    ):
        (staging / "model.gguf").write_bytes(b"half")
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def test_a_real_full_disk_leaves_nothing(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(ExportError, match="disk full"), new_artifact(tmp_path / "a") as staging:
        (staging / "model.gguf").symlink_to("/dev/full")
        (staging / "model.gguf").write_bytes(b"half")
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match="cannot make"):
        write_artifact(tmp_path / "file" / "a")
    assert os.listdir(tmp_path) == ["file"]
