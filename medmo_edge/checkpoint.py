"""Checkpoints: a Hugging Face folder of Qwen3-VL, checked whole when opened and read lazily.

Needs no torch and downloads nothing. Opening checks every file name, every shard's size and every
tensor's shape against config.json, so that a bad folder fails here in one line and not hours later.
LoRA adapters and quantised weights are refused with what to do instead.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import COORDS, Coords
from medmo_edge.errors import CheckpointError
from medmo_edge.model_config import (
    ModelConfig,
    Shape,
    TextConfig,
    VisionConfig,
    expected_tensors,
    num_parameters,
    read_config,
)
from medmo_edge.preprocess import Preprocessing
from medmo_edge.tensors import TensorInfo, check_storage, map_tensor, read_header, read_rows
from medmo_edge.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "ModelConfig",
    "TensorInfo",
    "TextConfig",
    "VisionConfig",
    "open_checkpoint",
]

NANO = "nano"
NANO_FOLDER = Path(__file__).with_name("medmo-nano")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TIED = "lm_head.weight"
_HASH_THREADS = 4  # hashing holds no lock; more would only make a disk seek
_MAX_JSON_BYTES = 64 << 20
# Suffixes that quantisers add; named in the error instead of "unknown tensor".
_QUANTISED = ("weight_scale_inv", "weight_scale", "qweight", "qzeros", "absmax", "quant_map", "SCB")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. ``card`` is medmo_edge.json, ``generation`` generation_config.json."""

    path: Path
    name: str
    config: ModelConfig
    preprocessing: Preprocessing
    coords: Coords
    generation: Mapping[str, Any]
    chat_template: str
    tensors: Mapping[str, TensorInfo]
    card: Mapping[str, Any]

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the memory maps; arrays from ``raw`` stay valid while they are referenced."""
        self._maps.clear()

    @property
    def tokenizer_path(self) -> Path:
        """The checkpoint's tokenizer.json."""
        return self.path / "tokenizer.json"

    @property
    def num_parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        return num_parameters(list(expected_tensors(self.config).values()))

    @cached_property
    def _maps(self) -> dict[str, NDArray[Any]]:
        return {}

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer. Errors: CheckpointError when damaged or larger than the vocabulary."""
        tokenizer = Tokenizer.load(self.tokenizer_path)
        vocab_size, image = self.config.text.vocab_size, self.config.image_token_id
        if tokenizer.length > vocab_size or image not in tokenizer.special_ids.values():
            raise CheckpointError(
                f"{self.tokenizer_path} ({tokenizer.length} ids) does not belong to this "
                f"checkpoint (vocab_size {vocab_size}, image token {image}): copy its own"
            )
        return tokenizer

    def read(self, name: str) -> NDArray[np.float32]:
        """One whole tensor as float32. Errors: CheckpointError when the file cannot be read."""
        info = self._info(name)
        (values,) = read_rows(info, name, max_bytes=max(4, 4 * num_parameters([info.shape])))
        return values.reshape(info.shape)

    def raw(self, name: str) -> NDArray[Any]:
        """One tensor as it is stored, memory-mapped and read-only; bfloat16 as uint16."""
        if name not in self._maps:
            self._maps[name] = map_tensor(self._info(name), name)
        return self._maps[name]

    def row_blocks(self, name: str, max_bytes: int) -> Iterator[NDArray[np.float32]]:
        """A tensor in float32 blocks of whole rows, each at most ``max_bytes`` or one row."""
        return read_rows(self._info(name), name, max_bytes)

    def identity(self) -> dict[str, str]:
        """Name and sha256 of this checkpoint: over the sha256 of every file read, and the settings.

        Reads all weights once, several files at a time; the value is kept for the next call.
        """
        return {"name": self.name, "sha256": self._sha256}

    @cached_property
    def _sha256(self) -> str:
        names = {info.path.name for info in self.tensors.values()}
        paths = [self.path / name for name in sorted(names | {"config.json", "tokenizer.json"})]
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            lines = [
                f"{path.name} {hash}"
                for path, hash in zip(paths, pool.map(_hash, paths), strict=True)
            ]
        settings = [self.preprocessing.to_dict(), self.coords, self.chat_template]
        lines.append(json.dumps([*settings, dict(self.generation)], sort_keys=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name}") from None


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open and check a checkpoint folder; "nano" is the one embedded in this package.

    Errors: CheckpointError, one line, for everything that is missing, damaged or not Qwen3-VL.
    """
    folder = NANO_FOLDER if str(path) == NANO else Path(path)
    _check_folder(folder)
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json", default={})
    card = _read_json(folder / "medmo_edge.json", default={})
    # The architecture is judged before the weights: a wrong model has no use for a shard check.
    read_config(config, generation, str(folder), has_lm_head=True)
    tensors = _read_tensors(folder)
    model = read_config(config, generation, str(folder), has_lm_head=_TIED in tensors)
    _check_tensors(folder, tensors, expected_tensors(model))
    return Checkpoint(
        path=folder,
        name=str(card.get("name") or folder.resolve().name),
        config=model,
        preprocessing=_read_preprocessing(folder, model.vision),
        coords=_read_coords(folder, card),
        generation=generation,
        chat_template=_read_chat_template(folder),
        tensors=tensors,
        card=card,
    )


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(f"checkpoint folder {folder} does not exist: nothing is downloaded")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give the Hugging Face folder with config.json")
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = str(_read_json(adapter).get("base_model_name_or_path") or "its base checkpoint")
        raise CheckpointError(
            f"{folder} is a LoRA adapter of {base}: merge the two first with: "
            f"medmo-edge merge {shlex.quote(str(folder))} --base FOLDER -o MERGED"
        )


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """One JSON object; ``default`` when the file is missing and may be."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is too large to be a configuration")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if default is not None:
            return default
        raise CheckpointError(f"{path} is missing: is this a Hugging Face checkpoint?") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of all shards; the index, when there is one, must agree with them."""
    if (folder / _INDEX).exists():
        return _read_shards(folder, _read_json(folder / _INDEX).get("weight_map"))
    if (folder / _WEIGHTS).exists():
        return read_header(folder / _WEIGHTS)
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder / _INDEX} is missing: copy it with the shards")
    if any(folder.glob("*.bin")):
        raise CheckpointError(f"{folder} holds *.bin weights: save it with safe_serialization=True")
    raise CheckpointError(f"{folder / _WEIGHTS} is missing: the folder holds no weights")


def _read_shards(folder: Path, weight_map: object) -> dict[str, TensorInfo]:
    if not isinstance(weight_map, dict) or not all(_is_file_name(n) for n in weight_map.values()):
        raise CheckpointError(f"{folder / _INDEX} is damaged: it does not map tensors to shards")
    shards = {name: read_header(folder / name) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{folder / shard} lacks tensor {name}, which the index promises")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _check_tensors(
    folder: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, Shape]
) -> None:
    """Every tensor there, none too many, each of the shape that config.json implies."""
    for name in tensors:
        if name.endswith(_QUANTISED):
            raise CheckpointError(f"{folder} is quantised (tensor {name}): use its bf16 checkpoint")
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder} lacks tensor {missing[0]}{more}, which config.json implies"
        )
    for name, info in tensors.items():
        if name not in expected and name != _TIED:  # a tied head is sometimes stored twice
            raise CheckpointError(f"{folder} has tensor {name}, which {folder.name} cannot use")
        shape = expected.get(name, info.shape)
        if info.shape != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(info.shape)}, but config.json implies "
                f"{list(shape)}"
            )
    check_storage(tensors)


def _read_preprocessing(folder: Path, vision: VisionConfig) -> Preprocessing:
    """processor_config.json when it describes images (5.x), else preprocessor_config.json."""
    path = folder / "processor_config.json"
    config = _read_json(path, default={})
    if not isinstance(config.get("image_processor"), dict):
        path = folder / "preprocessor_config.json"
        config = _read_json(path)
    try:
        read = Preprocessing.from_processor_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    sizes = read.patch_size, read.temporal_patch_size, read.merge_size
    if sizes != (vision.patch_size, vision.temporal_patch_size, vision.merge_size):
        raise CheckpointError(f"{path}: patch or merge sizes {sizes} do not fit config.json")
    return read


def _read_coords(folder: Path, card: Mapping[str, Any]) -> Coords:
    coords = card.get("coords", "norm1000")
    if coords not in COORDS:
        raise CheckpointError(
            f"{folder / 'medmo_edge.json'}: coords is {coords!r}, not one of {', '.join(COORDS)}"
        )
    return cast(Coords, coords)


def _read_chat_template(folder: Path) -> str:
    """From chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as text") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(folder / name, default={}).get("chat_template")
        if isinstance(found, list):  # several named templates: the one transformers uses by itself
            found = next((t["template"] for t in found if t.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    raise CheckpointError(f"{path} is missing: copy it from the base checkpoint")
