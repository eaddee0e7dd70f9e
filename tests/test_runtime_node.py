"""The DICOM node against DCMTK's echoscu, storescu and storescp."""

import errno
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from node_bench import ANSWER, Bench, WriteSource, tool, until

from medmo_edge.errors import NodeError
from medmo_edge.runtime.node import Node, requeue
from medmo_edge.runtime.node_config import read_node_config
from medmo_edge.runtime.node_log import NodeLog, hashed
from medmo_edge.runtime.node_status import format_status, node_status
from medmo_edge.runtime.session import load

pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
pydicom = pytest.importorskip("pydicom")

# pynetdicom leaves the socket of a refused connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)


def test_from_the_modality_to_the_archive(bench: Bench, write_source: WriteSource) -> None:
    ct = write_source("ct", bench.folder / "ct.dcm", PatientName="Secret^Name")
    us = write_source("us-frames", bench.folder / "us.dcm")
    mr = write_source("mr", bench.folder / "mr.dcm")
    bench.receive()
    node = bench.start()
    echo = [tool("echoscu"), "-aet", "CT1", "-aec", "MEDMO", "127.0.0.1", str(node.port)]
    assert subprocess.run(echo, capture_output=True).returncode == 0
    assert bench.send(node, ct, us, mr) == 0
    assert bench.send(node, ct) == 0  # sent twice, answered once
    until(lambda: bench.counts()["sent"] == 8 and bench.counts()["ignored"] == 1)
    results = [pydicom.dcmread(path) for path in bench.got.iterdir()]
    assert len(results) == 8 and len({result.SOPInstanceUID for result in results}) == 8
    source = pydicom.dcmread(ct)
    of_ct = [result for result in results if result.StudyInstanceUID == source.StudyInstanceUID]
    assert len(of_ct) == 4
    assert {str(result.PatientName) for result in of_ct} == {"Secret^Name"}
    spool = bench.folder / "spool"
    assert not list((spool / "incoming").iterdir()) and not list((spool / "results").iterdir())
    text = bench.log.getvalue()
    assert "verdict=duplicate" in text and hashed(source.SOPInstanceUID) in text
    for private in ("Secret", str(source.PatientID), str(source.SOPInstanceUID)):
        assert private not in text and private not in str(node_status(bench.config))


def test_a_result_that_comes_back_is_not_asked_again(
    bench: Bench, write_source: WriteSource
) -> None:
    bench.configure(rule="plain_sr = true")
    config = (bench.folder / "rules.toml").read_text()
    config = config.replace('modality = ["CT", "US"]', "").replace('["sr", "gsps"]', '["sc"]')
    (bench.folder / "rules.toml").write_text(config)
    bench.config = read_node_config(bench.folder / "rules.toml")
    bench.receive()
    node = bench.start()
    assert bench.send(node, write_source("ct", bench.folder / "ct.dcm")) == 0
    until(lambda: bench.counts()["sent"] == 2)
    assert bench.send(node, *bench.got.iterdir(), calling="PACS") == 0
    assert bench.log.getvalue().count("verdict=own") == 2 and bench.counts()["answered"] == 1


def test_strangers_and_unknown_objects_are_refused(bench: Bench, write_source: WriteSource) -> None:
    node = bench.start()
    ct = write_source("ct", bench.folder / "ct.dcm")
    plan = Path(pydicom.__file__).parent / "data" / "test_files" / "rtplan.dcm"
    assert bench.send(node, ct, calling="STRANGER") != 0
    assert bench.send(node, ct, called="OTHER") != 0
    assert bench.send(node, plan) != 0
    assert bench.counts()["waiting"] == 0 and "rejected calling=STRANGER" in bench.log.getvalue()
    with pytest.raises(NodeError, match="in use by another node"):
        Node(bench.config, load(ANSWER))
    bench.configure(node=f"host = '127.0.0.1'\nmax_waiting = {node.port}")
    taken = (bench.folder / "rules.toml").read_text().replace("port = 0", f"port = {node.port}")
    (bench.folder / "rules.toml").write_text(taken.replace('"spool"', '"other"'))
    second = Node(read_node_config(bench.folder / "rules.toml"), load(ANSWER), NodeLog(bench.log))
    with pytest.raises(NodeError, match=f"cannot listen on 127.0.0.1 port {node.port}"):
        second.start()
    second.stop()


def test_what_cannot_be_processed_is_set_aside_and_the_rest_goes_on(
    bench: Bench, write_source: WriteSource
) -> None:
    bench.receive()
    node = bench.start()
    no_study = write_source(
        "ct", bench.folder / "a.dcm", StudyInstanceUID=None, SOPInstanceUID="1.2.3"
    )
    broken = write_source("ct", bench.folder / "b.dcm", Rows=4000, SOPInstanceUID="1.2.4")
    good = write_source("ct", bench.folder / "c.dcm", SOPInstanceUID="1.2.5")
    assert bench.send(node, no_study, broken, good) == 0
    until(lambda: bench.counts()["sent"] == 4)
    status = node_status(bench.config)
    reasons = {one["id"]: one["reason"] for one in status["quarantine"]}
    assert reasons == {
        hashed("1.2.3"): "ResultError in rule locate",
        hashed("1.2.4"): "its picture cannot be read",
    }
    assert "2 in quarantine" in format_status(status)
    whys = sorted((bench.folder / "spool" / "quarantine").glob("*.why.txt"))
    assert len(whys) == 2 and any("truncated" in why.read_text() for why in whys)
    repaired = write_source("ct", bench.folder / "b.dcm", SOPInstanceUID="1.2.4")
    assert bench.send(node, repaired) == 0
    until(lambda: bench.counts()["sent"] == 8)
    assert bench.counts()["quarantined"] == 1


def test_another_instance_than_was_announced_is_set_aside(
    bench: Bench, write_source: WriteSource
) -> None:
    node = bench.start()
    ct = write_source("ct", bench.folder / "ct.dcm")
    node._spool.write("incoming", "a.dcm", [ct.read_bytes()])
    assert node._queue.accept(hashed("1.2.3"), "CT1", "a.dcm", 1, time.time()) == "new"
    until(lambda: bench.counts()["quarantined"] == 1)
    (one,) = node_status(bench.config)["quarantine"]
    assert one["reason"] == "it was sent under another UID than its data set has"


def test_an_instance_that_ends_the_process_is_set_aside_in_the_end(
    bench: Bench, write_source: WriteSource
) -> None:
    ct = write_source("ct", bench.folder / "ct.dcm")
    node = Node(bench.config, load(ANSWER), NodeLog(bench.log))
    bench.stack.callback(node.stop)
    node._spool.write("incoming", "a.dcm", [ct.read_bytes()])
    node._queue.accept(hashed(str(pydicom.dcmread(ct).SOPInstanceUID)), "CT1", "a.dcm", 1, 1.0)
    for _ in range(5):
        assert node._queue.begin(time.time()) is not None  # and then the power goes
    node.start()
    until(lambda: bench.counts()["quarantined"] == 1)
    (one,) = node_status(bench.config)["quarantine"]
    assert one["reason"] == "the node ended 5 times while it answered this"


def test_a_dead_destination_gets_everything_when_it_is_back(
    bench: Bench, write_source: WriteSource
) -> None:
    node = bench.start()
    assert bench.send(node, write_source("ct", bench.folder / "ct.dcm")) == 0
    until(lambda: "reason=not_reachable" in bench.log.getvalue())
    assert bench.counts()["unsent"] == 4
    trouble = node_status(bench.config)["destinations"]["pacs"]
    assert trouble["trouble"] == "not reachable" and trouble["tries"] >= 1
    bench.receive()
    until(lambda: bench.counts()["sent"] == 4)
    assert len(list(bench.got.iterdir())) == 4


def test_a_given_up_delivery_can_be_requeued(bench: Bench, write_source: WriteSource) -> None:
    bench.configure(node="give_up_after_hours = 0")
    node = bench.start()
    assert bench.send(node, write_source("ct", bench.folder / "ct.dcm")) == 0
    until(lambda: bench.counts()["failed"] == 4)
    with pytest.raises(NodeError, match="in use"):
        requeue(bench.config)
    node.stop()
    bench.configure()
    assert requeue(bench.config) == (0, 4)
    bench.receive()
    bench.start()
    until(lambda: bench.counts()["sent"] == 4)


def test_a_restart_makes_the_same_objects(bench: Bench, write_source: WriteSource) -> None:
    """A crash between making results and recording them: they are made again, as the same."""
    made: list[set[str]] = []
    for _ in range(2):
        node = bench.start()
        assert bench.send(node, write_source("ct", bench.folder / "ct.dcm")) == 0
        until(lambda: bench.counts()["answered"] == 1)
        node.stop()
        made.append({path.name for path in (bench.folder / "spool" / "results").iterdir()})
        shutil.rmtree(bench.folder / "spool")
    assert made[0] == made[1] and len(made[0]) == 4


def test_a_full_disk_is_refused_before_it_is_promised(
    bench: Bench, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.receive()
    node = bench.start()
    ct = write_source("ct", bench.folder / "ct.dcm")
    with monkeypatch.context() as patch:
        patch.setattr(node._spool, "free_bytes", lambda: 0)
        assert bench.send(node, ct) != 0

    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(node._spool, "write", full)
        assert bench.send(node, ct) != 0
    assert bench.counts()["waiting"] == 0 and bench.log.getvalue().count("refused") == 2
    assert bench.send(node, ct) == 0
    until(lambda: bench.counts()["sent"] == 4)


def test_a_disk_that_is_full_during_the_answer_postpones_it(
    bench: Bench, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmo_edge.runtime.node_work.POSTPONE_SECONDS", 0.2)
    bench.receive()
    node = bench.start()
    plain, left = node._spool.write, [2]

    def write(area: str, name: str, parts: Any) -> Path:
        if area == "results" and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(area, name, parts)

    monkeypatch.setattr(node._spool, "write", write)
    assert bench.send(node, write_source("ct", bench.folder / "ct.dcm")) == 0
    until(lambda: bench.counts()["sent"] == 4)
    assert bench.log.getvalue().count("postponed") == 2
