"""The command as a user meets it: exit codes, one-line errors, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command_line import assert_refused, run_here
from PIL import Image

FAKE = "fake:WBC <box>[[100, 200, 300, 600]]</box>"


def _run(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medmo_edge", *map(str, arguments)]
    environment = {**os.environ, **changes}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture()
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cells.png"
    Image.fromarray(np.zeros((50, 200, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "artifact"
    result = _run("export", tiny_checkpoint, "--target", "gguf-f16", "-o", folder)
    assert result.returncode == 0, result.stderr
    assert str(folder) in result.stdout and "gguf-f16" in result.stdout
    return folder


def test_ask_prints_text_and_boxes_in_source_pixels(picture: Path) -> None:
    result = _run("ask", FAKE, picture, "Locate the white blood cell.")
    assert result.returncode == 0 and result.stderr == ""
    assert "WBC <box>[[100, 200, 300, 600]]</box>" in result.stdout
    assert "WBC: [20, 10, 60, 30]" in result.stdout


def test_ask_json_has_exactly_the_documented_keys(picture: Path) -> None:
    answer = json.loads(_run("ask", FAKE, picture, "Locate it.", "--json").stdout)
    assert set(answer) >= {
        "text",
        "boxes",
        "finish_reason",
        "backend",
        "device",
        "timings",
        "source",
        "artifact",
    }
    assert answer["boxes"] == [{"label": "WBC", "image": 0, "xyxy": [20.0, 10.0, 60.0, 30.0]}]
    assert set(answer["timings"]) >= {
        "load_seconds",
        "image_seconds",
        "prefill_seconds",
        "decode_seconds",
        "prompt_tokens",
        "new_tokens",
    }
    source = answer["source"]
    assert (source["width"], source["height"], source["frame"]) == (200, 50, 0)
    assert set(answer["artifact"]) == {"target", "manifest_sha256"}


def test_overlay_shows_the_box_and_is_never_replaced_silently(picture: Path) -> None:
    overlay = picture.with_name("overlay.png")
    arguments = ("ask", FAKE, picture, "Locate it.", "--overlay", overlay)
    assert _run(*arguments).returncode == 0
    drawn = np.asarray(Image.open(overlay).convert("RGB"))
    # 200 pixels are enlarged four times; the box starts at 20, 10 in the source.
    assert drawn[60, 80].tolist() != [0, 0, 0] and drawn[60, 70].tolist() == [0, 0, 0]
    before = overlay.stat()
    assert_refused(_run(*arguments), "exists already", "--overwrite")
    assert overlay.stat().st_mtime_ns == before.st_mtime_ns
    assert _run(*arguments, "--overwrite").returncode == 0


def test_ask_runs_an_exported_artifact(artifact: Path, picture: Path) -> None:
    result = _run("ask", artifact, picture, picture, "What?", "--json", "--max-new-tokens", "3")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["timings"]["new_tokens"] <= 3
    assert answer["backend"] == "llamacpp" and answer["artifact"]["target"] == "gguf-f16"


def test_doctor_names_devices_backends_and_reasons(artifact: Path) -> None:
    findings = json.loads(_run("doctor", artifact, "--json").stdout)
    assert findings["device"] and findings["backends"]
    text = _run("doctor").stdout
    assert "llamacpp" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ask", "missing-artifact", "{picture}", "What?"), ("missing-artifact",)),
        (("ask", FAKE, "missing.png", "What?"), ("missing.png",)),
        (("ask", FAKE, "{text}", "What?"), ("note.txt",)),
        (("ask", FAKE, "{picture}", "  "), ("empty",)),
        (("ask", FAKE, "{picture}", "What?", "--backend", "warp"), ("warp",)),
        (("ask", FAKE, "{picture}", "What?", "--window", "a,b"), ("CENTER,WIDTH",)),
        (("ask", FAKE, "{picture}", "What?", "--frame", "3"), ("frame 3",)),
        (("export", "missing", "--target", "gguf-f16", "-o", "{new}"), ("missing",)),
        (("export", "nano", "--target", "gguf-f17", "-o", "{new}"), ("gguf-f17", "gguf-f16")),
        (("export", "{other}", "--target", "gguf-f16", "-o", "{new}"), ("LlamaForCausalLM",)),
        (("export", "nano", "--target", "gguf-f16", "-o", "{folder}"), ("exists already",)),
        (("demo", "-o", "{folder}"), ("exists already",)),
        (("train", "no-such-recipe", "-o", "{new}"), ("no-such-recipe",)),
        (("doctor", "missing-artifact"), ("missing-artifact",)),
        (("fly",), ("No such command",)),
        (("export", "nano", "--target"), ("--target",)),
        (("ask", FAKE), ("Missing argument",)),
    ],
)
def test_bad_input_is_one_line(
    arguments: Sequence[str],
    words: Sequence[str],
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("no picture")
    other = tmp_path / "other"
    other.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (other / "config.json").write_text(json.dumps(config))
    places = {"picture": picture, "text": note, "other": other, "folder": other}
    new = tmp_path / "new"
    filled = [each.format(**places, new=new) if "{" in each else each for each in arguments]
    assert_refused(run_here(monkeypatch, capsys, *filled), *words)
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*partial*"))


def test_changed_and_damaged_artifacts_are_named(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in artifact.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with (copy / "model.gguf").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff\xff")
    picture = tmp_path / "p.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    assert_refused(_run("ask", copy, picture, "What?"), "model.gguf", "changed")
    (copy / "manifest.json").unlink()
    assert_refused(_run("ask", copy, picture, "What?"), "manifest.json")


def test_ctrl_c_during_an_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    command = [sys.executable, "-m", "medmo_edge", "export", str(tiny_checkpoint)]
    command += ["--target", "gguf-q4_k_m", "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.002)  # until the staging folder is there
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:  # it was faster than the signal
        assert (output / "manifest.json").is_file()
    else:
        assert process.returncode == 130 and errors.strip() == "medmo-edge: interrupted"
        assert list(tmp_path.iterdir()) == []
