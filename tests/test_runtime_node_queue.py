"""Queue, spool and log of a DICOM node: states, crashes between two steps, and hostile values."""

import io
import sqlite3
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medmo_edge.errors import NodeError
from medmo_edge.runtime.node_log import NodeLog, hashed, safe
from medmo_edge.runtime.node_queue import Outgoing, Queue
from medmo_edge.runtime.node_spool import INCOMING, RESULTS, Spool


def _outgoing(*destinations: str, uid: str = "r1") -> Outgoing:
    return Outgoing(uid=uid, kind="sr", file=f"{uid}.dcm", destinations=destinations)


def test_the_life_of_an_instance_survives_reopening(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    queue = Queue(path)
    assert queue.accept("a", "CT1", "a.dcm", 5, now=1.0) == "new"
    assert queue.accept("a", "CT1", "b.dcm", 5, now=2.0) == "duplicate"
    queue.close()
    queue = Queue(path)
    instance = queue.begin(now=3.0)
    assert instance is not None and (instance.file, instance.attempts) == ("a.dcm", 0)
    queue.close()  # a crash during the answer: it is begun again, and that is counted
    queue = Queue(path)
    again = queue.begin(now=3.0)
    assert again is not None and again.attempts == 1
    queue.answered(again.id, [_outgoing("pacs", "web")], now=4.0)
    assert queue.begin(now=5.0) is None and queue.waiting() == 0
    assert queue.accept("a", "CT1", "c.dcm", 5, now=6.0) == "duplicate"
    assert queue.accept("r1", "PACS", "r.dcm", 5, now=6.0) == "own"
    (pacs,), (web,) = queue.due("pacs", 7.0, 9), queue.due("web", 7.0, 9)
    assert queue.files() == (set(), {"r1.dcm"})
    assert not queue.sent(pacs, now=8.0)
    queue.not_sent(web, "no answer", next_try=20.0)
    assert queue.due("web", 19.0, 9) == []
    (web,) = queue.due("web", 20.0, 9)
    assert web.attempts == 1 and queue.sent(web, now=21.0)
    assert queue.files() == (set(), set())
    queue.forget(before=30.0)
    assert queue.accept("a", "CT1", "d.dcm", 5, now=31.0) == "new"
    queue.close()


def test_ignored_and_set_aside_instances_are_tried_again_when_sent_again(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite")
    for uid in ("a", "b"):
        queue.accept(uid, "CT1", f"{uid}.dcm", 1, now=1.0)
    first = queue.begin(now=2.0)
    second = queue.begin(now=2.0)
    assert first is not None and second is not None
    assert (first.uid, second.uid) == ("a", "b")  # the least begun comes first
    queue.ignored(first.id, now=3.0)
    queue.quarantined(second.id, "why", now=3.0)
    assert queue.quarantine_files() == ["b.dcm"] and queue.files()[0] == {"b.dcm"}
    assert queue.accept("a", "CT1", "a2.dcm", 1, now=4.0) == "again"
    assert queue.requeue(now=5.0) == (1, 0)
    assert {queue.begin(now=6.0).file for _ in range(2)} == {"a2.dcm", "b.dcm"}  # type: ignore[union-attr]
    queue.close()


def test_postponing_does_not_count_as_an_attempt(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite")
    queue.accept("a", "CT1", "a.dcm", 1, now=1.0)
    instance = queue.begin(now=1.0)
    assert instance is not None
    queue.postponed(instance.id, 10.0, "disk full")
    assert queue.begin(now=9.0) is None
    again = queue.begin(now=10.0)
    assert again is not None and again.attempts == 0
    queue.close()


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    queue = Queue(path)
    queue.accept("a", "CT1", "a.dcm", 1, now=1.0)
    pages = queue._db.execute("PRAGMA page_count").fetchone()[0]
    queue._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for number in range(10_000):
            queue.accept(f"instance {number}", "CT1", "x" * 500, 1, now=1.0)
    queue._db.execute("PRAGMA max_page_count = 100000")
    assert queue.accept(f"instance {number}", "CT1", "x.dcm", 1, now=1.0) == "new"
    assert queue.waiting() == number + 2
    queue.close()


def test_a_file_that_is_no_queue_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(NodeError, match="cannot be used as queue"):
        Queue(path)


def test_spool_files_are_whole_private_and_cleaned(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    path = spool.write(INCOMING, "a.dcm", [b"12", memoryview(b"34")])
    assert path.read_bytes() == b"1234" and path.stat().st_mode & 0o777 == 0o600
    assert spool.folder.stat().st_mode & 0o777 == 0o700

    def breaks() -> object:
        yield b"12"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        spool.write(INCOMING, "b.dcm", breaks())  # type: ignore[arg-type]
    assert [each.name for each in path.parent.iterdir()] == ["a.dcm"]
    spool.write(RESULTS, "r.dcm", [b""])
    assert spool.clean(RESULTS, keep=set()) == 1 and spool.clean(INCOMING, {"a.dcm"}) == 0


def test_one_node_per_spool(tmp_path: Path) -> None:
    first, second = Spool(tmp_path), Spool(tmp_path)
    first.lock()
    assert second.is_locked()
    with pytest.raises(NodeError, match="in use by another node"):
        second.lock()
    first.unlock()
    assert not second.is_locked()
    second.lock()
    second.unlock()


@given(st.text())
@example("CT1\n2026-01-01T00:00:00Z stored id=forged")
@example("\x1b[2J")
def test_no_value_can_forge_a_line_of_the_log(text: str) -> None:
    stream = io.StringIO()
    NodeLog(stream).event("rejected", calling=text)
    line = stream.getvalue()
    assert line.count("\n") == 1 and line.endswith("\n")
    assert all(" " <= character <= "~" for character in line[:-1])
    assert line.count("=") == 1 and line.count(" ") == 2
    assert len(safe(text)) <= 80


def test_instances_are_named_by_a_hash() -> None:
    assert hashed("1.2.3") == hashed("1.2.3") != hashed("1.2.4")
    assert len(hashed("1.2.3")) == 32 and "1.2.3" not in hashed("1.2.3")
