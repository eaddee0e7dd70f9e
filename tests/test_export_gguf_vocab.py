"""Tokenizer keys: what llama.cpp reads from them tokenises as the checkpoint's tokenizer does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import ExportError
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.gguf_vocab import read_vocabulary
from medmo_edge.tokenizer import Tokenizer

# Composed letters only: llama.cpp leaves out the NFC step of Qwen's tokenizer.
TEXT = (
    "Locate the white blood cells. <|im_start|>user\nIs 12,5 mm ok? <think>'re it'S  \u00e9\n\n x"
)


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_tokens_types_and_padding(tiny_checkpoint: Path) -> None:
    vocabulary = read_vocabulary(open_checkpoint(tiny_checkpoint))
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    tokenizer = Tokenizer.load(tiny_checkpoint / "tokenizer.json")
    assert len(vocabulary.tokens) == len(vocabulary.types) == config["text_config"]["vocab_size"]
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<|im_end|>"] == types["<|fim_prefix|>"] == types["<|image_pad|>"] == 3
    assert types["<think>"] == types["</tool_call>"] == 4
    assert types["a"] == 1
    assert vocabulary.tokens[tokenizer.length :] == [
        f"[PAD{index}]" for index in range(tokenizer.length, len(vocabulary.tokens))
    ]
    assert set(vocabulary.types[tokenizer.length :]) == {5}
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    assert vocabulary.special_ids == {
        "eos": ids["<|im_end|>"],
        "pad": ids["<|endoftext|>"],
        "bos": ids["<|endoftext|>"],
    }


def test_both_forms_of_merges_are_read_alike(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def join(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]

    joined = edited(tiny_checkpoint, tmp_path / "joined", join)
    assert read_vocabulary(open_checkpoint(joined)) == read_vocabulary(
        open_checkpoint(tiny_checkpoint)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].update(type="Unigram"), "'Unigram'"),
        (lambda c: c.update(pre_tokenizer=None), "no rule"),
        (
            lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="\\s+"),
            "not as Qwen does",
        ),
        (lambda c: c["added_tokens"][-1].update(id=10_000), "beyond the model's vocabulary"),
    ],
)
def test_tokenizers_llama_cpp_would_read_differently(
    tiny_checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    folder = edited(tiny_checkpoint, tmp_path / "other", change)
    with pytest.raises(ExportError) as caught:
        read_vocabulary(open_checkpoint(folder))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_llama_cpp_loads_every_target_and_tokenises_alike(
    tiny_checkpoint: Path, tiny_untied_checkpoint: Path, tmp_path: Path
) -> None:
    """Both files of each target load; sizes, ids and text come out as they went in."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    jobs, checkpoints = [], []
    for path in (tiny_checkpoint, tiny_untied_checkpoint):
        for target in ("gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_k_m"):
            folder = tmp_path / f"{path.name}-{target}"
            export_checkpoint(path, target, folder, golden=False)
            jobs.append({"load": str(folder), "text": TEXT})
            checkpoints.append(path)
    oracle = Path(__file__).with_name("llama_cpp_oracle.py")
    done = subprocess.run(
        [sys.executable, str(oracle)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=True,
    )
    for path, facts in zip(checkpoints, json.loads(done.stdout), strict=True):
        checkpoint = open_checkpoint(path)
        text, vision = checkpoint.config.text, checkpoint.config.vision
        language = [n for n in checkpoint.tensors if not n.startswith("model.visual.")]
        assert facts == {
            "language": True,
            "vision": True,
            "parameters": sum(int(checkpoint.read(n).size) for n in language),
            "layers": text.num_layers,
            "width": text.hidden_size,
            "input_width": text.hidden_size * (1 + len(vision.deepstack_indexes)),
            "vocab_size": text.vocab_size,
            "eos": checkpoint.config.eos_token_ids[0],
            "ids": Tokenizer.load(path / "tokenizer.json").encode(TEXT),
        }
