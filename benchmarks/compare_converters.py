"""Compares our GGUF files with those of llama.cpp's own converter, tensor by tensor, key by key.

    python benchmarks/compare_converters.py CHECKPOINT --llama-cpp SOURCE_TREE

SOURCE_TREE is a llama.cpp checkout with convert_hf_to_gguf.py and gguf-py; the source distribution
of llama-cpp-python holds one in vendor/llama.cpp. The converter needs torch, transformers and
sentencepiece in the same environment. It knows a tokenizer only by its exact vocabulary:
--any-tokenizer makes it take every one for Qwen's, as the small test checkpoints need. Exit code 1
when a tensor or a key that is not listed in KNOWN_DIFFERENCES differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.export.export import export_checkpoint

# Keys that may differ, and why.
KNOWN_DIFFERENCES = {
    "general.name": "llama.cpp makes a title of the folder name, we keep the checkpoint's name",
    "general.basename": "guessed by llama.cpp from the folder name",
    "general.finetune": "guessed by llama.cpp from the folder name",
    "general.version": "guessed by llama.cpp from the folder name",
    "general.organization": "guessed by llama.cpp from the folder name",
    "general.size_label": "llama.cpp takes it from a folder name that holds one",
    "general.license": "from the model card; ours is in the manifest",
    "general.license.name": "from the model card; ours is in the manifest",
    "general.license.link": "from the model card; ours is in the manifest",
    "general.tags": "from the model card",
    "general.languages": "from the model card",
}
_CARD_PREFIXES = ("general.base_model.", "general.dataset.")
# (our target, our file, the converter's arguments)
_PAIRS = {
    "language f16": ("gguf-f16", "model.gguf", ["--outtype", "f16"]),
    "language bf16": ("gguf-bf16", "model.gguf", ["--outtype", "bf16"]),
    "vision f16": ("gguf-f16", "mmproj.gguf", ["--outtype", "f16", "--mmproj"]),
}
_AS_IT_IS = "import convert_hf_to_gguf as converter; converter.main()"
_TAKE_ANY = (
    "from conversion.base import TextModel; "
    "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'; " + _AS_IT_IS
)


def main() -> int:
    """Print one row per pair of files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--any-tokenizer", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        converter = Converter(options.llama_cpp, options.any_tokenizer)
        rows = compare(options.checkpoint, converter, Path(folder))
    if options.json:
        print(json.dumps(rows))
    else:
        _print(rows)
    return int(any(row["different_tensors"] or row["unexplained_keys"] for row in rows))


@dataclass(frozen=True, slots=True)
class Converter:
    """llama.cpp's converter in its source tree."""

    tree: Path
    any_tokenizer: bool = False

    def run(self, checkpoint: Path, output: Path, arguments: list[str]) -> None:
        """Convert in a process of its own, which sees llama.cpp's gguf package and not ours."""
        paths = [str(self.tree / "gguf-py"), str(self.tree), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        script = _TAKE_ANY if self.any_tokenizer else _AS_IT_IS
        command = [sys.executable, "-c", script, str(checkpoint), "--outfile", str(output)]
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"convert_hf_to_gguf.py failed: {done.stderr.strip()[-2000:]}")


def compare(checkpoint: Path, converter: Converter, folder: Path) -> list[dict[str, Any]]:
    """One row of counts and names per file of ``_PAIRS``."""
    rows = []
    for label, (target, file, arguments) in _PAIRS.items():
        ours = folder / target
        if not ours.exists():
            export_checkpoint(checkpoint, target, ours)
        theirs = folder / f"theirs-{label.replace(' ', '-')}.gguf"
        converter.run(checkpoint, theirs, arguments)
        rows.append({"file": label, **compare_files(ours / file, theirs)})
        theirs.unlink()
    return rows


def compare_files(ours: Path, theirs: Path) -> dict[str, Any]:
    """Counts of equal tensors (name, type, shape, every byte) and keys (name, type, value)."""
    import gguf

    readers = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    our_tensors, their_tensors = ({each.name: each for each in r.tensors} for r in readers)
    our_keys, their_keys = (
        {
            name: (field.types, field.contents())
            for name, field in r.fields.items()
            if not name.startswith("GGUF.")
        }
        for r in readers
    )
    names, keys = our_tensors.keys() | their_tensors.keys(), our_keys.keys() | their_keys.keys()
    differing = [n for n in names if not _same(our_tensors.get(n), their_tensors.get(n))]
    different_keys = sorted(key for key in keys if our_keys.get(key) != their_keys.get(key))
    return {
        "tensors": len(names),
        "equal_tensors": len(names) - len(differing),
        "different_tensors": sorted(differing),
        "bytes": sum(int(each.n_bytes) for each in their_tensors.values()),
        "keys": len(keys),
        "equal_keys": len(keys) - len(different_keys),
        "explained_keys": [key for key in different_keys if _is_known(key)],
        "unexplained_keys": [key for key in different_keys if not _is_known(key)],
    }


def _same(ours: Any, theirs: Any) -> bool:
    return (
        ours is not None
        and theirs is not None
        and ours.tensor_type == theirs.tensor_type
        and list(ours.shape) == list(theirs.shape)
        and np.array_equal(ours.data.view(np.uint8), theirs.data.view(np.uint8))
    )


def _is_known(key: str) -> bool:
    return key in KNOWN_DIFFERENCES or key.startswith(_CARD_PREFIXES)


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'file':16}{'tensors equal':>16}{'bytes':>16}{'keys equal':>14}  keys that differ")
    for row in rows:
        tensors = f"{row['equal_tensors']}/{row['tensors']}"
        keys = f"{row['equal_keys']}/{row['keys']}"
        other = ", ".join(row["unexplained_keys"] + row["explained_keys"])
        print(f"{row['file']:16}{tensors:>16}{row['bytes']:>16,}{keys:>14}  {other}")


if __name__ == "__main__":
    sys.exit(main())
