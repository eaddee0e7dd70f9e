"""Artifact folders: the manifest that describes one, and the staging that makes one appear whole.

An artifact is complete exactly when its manifest.json exists: files are written to a staging folder
beside the target, the manifest last, and one rename publishes them. This module knows no file
format: what a role means is for exporters and backends to say. It does not sign anything: a hash
finds damage and mix-ups, not an attacker who rewrites the manifest too.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from medmo_edge.errors import ArtifactError, ExportError
from medmo_edge.staging import staging_folder

MANIFEST_NAME = "manifest.json"
SCHEMA = 1
INTENDED_USE = "research use only; not a medical device"
_MAX_MANIFEST_BYTES = 16 << 20
_HASH_BLOCK_BYTES = 4 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Count = Callable[[int], None]


class FileRecord(TypedDict):
    """One file of an artifact: lower-case hex sha256, size, and its role for the backend."""

    sha256: str
    bytes: int
    role: str


class Stamp(NamedTuple):
    """What tells a file from others of its name, and from itself before it was written to."""

    inode: int
    size: int
    modified_ns: int
    status_ns: int  # moves with a new name, owner, mode or link, too; nobody can set it back

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        """The stamp in the result of a ``stat``."""
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact is and what it was made from.

    ``model`` holds the facts a runtime needs beside the weights (ids, sizes, generation defaults);
    ``weights`` says how the numbers are stored: tensors per type, and which fell back to another.
    ``folder``, ``sha256`` and ``stamps`` are known once it was read; the stamps of all files, the
    manifest's own included, are from before their contents were looked at.
    """

    schema: int = SCHEMA
    target: str
    backend: str
    model: dict[str, Any]
    coords: str
    preprocessing: dict[str, Any]
    files: dict[str, FileRecord]
    weights: dict[str, Any]
    checkpoint: dict[str, Any]
    calibration: dict[str, Any] | None
    exporter: dict[str, Any]
    certificate: dict[str, Any] | None
    licence: str
    intended_use: str = INTENDED_USE
    folder: Path = field(default=Path(), compare=False)
    sha256: str = field(default="", compare=False)
    stamps: dict[str, Stamp] = field(default_factory=dict, compare=False, repr=False)

    def path_of(self, role: str) -> Path:
        """Path of the file with this role. Errors: ArtifactError when there is none."""
        for name, record in self.files.items():
            if record["role"] == role:
                return self.folder / name
        raise ArtifactError(f"{self.folder / MANIFEST_NAME} names no {role!r} file: export again")

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Files that the block reads are those that ``read_manifest`` checked.

        Errors: ArtifactError when not, also in the place of one that may have come of it.
        """
        try:
            yield
        except ArtifactError:
            self._require_unchanged()
            raise
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        for name, stamp in self.stamps.items():
            path = self.folder / name
            try:
                found = Stamp.of(os.stat(path))
            except OSError:
                found = None
            if found != stamp:
                raise ArtifactError(
                    f"{path} was changed on disk while the artifact was loaded: try again when "
                    "nobody writes there"
                )

    def moved_to(self, folder: Path) -> "Manifest":
        """The same manifest after its folder was renamed."""
        return replace(self, folder=folder, stamps={})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without what is only known to the reader."""
        return {name: getattr(self, name) for name in _TYPES}


# JSON type of every field that is written; also the order in the file.
_TYPES: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "target": (str,),
    "backend": (str,),
    "model": (dict,),
    "coords": (str,),
    "preprocessing": (dict,),
    "files": (dict,),
    "weights": (dict,),
    "checkpoint": (dict,),
    "calibration": (dict, type(None)),
    "exporter": (dict,),
    "certificate": (dict, type(None)),
    "licence": (str,),
    "intended_use": (str,),
}
assert set(_TYPES) == {each.name for each in fields(Manifest)} - {"folder", "sha256", "stamps"}


def read_manifest(folder: str | Path, *, verify: bool = True) -> Manifest:
    """The manifest of an artifact folder, after checking that its files are there and unchanged.

    Sizes are always compared; ``verify`` also hashes every file. Errors: ArtifactError, one line.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    content, stamp = _manifest_bytes(folder, path)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}): export again") from error
    _check_values(path, values)
    stamps = {MANIFEST_NAME: stamp}
    for name, record in values["files"].items():
        stamps[name] = _check_file(folder, name, record, verify=verify)
    return Manifest(
        **{name: values[name] for name in _TYPES},
        folder=folder,
        sha256=hashlib.sha256(content).hexdigest(),
        stamps=stamps,
    )


def _manifest_bytes(folder: Path, path: Path) -> tuple[bytes, Stamp]:
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            content = file.read(_MAX_MANIFEST_BYTES + 1)
    except NotADirectoryError:
        raise ArtifactError(
            f"{folder} is a file: give the artifact folder written by export"
        ) from None
    except FileNotFoundError:
        if not folder.exists():
            raise ArtifactError(
                f"{folder} does not exist: give the artifact folder written by export"
            ) from None
        raise ArtifactError(
            f"{folder} has no {MANIFEST_NAME}: its export did not finish, or it is no artifact"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes: it is no manifest")
    return content, stamp


def _check_values(path: Path, values: Any) -> None:
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} does not hold a JSON object: export again")
    schema = values.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ArtifactError(
            f"{path} has schema {schema!r}, this version reads {SCHEMA}: "
            "use the medmo-edge that wrote it, or export again"
        )
    for name, types in _TYPES.items():
        if name not in values or not isinstance(values[name], types):
            raise ArtifactError(f"{path}: {name!r} is missing or of a wrong type: export again")
    for name, record in values["files"].items():
        _check_record(path, name, record)


def _check_record(path: Path, name: str, record: Any) -> None:
    expected = {"sha256": str, "bytes": int, "role": str}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), kind) for key, kind in expected.items()
    ):
        raise ArtifactError(f"{path}: file {name!r} lacks sha256, bytes or role: export again")
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise ArtifactError(f"{path}: {name!r} is not a plain file name: do not use this artifact")


def _check_file(folder: Path, name: str, record: FileRecord, *, verify: bool) -> Stamp:
    path = folder / name
    try:
        if path.resolve().parent != folder.resolve():
            raise ArtifactError(f"{path} leads out of its folder: do not use this artifact")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: copy the artifact again")
        stamp = Stamp.of(path.stat())
        if stamp.size != record["bytes"]:
            raise ArtifactError(
                f"{path} has {stamp.size} bytes, its manifest says {record['bytes']}: "
                "copy the artifact again"
            )
        if verify and sha256_file(path) != record["sha256"]:
            raise ArtifactError(
                f"{path} was changed: {stamp.size} bytes as in its manifest, but another sha256; "
                "copy the artifact again"
            )
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return stamp


def sha256_file(path: Path, count: Count | None = None) -> str:
    """Hex sha256 of a file, streamed; ``count`` receives the number of bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if count:
                count(len(block))
    return digest.hexdigest()


def record_file(path: Path, role: str, count: Count | None = None) -> FileRecord:
    """The manifest's record of a finished file."""
    return FileRecord(sha256=sha256_file(path, count), bytes=path.stat().st_size, role=role)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json by atomic rename, after every other file; returns it as read back."""
    content = (json.dumps(manifest.to_dict(), indent=2, allow_nan=False) + "\n").encode()
    draft = folder / f".{MANIFEST_NAME}.draft"
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST_NAME)
    return Manifest(
        **json.loads(content), folder=folder, sha256=hashlib.sha256(content).hexdigest()
    )


@contextmanager
def new_artifact(output: Path) -> Iterator[Path]:
    """A staging folder that becomes ``output`` when the block ends with a manifest in it.

    On any error or Ctrl-C the staging folder is removed and nothing is left. Errors: ExportError
    when ``output`` exists, cannot be made, or the disk is full.
    """
    _refuse_existing(output)
    try:
        with staging_folder(output) as staging:
            yield staging
            _publish(staging, output)
    except OSError as error:
        raise _write_error(error, output) from error


def _publish(staging: Path, output: Path) -> None:
    if not (staging / MANIFEST_NAME).is_file():
        raise RuntimeError(f"{staging} has no {MANIFEST_NAME}: nothing to publish")
    _refuse_existing(output)  # again: a long export leaves time for somebody else's
    staging.rename(output)


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise ExportError(f"{output} exists already: choose another output folder or remove it")


def _write_error(error: OSError, output: Path) -> ExportError:
    if error.errno in _DISK_FULL:
        return ExportError(f"disk full while writing {output}: free some space; nothing was left")
    where = f" ({error.filename})" if error.filename else ""
    return ExportError(f"cannot make {output}: {error.strerror or error}{where}")
