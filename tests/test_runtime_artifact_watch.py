"""An artifact that is replaced, rewritten or removed under a running session is noticed."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.manifest import read_manifest
from medmo_edge.runtime.artifact_watch import ArtifactWatch
from medmo_edge.runtime.session import load


def _replace(path: Path) -> None:
    copy = path.with_suffix(".new")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def _rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")


@pytest.mark.parametrize("change", [_replace, _rewrite, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_any_changed_file_is_seen_and_not_forgotten(
    change: Callable[[Path], None], name: str, tiny_artifact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(tiny_artifact, folder)
    other = read_manifest(tiny_artifact, verify=False)
    watch = ArtifactWatch((other, read_manifest(folder, verify=False)))
    assert not watch.changed()
    kept = tmp_path / "kept"
    os.link(folder / name, kept)
    before = os.stat(kept)
    change(folder / name)
    assert watch.changed()
    os.replace(kept, folder / name)
    os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert watch.changed()  # what was answered meanwhile stays in doubt


def test_the_fake_model_has_no_files() -> None:
    with load("fake:yes") as session:
        assert not ArtifactWatch.of(session).changed()


def test_a_vision_tower_beside_is_watched_too(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    shutil.copytree(tiny_artifact, folder)
    with load("fake:yes") as session:
        tower = read_manifest(folder, verify=False)
        session.backend.tower_manifest = tower  # type: ignore[attr-defined]
        watch = ArtifactWatch.of(session)
        assert not watch.changed()
        _rewrite(folder / "tokenizer.json")
        assert watch.changed()


def test_no_answer_that_was_written_during_the_change_is_given() -> None:
    pytest.importorskip("prometheus_client", reason="needs the serve extra")
    from medmo_edge.runtime.server_engine import Engine
    from medmo_edge.runtime.server_metrics import Metrics
    from medmo_edge.runtime.server_problems import Problem

    changed, begun = threading.Event(), threading.Event()
    asked: list[str] = []

    def check() -> None:
        if changed.is_set():
            raise Problem(503, "the artifact was changed", "artifact_changed")

    with load("fake:yes") as session:

        def start(seconds: float, cancel: threading.Event) -> Any:
            asked.append("")
            begun.set()
            changed.wait(10)
            return session.study([]).stream("Go on.", timeout_seconds=seconds, cancel=cancel)

        engine = Engine(Metrics(), max_waiting=2, check=check)

        async def run() -> None:
            jobs = [engine.submit("a", start, 20) for _ in range(2)]
            await asyncio.to_thread(begun.wait)
            changed.set()
            for job in jobs:
                with pytest.raises(Problem, match="artifact was changed"):
                    await job.finish()

        asyncio.run(run())
        engine.close(5)
    assert len(asked) == 1  # the one that waited was not even begun
