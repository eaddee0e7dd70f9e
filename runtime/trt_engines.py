"""Engine folders: engines of one artifact for one kind of machine, and whether they fit this one.

ARTIFACT/engines/<key>/ holds vision.engine, decoder.engine, timing.cache and, written last,
engine.json. Everything an engine is bound to (TensorRT version, GPU, system, graphs) is compared
before a library sees the file. Building is in ``trt_build``, loading in ``trt_session``.
"""

import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.device import Device, release_numbers
from medmo_edge.runtime.trt_fit import Recipe
from medmo_edge.runtime.trt_library import Library
from medmo_edge.staging import staging_folder, take_place

FOLDER, RECORD = "engines", "engine.json"
TIMING_CACHE = "timing.cache"
#: role of a graph in the manifest -> file of its engine
FILES = {"vision": "vision.engine", "decoder": "decoder.engine"}
SCHEMA = 1
#: a folder of engines for artifacts that cannot be written to
VARIABLE = "MEDMO_EDGE_ENGINES"
_GRAPH_ROLES = ("vision", "vision_data", "decoder", "decoder_data")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """What engine.json says: what the engines are bound to, and how they were made.

    ``graphs``: sha256 of the ONNX files by role; ``files``: bytes by name; ``seconds`` and
    ``layers`` (TensorRT's layer types after parsing) by graph; ``sm`` of the GPU they are for.
    """

    schema: int = SCHEMA
    target: str
    library: str
    version: str
    sm: int
    system: str
    gpu: str
    driver: str | None
    cuda_version: str | None
    graphs: dict[str, str]
    profiles: dict[str, Any]
    settings: dict[str, Any]
    files: dict[str, int]
    seconds: dict[str, float]
    layers: dict[str, dict[str, int]]
    created: str

    @property
    def describe(self) -> str:
        """What they are for, for messages."""
        return f"{self.library} {self.version}, SM {self.sm}, {self.system}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """One complete engine folder."""

    folder: Path
    record: EngineRecord

    def path_of(self, graph: str) -> Path:
        """The engine of a graph, "vision" or "decoder"."""
        return self.folder / FILES[graph]

    @property
    def nbytes(self) -> int:
        """Bytes of both engines."""
        return sum(self.record.files[name] for name in FILES.values())


def system_name() -> str:
    """Operating system and processor, as in a key: "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


def key_of(library: Library, sm: int) -> str:
    """Name of the folder, e.g. "tensorrt-10.16.1-sm89-linux-x86_64"."""
    return f"{library.name}-{library.short_version}-sm{sm}-{system_name()}"


def graph_hashes(manifest: Manifest) -> dict[str, str]:
    """sha256 of the graph files by role."""
    by_role = {record["role"]: record["sha256"] for record in manifest.files.values()}
    return {role: by_role[role] for role in _GRAPH_ROLES if role in by_role}


def folders_of(manifest: Manifest) -> list[Path]:
    """Where engines of an artifact are looked for, in this order."""
    extra = os.environ.get(VARIABLE)
    return [*([Path(extra)] if extra else []), manifest.folder / FOLDER]


@dataclass(frozen=True, slots=True)
class Search:
    """The engines that fit this machine, or why there are none."""

    found: Engines | None
    library: Library | None = None
    obstacle: str | None = None


def find_engines(manifest: Manifest, device: Device, libraries: Iterable[Library]) -> Search:
    """The first engine folder that fits this machine, by the order of ``libraries``."""
    folders = [folder for root in folders_of(manifest) for folder in _subfolders(root)]
    libraries, reasons = tuple(libraries), []
    records = []
    for folder in folders:
        try:
            records.append(Engines(folder=folder, record=read_record(folder)))
        except ArtifactError as error:
            reasons.append(str(error))
    for library in libraries:
        for engines in records:
            reason = mismatch(engines, manifest, device, library)
            if reason is None:
                return Search(engines, library)
            reasons.append(reason)
    return Search(None, obstacle=_missing(manifest, device, reasons))


def _missing(manifest: Manifest, device: Device, reasons: list[str]) -> str:
    here = f"SM {device.cuda[0].sm}" if device.cuda else "this machine"
    why = f"no engine for {here} yet"
    if reasons:
        why = f"no engine that fits this machine: {'; '.join(dict.fromkeys(reasons))}"
    return f"{why}; run `medmo-edge build {manifest.folder}` here"


def _subfolders(root: Path) -> list[Path]:
    try:
        return sorted(path.parent for path in root.glob(f"*/{RECORD}"))
    except OSError:
        return []


def mismatch(engines: Engines, manifest: Manifest, device: Device, library: Library) -> str | None:
    """Why these engines cannot be loaded here with ``library``, else None."""
    record, name = engines.record, engines.folder.name
    gpu = device.cuda[0] if device.cuda else None
    if gpu is None or record.sm != gpu.sm:
        here = f"this {gpu.name} is SM {gpu.sm}" if gpu else "here is no GPU"
        return f"{name} is for SM {record.sm} ({record.gpu}), {here}"
    return outdated(engines, manifest, library) or _driver_mismatch(record, device, name)


def outdated(engines: Engines, manifest: Manifest, library: Library) -> str | None:
    """Why these engines are not what this library would build of this artifact now, else None."""
    record, name = engines.record, engines.folder.name
    if record.library != library.name or not library.same_version(record.version):
        there, here = f"{record.library} {record.version}", f"{library.name} {library.version}"
        return f"{name} was built with {there}, here is {here}"
    if record.system != system_name():
        return f"{name} was built on {record.system}, this is {system_name()}"
    if record.graphs != graph_hashes(manifest):
        return f"{name} was built from other graphs than {manifest.folder} holds now"
    if record.profiles != Recipe.of(manifest).profiles():
        return f"{name} was built for other sizes than the manifest says now"
    return _damage(engines)


def _driver_mismatch(record: EngineRecord, device: Device, name: str) -> str | None:
    """Kernels of a newer CUDA may be missing in an older driver."""
    built, here = record.cuda_version, device.cuda_version
    if built and here and release_numbers(here, 2) < release_numbers(built, 2):
        return f"{name} was built under CUDA {built}, this driver has {here}"
    return None


def _damage(engines: Engines) -> str | None:
    for name in FILES.values():
        path = engines.folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != engines.record.files.get(name):
            return f"{path} is missing or was cut short"
    return None


def read_record(folder: Path) -> EngineRecord:
    """What engine.json says. Errors: ArtifactError when it is none of ours."""
    path = folder / RECORD
    try:
        values = json.loads(path.read_text("utf-8"))
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema {values.get('schema')!r}")
        record = EngineRecord(**{each.name: values[each.name] for each in fields(EngineRecord)})
        for name in ("graphs", "profiles", "files", "seconds", "layers"):
            if not isinstance(getattr(record, name), dict):
                raise TypeError(f"{name} is no object")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be used ({error})") from error
    return record


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write engine.json, after everything else of the folder."""
    text = json.dumps(asdict(record), indent=2, allow_nan=False) + "\n"
    with (folder / RECORD).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_engine_folder(target: Path) -> Iterator[Path]:
    """A staging folder that takes the place of ``target`` when the block ends without an error.

    Otherwise, Ctrl-C included, it is removed and ``target`` stays as it was. Errors: ArtifactError
    when the place cannot be written to.
    """
    try:
        with staging_folder(target) as staging:
            yield staging
            take_place(staging, target)
    except OSError as error:
        raise ArtifactError(
            f"cannot write engines to {target.parent}: {error.strerror or error}: choose a "
            f"folder with -o and name it in {VARIABLE}"
        ) from error


def kept_timing_cache(folders: Iterable[Path]) -> bytes:
    """The timing cache of an earlier build of the same machine, or nothing."""
    for folder in folders:
        path = folder / TIMING_CACHE
        if path.is_file():
            return path.read_bytes()
    return b""


def census(layers: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The decoder's layers that show whether TensorRT took our operators as they were meant."""
    named = ("KV_CACHE_UPDATE", "ATTENTION_INPUT", "ROTARY_EMBEDDING", "QUANTIZE", "DEQUANTIZE")
    decoder = layers.get("decoder", {})
    return {name: decoder.get(name, 0) for name in named}
