"""Exports end to end: what the manifest says, and that every failure leaves nothing behind."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.calibration.imatrix import Imatrix, write_imatrix
from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import CalibrationError, CheckpointError, ExportError, UsageError
from medmo_edge.export import export as export_module
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.targets import TARGETS
from medmo_edge.manifest import INTENDED_USE, read_manifest

gguf = pytest.importorskip("gguf")


def imatrix_for(checkpoint: Path, **changes: Any) -> Imatrix:
    opened = open_checkpoint(checkpoint)
    text = opened.config.text
    inputs = {
        "attn_q": text.hidden_size,
        "attn_k": text.hidden_size,
        "attn_v": text.hidden_size,
        "attn_output": text.num_heads * text.head_dim,
        "ffn_gate": text.hidden_size,
        "ffn_up": text.hidden_size,
        "ffn_down": text.intermediate_size,
    }
    means = {
        f"blk.{layer}.{name}.weight": np.ones(width, np.float32)
        for layer in range(text.num_layers)
        for name, width in inputs.items()
    }
    means.update(changes)
    means = {name: mean for name, mean in means.items() if mean is not None}
    return Imatrix(means=means, counts=dict.fromkeys(means, 10.0), datasets=("set.jsonl",))


def test_the_manifest_tells_the_runtime_everything(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = export_checkpoint(tiny_checkpoint, "gguf-f16", tmp_path / "a")
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    text = config["text_config"]
    assert manifest == read_manifest(tmp_path / "a") and manifest.folder == tmp_path / "a"
    assert manifest.model == {
        "name": "tiny",
        "architecture": "qwen3vl",
        "num_parameters": open_checkpoint(tiny_checkpoint).num_parameters,
        "vocab_size": text["vocab_size"],
        "tokenizer_length": open_checkpoint(tiny_checkpoint).load_tokenizer().length,
        "eos_token_ids": list(open_checkpoint(tiny_checkpoint).config.eos_token_ids),
        "image_token_id": config["image_token_id"],
        "vision_start_token_id": config["vision_start_token_id"],
        "vision_end_token_id": config["vision_end_token_id"],
        "image_token": "<|image_pad|>",
        "max_positions": 4096,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "hidden_size": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "mrope_section": [12, 10, 10],
        "deepstack_levels": 1,
        "vision": {
            "depth": 4,
            "hidden_size": 128,
            "num_heads": 4,
            "num_position_embeddings": 256,
            "merge_size": 2,
            "out_hidden_size": 256,
            "patch_size": 16,
        },
        "generation": json.loads((tiny_checkpoint / "generation_config.json").read_text()),
    }
    assert (manifest.target, manifest.backend) == ("gguf-f16", "llamacpp")
    assert manifest.preprocessing["max_pixels"] == 262144 and manifest.coords == "norm1000"
    assert manifest.checkpoint == open_checkpoint(tiny_checkpoint).identity()
    assert (manifest.calibration, manifest.certificate) == (None, None)
    assert (manifest.licence, manifest.intended_use) == ("see checkpoint", INTENDED_USE)
    assert manifest.exporter["seconds"] >= 0 and manifest.exporter["libraries"]["gguf"]


def test_files_roles_and_copies(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = export_checkpoint(tiny_checkpoint, "gguf-bf16", tmp_path / "a")
    assert {name: record["role"] for name, record in manifest.files.items()} == {
        "model.gguf": "language",
        "mmproj.gguf": "vision",
        "tokenizer.json": "tokenizer",
        "chat_template.jinja": "chat_template",
        "golden.json": "golden",
    }
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    for name, record in manifest.files.items():
        content = (tmp_path / "a" / name).read_bytes()
        assert record["bytes"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(os.listdir(tmp_path / "a")) == sorted([*manifest.files, "manifest.json"])
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("gguf-")])
def test_types_and_sizes_in_the_manifest_are_those_of_the_files(
    tiny_untied_checkpoint: Path, tmp_path: Path, target: str
) -> None:
    if target not in ("gguf-f16", "gguf-bf16"):
        pytest.importorskip("llama_cpp")
    manifest = export_checkpoint(tiny_untied_checkpoint, target, tmp_path / "a", golden=False)
    for role in ("language", "vision"):
        tensors = gguf.GGUFReader(manifest.path_of(role)).tensors
        kinds = [each.tensor_type.name for each in tensors]
        said = manifest.weights[role]
        assert said["types"] == {kind: kinds.count(kind) for kind in set(kinds)}
        assert said["bytes"] == sum(int(each.n_bytes) for each in tensors)
        assert said["parameters"] == sum(int(each.n_elements) for each in tensors)
        assert said["fallbacks"] == {}
    assert bool(manifest.weights["notes"]) == (target == "gguf-iq4_xs")


def test_progress_counts_every_byte_of_every_stage(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    manifest = export_checkpoint(
        tiny_checkpoint,
        "gguf-f16",
        tmp_path / "a",
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )
    assert list(seen) == [
        "language model",
        "vision tower",
        "checkpoint hash",
        "file hashes",
        "golden cases",
    ]
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1] and len({total for _, total in steps}) == 1
    assert seen["language model"][-1][1] == manifest.weights["language"]["bytes"]


def test_an_importance_matrix_is_recorded_in_file_and_manifest(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    file = tmp_path / "images.gguf"
    write_imatrix(file, imatrix_for(tiny_checkpoint))
    manifest = export_checkpoint(
        tiny_checkpoint, "gguf-iq4_xs", tmp_path / "a", imatrix=file, golden=False
    )
    assert manifest.calibration == {
        "kind": "imatrix",
        "file": "images.gguf",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "datasets": ["set.jsonl"],
        "entries": 28,
        "chunks": 1,
    }
    fields = gguf.GGUFReader(manifest.path_of("language")).fields
    assert fields["quantize.imatrix.entries_count"].contents() == 28
    assert fields["quantize.imatrix.dataset"].contents() == "set.jsonl"
    assert manifest.weights["notes"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blk.3.ffn_down.weight": None}, "blk.3.ffn_down.weight is missing"),
        ({"blk.4.attn_q.weight": np.ones(256, np.float32)}, "no weight of this checkpoint"),
        ({"blk.0.attn_norm.weight": np.ones(256, np.float32)}, "no weight of this checkpoint"),
        ({"blk.0.attn_q.weight": np.ones(128, np.float32)}, "has 128 channels"),
    ],
)
def test_an_importance_matrix_of_another_model_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    file = tmp_path / "i.gguf"
    write_imatrix(file, imatrix_for(tiny_checkpoint, **changes))
    with pytest.raises(CalibrationError) as caught:
        export_checkpoint(tiny_checkpoint, "gguf-q4_k_m", tmp_path / "a", imatrix=file)
    assert words in str(caught.value) and str(file) in str(caught.value)
    assert os.listdir(tmp_path) == ["i.gguf"]


@pytest.mark.parametrize("target", ["gguf-f16", "gguf-bf16", "gguf-q8_0"])
def test_a_matrix_that_would_change_nothing_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, target: str
) -> None:
    with pytest.raises(UsageError, match="leave --imatrix out"):
        export_checkpoint(tiny_checkpoint, target, tmp_path / "a", imatrix=tmp_path / "i.gguf")


def test_refusals_before_anything_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(tiny_checkpoint, "gguf-f16", tmp_path / "there")
    with pytest.raises(UsageError, match="unknown target"):
        export_checkpoint(tiny_checkpoint, "gguf-q9", tmp_path / "a")
    with pytest.raises(CheckpointError, match="does not exist"):
        export_checkpoint(tmp_path / "nowhere", "gguf-f16", tmp_path / "a")
    with pytest.raises(CalibrationError, match="cannot be read"):
        export_checkpoint(
            tiny_checkpoint, "gguf-q4_k_m", tmp_path / "a", imatrix=tmp_path / "none.gguf"
        )
    assert os.listdir(tmp_path) == ["there"]


def test_too_little_disk_is_told_before_writing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("medmo_edge.export.export.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ExportError, match=r"has 1,000,000 bytes free, the artifact needs 4\d,"):
        export_checkpoint(tiny_checkpoint, "gguf-f16", tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real file system of 3 MB where this user may mount one, else with the write failing."""
    monkeypatch.setattr(export_module, "_check_space", lambda needed, folder: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(export_module, "write_files", _raiser(full))
    try:
        with pytest.raises(ExportError, match="disk full while writing") as caught:
            export_checkpoint(tiny_checkpoint, "gguf-f16", disk / "a")
        assert "\n" not in str(caught.value) and os.listdir(disk) == []
    finally:
        if is_mounted:
            subprocess.run(["umount", str(disk)], check=True)


def _raiser(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


SLOW_EXPORT = """
import sys, time
from pathlib import Path
from medmo_edge.export.export import export_checkpoint
def slow(stage, done, total):
    print(stage, done, total, flush=True)
    time.sleep(0.05)
try:
    export_checkpoint(sys.argv[1], sys.argv[2], Path(sys.argv[3]), progress=slow)
except KeyboardInterrupt:
    sys.exit(130)
"""


def _end_in_the_middle(how: signal.Signals, checkpoint: Path, target: str, output: Path) -> int:
    """Send a real signal to a real process that has written some of the language model."""
    command = [sys.executable, "-c", SLOW_EXPORT, str(checkpoint), target, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("language model")
        assert [name[:11] for name in os.listdir(output.parent)] == [".a.partial-"]
        process.send_signal(how)
        process.stdout.read()
        return process.wait(timeout=60)


@pytest.mark.parametrize("target", ["gguf-f16", "gguf-q4_k_m"])
def test_ctrl_c_in_the_middle_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, target: str
) -> None:
    if target != "gguf-f16":
        pytest.importorskip("llama_cpp")
    output = tmp_path / "a"
    assert _end_in_the_middle(signal.SIGINT, tiny_checkpoint, target, output) == 130
    assert os.listdir(tmp_path) == []


def test_what_a_killed_export_left_is_removed_by_the_next(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    if not Path("/proc/sys/kernel/random/boot_id").exists():
        pytest.skip("this system does not name its boots")
    output = tmp_path / "a"
    ended = _end_in_the_middle(signal.SIGKILL, tiny_checkpoint, "gguf-f16", output)
    assert ended == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    export_checkpoint(tiny_checkpoint, "gguf-f16", output, golden=False)
    assert os.listdir(tmp_path) == ["a"]
