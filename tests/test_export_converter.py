"""Our f16 and bf16 files against llama.cpp's own converter: every byte, every key.

Needs a llama.cpp source tree in MEDMO_EDGE_LLAMA_CPP (llama-cpp-python's source distribution holds
one in vendor/llama.cpp), torch, transformers and sentencepiece. Run as a user runs it: through
benchmarks/compare_converters.py.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_converters.py"


@pytest.fixture(scope="module")
def llama_cpp_tree() -> str:
    tree = os.environ.get("MEDMO_EDGE_LLAMA_CPP")
    if not tree:
        pytest.skip("MEDMO_EDGE_LLAMA_CPP is not set: no llama.cpp source tree here")
    missing = [name for name in ("torch", "transformers", "sentencepiece") if not find_spec(name)]
    if missing:
        pytest.skip(f"llama.cpp's converter needs {', '.join(missing)}")
    return tree


def compare(checkpoint: Path, tree: str, *options: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), str(checkpoint), "--llama-cpp", tree, "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return {row.pop("file"): row for row in json.loads(done.stdout)}


def assert_equal(rows: dict[str, dict[str, Any]], checkpoint: Path) -> None:
    assert list(rows) == ["language f16", "language bf16", "vision f16"]
    for row in rows.values():
        assert row["different_tensors"] == [] and row["equal_tensors"] == row["tensors"] > 40
        assert row["unexplained_keys"] == []
        assert row["explained_keys"] == ["general.name"]
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = 11 * config["text_config"]["num_hidden_layers"] + 2
    assert rows["language f16"]["tensors"] == tensors + (not config["tie_word_embeddings"])
    assert rows["language f16"]["keys"] == 33 and rows["vision f16"]["keys"] == 25


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_untied_checkpoint"])
@pytest.mark.slow
def test_small_vocabulary(name: str, llama_cpp_tree: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    assert_equal(compare(checkpoint, llama_cpp_tree, "--any-tokenizer"), checkpoint)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.slow
def test_real_tokenizer(
    tied: bool, llama_cpp_tree: str, data_dir: Path, make_checkpoint: Any, tmp_path: Path
) -> None:
    """All 151,936 ids; here llama.cpp's converter recognises the tokenizer by itself."""
    checkpoint = make_checkpoint(tmp_path / "real", text={"vocab_size": 151936}, tied=tied)
    _use_real_tokenizer(checkpoint, data_dir / "tokenizer")
    assert_equal(compare(checkpoint, llama_cpp_tree), checkpoint)


def _use_real_tokenizer(checkpoint: Path, tokenizer: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (checkpoint / name).unlink()
    shutil.copy(tokenizer / "tokenizer.json", checkpoint)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    del settings["chat_template"]  # the checkpoint has its own file, which transformers prefers
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    added = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in added}
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    _edit(checkpoint / "generation_config.json", {**ends, "pad_token_id": ids["<|endoftext|>"]})
    path = checkpoint / "config.json"
    text = {**json.loads(path.read_text())["text_config"], **ends}
    specials = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    _edit(path, {**specials, "text_config": text})


def _edit(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
