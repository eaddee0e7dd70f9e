"""ONNX artifacts end to end: the manifest says what the files hold, failures leave nothing."""

import builtins
import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import ExportError, UsageError
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.onnx_files import find_recipe
from medmo_edge.manifest import read_manifest

EMBEDDINGS = "model.language_model.embed_tokens.weight"
WEIGHTS = ("fp32", "fp16", "int8", "int4")
# ONNX element types by what the manifest calls them; codes are stored as bytes.
STORED = {"fp32": {1}, "fp16": {10}, "int8": {1, 2, 3}, "int4": {1, 2}}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_manifest_says_what_the_files_hold(
    weights: str, tiny_untied_checkpoint: Path, tmp_path: Path
) -> None:
    target = f"onnx-{weights}"
    manifest = export_checkpoint(tiny_untied_checkpoint, target, tmp_path / "a", golden=False)
    assert manifest == read_manifest(tmp_path / "a")
    assert {name: record["role"] for name, record in manifest.files.items()} == {
        "vision.onnx": "vision",
        "vision.onnx.data": "vision_data",
        "decoder.onnx": "decoder",
        "decoder.onnx.data": "decoder_data",
        "embed_tokens.npy": "embeddings",
        "tokenizer.json": "tokenizer",
        "chat_template.jinja": "chat_template",
    }
    said = manifest.weights
    dtype = "float16" if weights == "fp16" else "float32"
    assert (said["graph_dtype"], said["form"], said["opset"]) == (dtype, "gqa", 21)
    assert said["embeddings_dtype"] == "bfloat16"
    for role, part in (("decoder", "language"), ("vision", "vision")):
        model = onnx.load(str(manifest.path_of(role)), load_external_data=False)
        tensors = [each for each in model.graph.initializer if each.external_data]
        sizes = [int(e.value) for t in tensors for e in t.external_data if e.key == "length"]
        assert said[part]["bytes"] == sum(sizes)
        assert said[part]["fallbacks"] == {}
        if role == "decoder":
            assert {each.data_type for each in tensors} == STORED[weights]
        codes = sum(
            1 + each.name.count("+") for each in tensors if each.name.endswith(".codes")
        )  # matrices with one input share their codes
        narrow = Counter(said[part]["types"])
        narrow.pop(dtype)
        assert codes == sum(narrow.values())
    assert manifest.exporter["libraries"]["onnx"] == onnx.__version__


@pytest.mark.parametrize(
    ("weights", "language", "vision"),
    [
        (
            "int8",
            {"float32": 17, "int8": 1, "int8-dynamic": 28},
            {"float32": 51, "int8-dynamic": 24},
        ),
        ("int4", {"float32": 17, "int4": 28, "int8": 1}, {"float32": 51, "int8-dynamic": 24}),
    ],
)
def test_which_matrices_are_narrow(
    weights: str,
    language: dict[str, int],
    vision: dict[str, int],
    tiny_untied_checkpoint: Path,
    tmp_path: Path,
) -> None:
    target = f"onnx-{weights}"
    manifest = export_checkpoint(tiny_untied_checkpoint, target, tmp_path / "a", golden=False)
    assert manifest.weights["language"]["types"] == language
    assert manifest.weights["vision"]["types"] == vision


@pytest.mark.parametrize(
    ("dtype", "stored"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")]
)
def test_embeddings_keep_the_checkpoints_own_bits(
    dtype: str, stored: str, make_checkpoint: Any, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "c", dtype=dtype)
    manifest = export_checkpoint(folder, "onnx-int4", tmp_path / "a", golden=False)
    assert manifest.weights["embeddings_dtype"] == stored
    table = np.load(manifest.path_of("embeddings"), mmap_mode="r")
    assert np.array_equal(table, open_checkpoint(folder).raw(EMBEDDINGS))


def test_progress_counts_every_byte_of_every_stage(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    export_checkpoint(
        tiny_checkpoint,
        "onnx-int4",
        tmp_path / "a",
        golden=False,
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )
    stages = ["language model", "vision tower", "embeddings", "checkpoint hash", "file hashes"]
    assert list(seen) == stages
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1] and len({total for _, total in steps}) == 1


def test_refusals_leave_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(tiny_checkpoint, "onnx-int4", tmp_path / "there")
    with pytest.raises(UsageError, match="did you mean onnx-int4"):
        export_checkpoint(tiny_checkpoint, "onnx-in4", tmp_path / "a")
    with pytest.raises(UsageError, match="no ONNX recipe"):
        find_recipe("int3")
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("medmo_edge.export.export.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ExportError, match="has 1,000,000 bytes free, the artifact needs"):
        export_checkpoint(tiny_checkpoint, "onnx-int4", tmp_path / "a")
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize("missing", ["onnx", "ml_dtypes"])
def test_a_missing_library_is_named_with_its_extra(
    missing: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ExportError, match=r"pip install 'medmo-edge\[export\]'"):
        export_checkpoint(tiny_checkpoint, "onnx-fp32", tmp_path / "a", golden=False)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medmo_edge.export.onnx_files.save_graph", fail)
    with pytest.raises(ExportError, match="disk full while writing"):
        export_checkpoint(tiny_checkpoint, "onnx-fp32", tmp_path / "a", golden=False)
    assert os.listdir(tmp_path) == []


def test_ctrl_c_in_the_middle_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A real SIGINT to a real process that has written some of the language model."""
    script = (
        "import sys, time; from medmo_edge.export.export import export_checkpoint\n"
        "def slow(stage, done, total):\n"
        "    print(stage, done, total, flush=True); time.sleep(0.05)\n"
        "try:\n"
        "    export_checkpoint(*sys.argv[1:], golden=False, progress=slow)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint), "onnx-int4"]
    command.append(str(tmp_path / "a"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("language model")
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=60) == 130
    assert os.listdir(tmp_path) == []
