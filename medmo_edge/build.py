"""The ``build`` command: engines of a TensorRT artifact for this machine, or a check without one.

Joins what building needs from both sides: ``medmo_edge.runtime.trt_make`` compiles,
``medmo_edge.export.onnx_cut`` cuts graphs down for the check. It neither exports nor runs anything.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from medmo_edge.errors import ArtifactError, UsageError
from medmo_edge.export.onnx_cut import cut_layers
from medmo_edge.manifest import Manifest, read_manifest
from medmo_edge.progress import StageProgress, step_bar
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.trt_engines import FOLDER as ENGINES
from medmo_edge.runtime.trt_engines import Engines, census, key_of, outdated, read_record
from medmo_edge.runtime.trt_make import (
    Place,
    check_graphs,
    make_engines,
    place_here,
    place_of,
)

CUT_LAYERS = 2
_GRAPHS = ("vision", "decoder")


def run_build(
    *,
    artifact: Path,
    output: Path | None,
    check: bool,
    sms: tuple[int, ...],
    rtx: bool,
    level: int,
    force: bool,
    as_json: bool,
) -> None:
    """The command. Errors: UsageError, ArtifactError, BackendUnavailable."""
    manifest = read_manifest(artifact)
    if manifest.backend != "trt":
        raise UsageError(
            f"{artifact} is a {manifest.target} artifact, which needs no engines: it runs as it is"
        )
    if check:
        _run_check(manifest, sms, output, as_json=as_json)
        return
    if len(sms) > 1:
        raise UsageError("engines are built for one GPU at a time: give --sm once")
    place = _place(manifest, sms[0] if sms else None, rtx=rtx)
    with step_bar() as progress:
        engines, is_new = build(manifest, place, output, level=level, force=force, report=progress)
    if as_json:
        click.echo(json.dumps(_to_dict(engines, is_new), indent=2))
    else:
        click.echo(_describe(engines, is_new))


def _place(manifest: Manifest, sm: int | None, *, rtx: bool) -> Place:
    if sm is None:
        return place_here(manifest, probe(), rtx=rtx)
    if not rtx:
        raise UsageError(
            "--sm is for --check and --rtx: full TensorRT builds for the GPU that is here"
        )
    return place_of(manifest, sm)


def build(
    manifest: Manifest,
    place: Place,
    output: Path | None,
    *,
    level: int = 3,
    force: bool = False,
    report: StageProgress,
) -> tuple[Engines, bool]:
    """The engines of an artifact for ``place``, and whether they had to be built."""
    folder = (output or manifest.folder / ENGINES) / key_of(place.library, place.sm)
    known = None if force else _existing(folder)
    if known is not None and outdated(known, manifest, place.library) is None:
        return known, False
    try:
        engines = make_engines(
            manifest, probe(), place=place, output=output, level=level, progress=report
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted, nothing was left: run the same command again") from (
            None
        )
    return engines, True


def _existing(folder: Path) -> Engines | None:
    try:
        return Engines(folder=folder, record=read_record(folder))
    except ArtifactError:  # none, or one of another time: built anew
        return None


def _to_dict(engines: Engines, is_new: bool) -> dict[str, Any]:
    return {"path": str(engines.folder), "built": is_new, **asdict(engines.record)}


def _describe(engines: Engines, is_new: bool) -> str:
    record = engines.record
    parts = [
        f"{name} {record.files[f'{name}.engine'] / 1e6:.1f} MB {record.seconds[name]:.1f} s"
        for name in _GRAPHS
    ]
    word = "built" if is_new else "there already (--force builds again)"
    return (
        f"engines: {engines.folder}  {record.describe} ({record.gpu})  {', '.join(parts)}  {word}"
    )


def _run_check(
    manifest: Manifest, sms: Sequence[int], output: Path | None, *, as_json: bool
) -> None:
    if output is not None:
        raise UsageError("--check keeps no engines: leave -o out")
    if not sms:
        raise UsageError("--check needs a GPU to compile for, e.g. --sm 89 (repeat it for more)")
    with step_bar() as progress:
        results = check(manifest, sms, progress)
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for result in results:
        click.echo(_describe_check(result))


def check(
    manifest: Manifest, sms: Sequence[int], progress: StageProgress, layers: int = CUT_LAYERS
) -> list[dict[str, Any]]:
    """Compile the artifact's graphs, cut to a few layers, for each compute capability."""
    for sm in sms:
        place_of(manifest, sm)  # says no before anything is cut
    with tempfile.TemporaryDirectory(prefix="medmo-edge-") as folder:
        graphs = {}
        for name in _GRAPHS:
            graphs[name] = Path(folder) / f"{name}.onnx"
            cut_layers(manifest.path_of(name), graphs[name], layers)
        return [check_graphs(manifest, graphs, sm, progress) for sm in sms]


def _describe_check(result: dict[str, Any]) -> str:
    layers = census({"decoder": result["decoder"]["layers"]})
    counts = ", ".join(f"{count} {name.lower()}" for name, count in layers.items() if count)
    seconds = sum(result[name]["seconds"] for name in _GRAPHS)
    return (
        f"compiles: {result['target']} for SM {result['sm']} with {result['library']} "
        f"{result['version']} ({CUT_LAYERS} layers, {seconds:.1f} s; {counts})"
    )
