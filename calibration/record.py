"""The calibration record: a folder that says what a checkpoint's linears saw, for every quantiser.

``calibration.json`` is for people and programs: who was observed with what, and the scalars of
every linear. ``calibration.safetensors`` holds the per-channel vectors, ``<linear>.sum_sq`` and
``<linear>.mean_abs``, in float32. Nothing in it is made for one backend. There is no time stamp:
the same run gives the same bytes. Reading needs neither torch nor safetensors.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.calibration.statistics import LinearStats, stats_from
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import CalibrationError, CheckpointError
from medmo_edge.tensors import TensorInfo, map_tensor, read_header

SCHEMA = 1
JSON_FILE, TENSOR_FILE = "calibration.json", "calibration.safetensors"
_VECTORS = ("sum_sq", "mean_abs")
_RANGES = ("amax", "p999", "p9999", "weight_amax")
_COUNTS = ("count_text", "count_image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A calibration record. ``linears`` maps tensor names without ".weight" to what was seen.

    A tied head is there as "lm_head". ``checkpoint`` has name and sha256; ``samples`` has file,
    sha256 (of what was rendered, in any order), count and text and image tokens; ``preprocessing``
    is the sha256 of the image parameters; ``run`` has dtype, device kind and library versions.
    """

    path: Path
    checkpoint: Mapping[str, str]
    samples: Mapping[str, Any]
    preprocessing: str
    coords: str
    seed: int
    run: Mapping[str, Any]
    linears: Mapping[str, LinearStats]

    @property
    def sha256(self) -> str:
        """Hash of calibration.json, which holds the hash of the vectors."""
        return hashlib.sha256((self.path / JSON_FILE).read_bytes()).hexdigest()

    def check_belongs(self, checkpoint: Checkpoint) -> None:
        """Errors: CalibrationError when the record was made from another checkpoint."""
        for name, stats in self.linears.items():
            info = checkpoint.tensors.get(f"{name}.weight")
            width = math.prod(info.shape[1:]) if info else checkpoint.config.text.hidden_size
            is_known = info is not None or name == "lm_head"
            if not is_known or width != stats.sum_sq.size:
                self._refuse(checkpoint, f"{name} is not the same layer")
        if self.preprocessing != checkpoint.preprocessing.sha256:
            self._refuse(checkpoint, "images were prepared in another way")
        identity = checkpoint.identity()
        if self.checkpoint.get("sha256") != identity["sha256"]:
            self._refuse(checkpoint, "weights or settings differ")

    def _refuse(self, checkpoint: Checkpoint, why: str) -> None:
        raise CalibrationError(
            f"{self.path} was made from another checkpoint ({self.checkpoint.get('name')}; {why}): "
            f"run medmo-edge calibrate on {checkpoint.path}"
        )

    def summary(self) -> dict[str, Any]:
        """What a manifest says about the calibration."""
        return {
            "kind": "record",
            "sha256": self.sha256,
            "checkpoint": dict(self.checkpoint),
            "samples": dict(self.samples),
            "linears": len(self.linears),
        }


def write_record(record: Record) -> None:
    """Write both files into the existing folder ``record.path``, the JSON last."""
    from safetensors.numpy import save_file

    vectors = {
        f"{name}.{kind}": getattr(stats, kind)
        for name, stats in record.linears.items()
        for kind in _VECTORS
    }
    tensors = record.path / TENSOR_FILE
    save_file(vectors, tensors)
    tensors.chmod(0o644)  # the library writes for the owner alone
    document = {
        "schema": SCHEMA,
        "checkpoint": dict(record.checkpoint),
        "samples": dict(record.samples),
        "preprocessing": record.preprocessing,
        "coords": record.coords,
        "seed": record.seed,
        "run": dict(record.run),
        "vectors_sha256": _hash(tensors),
        "linears": {name: _scalars(stats) for name, stats in record.linears.items()},
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    (record.path / JSON_FILE).write_text(f"{text}\n", encoding="utf-8")


def read_record(path: str | Path) -> Record:
    """Read a record folder.

    Errors: CalibrationError, one line, for a folder that is none, a record of a newer version,
    changed or damaged files, and for NaN, infinite or negative values.
    """
    folder = Path(path)
    document = _read_json(folder)
    if document.get("schema") != SCHEMA:
        raise CalibrationError(
            f"{folder} has schema {document.get('schema')!r}, this version reads {SCHEMA}: "
            "calibrate again"
        )
    vectors = _open_vectors(folder, document)
    try:
        return Record(
            path=folder,
            checkpoint=dict(document["checkpoint"]),
            samples=dict(document["samples"]),
            preprocessing=str(document["preprocessing"]),
            coords=str(document["coords"]),
            seed=int(document["seed"]),
            run=dict(document["run"]),
            linears={
                str(name): _read_stats(folder, str(name), scalars, vectors)
                for name, scalars in document["linears"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(
            f"{folder / JSON_FILE} is damaged ({type(error).__name__}: {error}): calibrate again"
        ) from error


def _scalars(stats: LinearStats) -> dict[str, float | int]:
    return {name: getattr(stats, name) for name in (*_RANGES, *_COUNTS)}


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / JSON_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalibrationError(
            f"{folder} is no calibration record ({JSON_FILE} is missing): make one with "
            "medmo-edge calibrate"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not valid JSON: calibrate again") from error
    if not isinstance(document, dict):
        raise CalibrationError(f"{path} is not a JSON object: calibrate again")
    return document


def _open_vectors(folder: Path, document: Mapping[str, Any]) -> dict[str, TensorInfo]:
    path = folder / TENSOR_FILE
    try:
        vectors = read_header(path)
        is_same = _hash(path) == document.get("vectors_sha256")
    except (CheckpointError, OSError) as error:
        raise CalibrationError(f"{path} is missing or damaged ({error})") from error
    if not is_same:
        raise CalibrationError(f"{path} is not the file that {JSON_FILE} names: calibrate again")
    return vectors


def _read_stats(
    folder: Path, name: str, scalars: Mapping[str, Any], vectors: Mapping[str, TensorInfo]
) -> LinearStats:
    channels = {key: _read_vector(vectors[f"{name}.{key}"], name) for key in _VECTORS}
    stats = stats_from({**scalars, **channels})
    if stats.sum_sq.shape != stats.mean_abs.shape or min(stats.count_text, stats.count_image) < 0:
        raise CalibrationError(f"{folder}: {name} has counts or sizes that cannot be")
    ranges = np.array([getattr(stats, key) for key in _RANGES])
    if not all(np.isfinite(v).all() and (v >= 0).all() for v in (ranges, *channels.values())):
        raise CalibrationError(
            f"{folder}: {name} has a range that is NaN, infinite or negative: calibrate again"
        )
    return stats


def _read_vector(info: TensorInfo, name: str) -> NDArray[np.float32]:
    return np.array(map_tensor(info, name), np.float32).reshape(-1)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
