"""The DICOM node under hostile peers, too many of them, and an artifact that is swapped."""

import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from node_bench import Bench, WriteSource, until

from medmo_edge.runtime.node import Node
from medmo_edge.runtime.node_status import format_status, node_status

pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
pydicom = pytest.importorskip("pydicom")

# pynetdicom leaves the socket of a refused connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)


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
