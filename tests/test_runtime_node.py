"""The DICOM node against DCMTK's echoscu, storescu and storescp, and a hostile socket."""

import errno
import io
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

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
WriteSource = Callable[..., Path]
ANSWER = "fake:nodule <box>[[100, 200, 300, 400]]</box>"
RULES = """
[node]
ae_title = "MEDMO"
spool = "spool"
port = 0
accept_from = ["CT1", "PACS"]
min_free_mb = 1
retry_seconds = 0.1
max_retry_seconds = 0.2
{node}
[destinations.pacs]
kind = "c-store"
host = "127.0.0.1"
port = {port}
ae_title = "PACS"
{destination}
[[rules]]
name = "locate"
modality = ["CT", "US"]
questions = ["Locate the nodule.", "Describe it."]
results = ["sr", "gsps"]
send_to = ["pacs"]
{rule}
"""


def tool(name: str) -> str:
    """Path of a DCMTK program, or a skip."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(done: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for ``done``, or fail."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


class Bench:
    """A node in this process, its log, and the folder of a storescp that may run or not."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.port = free_port()
        self.got = folder / "got"
        self.got.mkdir()
        self.log = io.StringIO()

    def configure(self, *, node: str = "", destination: str = "", rule: str = "") -> None:
        """Write rules.toml."""
        text = RULES.format(port=self.port, node=node, destination=destination, rule=rule)
        (self.folder / "rules.toml").write_text(text)
        self.config = read_node_config(self.folder / "rules.toml")

    def start(self, answer: str = ANSWER) -> Node:
        """A running node."""
        node = Node(self.config, load(answer), NodeLog(self.log))
        node.start()
        self.stack.callback(node.stop)
        return node

    def receive(self, *options: str) -> None:
        """Start the destination."""
        command = [tool("storescp"), "-q", "+uf", "-od", str(self.got), *options, str(self.port)]
        peer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.stack.callback(peer.wait)
        self.stack.callback(peer.terminate)

    def send(self, node: Node, *paths: Path, calling: str = "CT1", called: str = "MEDMO") -> int:
        """Exit code of storescu."""
        command = [tool("storescu"), "-aet", calling, "-aec", called, "127.0.0.1", str(node.port)]
        return subprocess.run([*command, *map(str, paths)], capture_output=True).returncode

    def counts(self) -> dict[str, int]:
        """States of instances and deliveries."""
        status = node_status(self.config)
        destination = status["destinations"]["pacs"]
        return {
            **status["instances"],
            "sent": destination["sent"],
            "failed": destination["failed"],
            "unsent": destination["waiting"],
        }


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Decodes in this process: a child per image would be most of the time."""
    monkeypatch.setenv("MEDMO_EDGE_DICOM_IN_PROCESS", "1")
    with ExitStack() as stack:
        made = Bench(tmp_path, stack)
        made.configure()
        yield made


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


def test_an_artifact_that_is_swapped_halts_the_node_and_loses_nothing(
    bench: Bench, write_source: WriteSource, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = bench.folder / "artifact"
    shutil.copytree(tiny_artifact, artifact)
    bench.configure(rule="max_new_tokens = 2")
    node = bench.start(str(artifact))
    plain = node._session.study

    def swap(*frames: Any) -> Any:
        (artifact / "manifest.json").rename(bench.folder / "old.json")
        shutil.copy(bench.folder / "old.json", artifact / "manifest.json")
        return plain(*frames)

    monkeypatch.setattr(node._session, "study", swap)
    assert bench.send(node, write_source("ct", bench.folder / "a.dcm", SOPInstanceUID="1.2.3")) == 0
    until(lambda: " halted " in bench.log.getvalue())
    status = node_status(bench.config)
    assert status["instances"]["waiting"] == 1 and bench.counts()["unsent"] == 0
    assert "attention: the artifact was changed on disk" in format_status(status)
    refused = _store_status(node, write_source("ct", bench.folder / "b.dcm"))
    assert refused.Status == 0xA700 and refused.ErrorComment == "artifact changed"
    node.stop()
    monkeypatch.undo()
    monkeypatch.setenv("MEDMO_EDGE_DICOM_IN_PROCESS", "1")
    bench.start(str(artifact))
    until(lambda: bench.counts()["answered"] == 1)
    assert node_status(bench.config)["attention"] == "" and bench.counts()["unsent"] == 4


def _store_status(node: Node, path: Path) -> Any:
    """What the node answers to a C-STORE, whole."""
    from pynetdicom import AE

    dataset = pydicom.dcmread(path)
    entity = AE(ae_title="CT1")
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", node.port, ae_title="MEDMO")
    status = association.send_c_store(dataset)
    association.release()
    return status


def test_associations_are_limited(bench: Bench, write_source: WriteSource) -> None:
    from pynetdicom import AE

    bench.configure(node="max_associations = 2")
    node = bench.start()
    entity = AE(ae_title="CT1")
    entity.add_requested_context("1.2.840.10008.1.1")
    held = [
        entity.associate("127.0.0.1", node.port, ae_title="MEDMO", max_pdu=16384) for _ in range(2)
    ]
    assert all(each.is_established for each in held)
    ct = write_source("ct", bench.folder / "ct.dcm")
    assert bench.send(node, ct) != 0 and bench.counts()["waiting"] == 0
    for each in held:
        each.release()
    until(lambda: bench.send(node, ct) == 0)


def test_hostile_peers_cost_one_connection(bench: Bench, write_source: WriteSource) -> None:
    bench.configure(node="max_instance_mb = 1\ntimeout_seconds = 2")
    node = bench.start()
    with socket.create_connection(("127.0.0.1", node.port)) as peer:
        peer.settimeout(5)
        peer.sendall(struct.pack(">BBL", 1, 0, 2**31))  # a PDU of two gigabytes
        assert peer.recv(100) == b""
    with socket.create_connection(("127.0.0.1", node.port)) as peer:
        peer.settimeout(5)
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert peer.recv(100)[:1] in (b"", b"\x07")
    large = write_source("ct", bench.folder / "large.dcm", EncapsulatedDocument=bytes(3_000_000))
    assert bench.send(node, large) != 0
    assert bench.send(node, write_source("ct", bench.folder / "ct.dcm")) == 0
    until(lambda: bench.counts()["answered"] == 1)
