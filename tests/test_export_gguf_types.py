"""Storage types and quantised bytes, held against llama_model_quantize itself.

The reference quantises our bf16 file (which has every value of the checkpoint) in a process of its
own; our files are made straight from the checkpoint, block by block.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.calibration.imatrix import Imatrix, read_imatrix, write_imatrix
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.gguf_types import FILE_TYPES

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

ORACLE = Path(__file__).with_name("llama_cpp_oracle.py")
QUANTISED = ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs"]


def ask_llama_cpp(jobs: list[dict[str, Any]]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, str(ORACLE)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[Any] = json.loads(done.stdout)
    return answers


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    tensors = {
        each.name: (each.tensor_type.name, list(each.shape), each.data.tobytes())
        for each in reader.tensors
    }
    keys = {name: (field.types, field.contents()) for name, field in reader.fields.items()}
    return tensors, keys


def random_imatrix(bf16: Path) -> Imatrix:
    random = np.random.default_rng(3)
    means = {
        each.name: random.lognormal(0, 1, int(each.shape[0])).astype(np.float32)
        for each in gguf.GGUFReader(bf16).tensors
        if each.tensor_type.name == "BF16" and each.name.startswith("blk.")
    }
    return Imatrix(means=means, counts=dict.fromkeys(means, 100.0), datasets=("drawn",))


def compare(checkpoint: Path, weights: list[str], folder: Path, with_imatrix: bool) -> None:
    export_checkpoint(checkpoint, "gguf-bf16", folder / "bf16", golden=False)
    source = folder / "bf16" / "model.gguf"
    file, arrays = None, None
    if with_imatrix:
        file, arrays = folder / "imatrix.gguf", folder / "imatrix.npz"
        write_imatrix(file, random_imatrix(source))
        np.savez(arrays, **read_imatrix(file).means)  # type: ignore[arg-type]
    jobs = [
        {
            "quantise": str(source),
            "to": str(folder / f"{name}.gguf"),
            "ftype": FILE_TYPES[name],
            "imatrix": str(arrays) if arrays else None,
        }
        for name in weights
    ]
    assert ask_llama_cpp(jobs) == [True] * len(jobs)
    for name in weights:
        manifest = export_checkpoint(
            checkpoint, f"gguf-{name}", folder / name, imatrix=file, golden=False
        )
        ours, our_keys = contents(folder / name / "model.gguf")
        theirs, their_keys = contents(folder / f"{name}.gguf")
        assert {n: t[:2] for n, t in ours.items()} == {n: t[:2] for n, t in theirs.items()}
        assert [n for n in ours if ours[n] != theirs[n]] == []
        ours_only = {key for key in our_keys if key.startswith("quantize.imatrix.")}
        for key in (our_keys.keys() | their_keys.keys()) - ours_only - {"GGUF.kv_count"}:
            assert our_keys[key] == their_keys[key], key
        assert len(ours_only) == (4 if with_imatrix else 0)
        kinds = [kind for kind, *_ in ours.values()]
        assert manifest.weights["language"]["types"] == {k: kinds.count(k) for k in set(kinds)}


@pytest.mark.parametrize("with_imatrix", [False, True])
def test_tied(tiny_checkpoint: Path, tmp_path: Path, with_imatrix: bool) -> None:
    weights = QUANTISED[1:] if with_imatrix else QUANTISED
    compare(tiny_checkpoint, weights, tmp_path, with_imatrix)


def test_untied(tiny_untied_checkpoint: Path, tmp_path: Path) -> None:
    compare(tiny_untied_checkpoint, ["q6_k", "q4_k_m", "iq4_xs"], tmp_path, with_imatrix=False)


@pytest.mark.parametrize("with_imatrix", [False, True])
def test_many_layers_with_wide_groups(
    make_checkpoint: Any, tmp_path: Path, with_imatrix: bool
) -> None:
    """9 layers meet every branch of the mixtures; 4 query heads per key head those of iq4_xs."""
    checkpoint = make_checkpoint(
        tmp_path / "deep",
        text={
            "num_hidden_layers": 9,
            "num_key_value_heads": 1,
            "intermediate_size": 256,
        },
    )
    compare(checkpoint, ["q4_k_m", "iq4_xs"], tmp_path, with_imatrix)


@pytest.mark.parametrize(("hidden", "inner"), [(192, 288), (272, 512), (256, 272)])
def test_rows_that_fit_no_block_fall_back_as_llama_cpp_does(
    make_checkpoint: Any, tmp_path: Path, hidden: int, inner: int
) -> None:
    """192 = 6 x 32 but no multiple of 256; 272 is no multiple of 32 either."""
    checkpoint = make_checkpoint(
        tmp_path / "odd",
        text={"hidden_size": hidden, "intermediate_size": inner},
        vision={"out_hidden_size": hidden},
        tied=hidden == 192,
    )
    compare(checkpoint, ["q8_0", "q5_k_m", "iq4_xs"], tmp_path, with_imatrix=False)


def test_the_manifest_names_what_fell_back(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "odd", text={"intermediate_size": 272})
    manifest = export_checkpoint(checkpoint, "gguf-q4_k_m", tmp_path / "a", golden=False)
    language = manifest.weights["language"]
    assert language["types"]["F16"] == 4
    assert language["fallbacks"]["blk.0.ffn_down.weight"] == "Q4_K -> F16"
    assert set(language["fallbacks"]) == {f"blk.{layer}.ffn_down.weight" for layer in range(4)}
