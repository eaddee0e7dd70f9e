"""The tokenizer as GGUF keys, read straight from tokenizer.json.

Our runtime tokenises with tokenizer.json itself; these keys are for llama.cpp, which needs them to
load the file, and for its own programs. Only byte-level BPE as Qwen uses it. Source: llama.cpp,
conversion/base.py (get_vocab_base) and gguf-py/gguf/vocab.py (SpecialVocab).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ExportError

# Values of gguf.TokenType.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# How Qwen2 and later split text before BPE; llama.cpp knows the same rule as "qwen2".
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens in id order, padded to the model's vocabulary size, with llama.cpp's token types."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str
    special_ids: dict[str, int]


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The vocabulary of a checkpoint. Errors: ExportError when llama.cpp could not tokenise so."""
    path = checkpoint.tokenizer_path
    content = _read_json(path)
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise ExportError(
            f"{path}: tokenizer model {model.get('type')!r}: GGUF export knows only BPE"
        )
    added = {entry["content"]: entry for entry in content.get("added_tokens", [])}
    vocab_size = checkpoint.config.text.vocab_size
    tokens, types = _tokens(model["vocab"], added, vocab_size, path)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[_merge_text(merge) for merge in model["merges"]],
        pre_tokenizer=_pre_tokenizer(content, path),
        special_ids=_special_ids(checkpoint, added),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} does not hold a JSON object")
    return content


def _tokens(
    vocab: dict[str, int], added: dict[str, dict[str, Any]], size: int, path: Path
) -> tuple[list[str], list[int]]:
    ids = {index: token for token, index in vocab.items()}
    ids.update({entry["id"]: token for token, entry in added.items()})
    if ids and max(ids) >= size:
        raise ExportError(f"{path}: token id {max(ids)} is beyond the model's vocabulary of {size}")
    tokens = [ids.get(index, f"[PAD{index}]") for index in range(size)]
    types = [
        _token_type(token, added) if index in ids else _UNUSED for index, token in enumerate(tokens)
    ]
    return tokens, types


def _token_type(token: str, added: dict[str, dict[str, Any]]) -> int:
    if token not in added:
        return _NORMAL
    looks_special = token.startswith("<|") and token.endswith("|>")
    return _CONTROL if added[token].get("special") or looks_special else _USER_DEFINED


def _merge_text(merge: str | list[str]) -> str:
    """Two symbols joined by a space; tokenizers before 0.20 stored them so."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _pre_tokenizer(content: dict[str, Any], path: Path) -> str:
    steps = content.get("pre_tokenizer") or {}
    patterns = [
        (step.get("pattern") or {}).get("Regex")
        for step in steps.get("pretokenizers", [steps])
        if step.get("type") == "Split"
    ]
    if patterns != [_QWEN2_SPLIT]:
        raise ExportError(
            f"{path} splits text by {patterns or 'no rule'}, not as Qwen does: "
            "llama.cpp would tokenise differently"
        )
    return "qwen2"


def _special_ids(checkpoint: Checkpoint, added: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Ids of eos, padding and bos: the tokenizer's own choice before the config's."""
    path = checkpoint.path / "tokenizer_config.json"
    config = _read_json(path) if path.is_file() else {}
    from_config = {
        "eos": next(iter(checkpoint.config.eos_token_ids), None),
        "pad": checkpoint.config.pad_token_id,
        "bos": checkpoint.config.bos_token_id,
    }
    found: dict[str, int] = {}
    for kind, fallback in from_config.items():
        named = config.get(f"{kind}_token")
        text = named.get("content") if isinstance(named, dict) else named
        index = added[text]["id"] if text in added else fallback
        if index is not None:
            found[kind] = index
    return found
