"""Destinations of a DICOM node: STOW-RS against an HTTP server, TLS both ways with DCMTK."""

import email.parser
import http.server
import io
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from node_bench import connects, free_port, tool, until

from medmo_edge.errors import NodeError
from medmo_edge.runtime.node_config import Destination, Tls
from medmo_edge.runtime.node_peers import Sent, send_files

pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)
DUPLICATE = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [273]}}]}}
OUT_OF_MEMORY = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [42752]}}]}}


@pytest.fixture
def objects(tmp_path: Path) -> list[Path]:
    """Three small DICOM files; the kind does not matter to a sender."""
    source = Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small.dcm"
    paths = []
    for number in range(3):
        dataset = pydicom.dcmread(source)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        paths.append(tmp_path / f"{number}.dcm")
        dataset.save_as(paths[-1])
    return paths


@contextmanager
def _archive(
    replies: list[tuple[int, Any]], tls: Tls | None = None
) -> Iterator[tuple[str, list[tuple[Any, bytes]]]]:
    """An HTTP server that answers in order; (its address, requests as (headers, part)).

    With ``tls`` it speaks HTTPS and wants the client's certificate.
    """
    seen: list[tuple[Any, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message: Any = email.parser.BytesParser().parsebytes(head + body)
            (part,) = message.get_payload()
            seen.append((self.headers, part.get_payload(decode=True)))
            status, reply = replies.pop(0)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    class Quiet(http.server.HTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A refused handshake is what a test wanted."""

    server = Quiet(("127.0.0.1", 0), Handler)
    if tls is not None and tls.certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        context.load_verify_locations(tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        kind = "http" if tls is None else "https"
        yield f"{kind}://127.0.0.1:{server.server_port}/dicom-web/studies", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_stow_sends_each_file_whole(objects: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVE_TOKEN", "abc")
    with _archive([(200, {}), (202, OUT_OF_MEMORY), (409, DUPLICATE)]) as (url, seen):
        place = Destination(name="web", kind="stow-rs", url=url, token_env="ARCHIVE_TOKEN")
        results = list(send_files(place, objects))
    assert results == [Sent(True), Sent(False, "failure reason A700"), Sent(True)]
    assert [part for _, part in seen] == [path.read_bytes() for path in objects]
    assert all(headers["Authorization"] == "Bearer abc" for headers, _ in seen)
    assert 'type="application/dicom"' in seen[0][0]["Content-Type"]


@pytest.mark.parametrize("status", [302, 401, 500, 503])
def test_stow_says_what_was_refused_and_follows_nobody(status: int, objects: list[Path]) -> None:
    with _archive([(status, {"text": "PATIENT^NAME"})]) as (url, _):
        place = Destination(name="web", kind="stow-rs", url=url)
        (sent,) = send_files(place, objects[:1])
    assert sent == Sent(False, f"HTTP status {status}")


def test_nobody_there(objects: list[Path]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        web = Destination(name="web", kind="stow-rs", url=f"http://127.0.0.1:{port}/studies")
        pacs = Destination(
            name="pacs",
            kind="c-store",
            host="127.0.0.1",
            port=port,
            ae_title="PACS",
            calling_ae_title="MEDMO",
        )
        for place in (web, pacs):
            assert list(send_files(place, objects)) == [Sent(False, "not reachable", False)]


def _certificate(folder: Path) -> Tls:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return Tls(certificate=certificate, key=key, ca=certificate)


@contextmanager
def _storescp(folder: Path, *options: str) -> Iterator[int]:
    port = free_port()
    folder.mkdir(exist_ok=True)
    command = [tool("storescp"), "-q", "-od", str(folder), *options, str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: connects(port))
        yield port
    finally:
        process.terminate()
        process.wait()


def _pacs(port: int, tls: Tls | None = None, seconds: float = 10) -> Destination:
    return Destination(
        name="pacs",
        kind="c-store",
        host="127.0.0.1",
        port=port,
        ae_title="PACS",
        calling_ae_title="MEDMO",
        tls=tls,
        timeout_seconds=seconds,
    )


@pytest.mark.parametrize("options", [(), ("+xi",)])
def test_c_store_in_either_encoding(
    options: tuple[str, ...], objects: list[Path], tmp_path: Path
) -> None:
    with _storescp(tmp_path / "got", *options) as port:
        assert list(send_files(_pacs(port), objects)) == [Sent(True)] * 3
    got = [pydicom.dcmread(path) for path in (tmp_path / "got").iterdir()]
    assert {str(one.SOPInstanceUID) for one in got} == {"1.2.3.0", "1.2.3.1", "1.2.3.2"}
    assert all(one.PixelData == pydicom.dcmread(objects[0]).PixelData for one in got)


def test_c_store_over_tls_checks_the_archive(objects: list[Path], tmp_path: Path) -> None:
    tls = _certificate(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    stranger = _certificate(other)
    options = ("+tls", str(tls.key), str(tls.certificate), "+cf", str(tls.certificate))
    with _storescp(tmp_path / "got", *options) as port:
        assert list(send_files(_pacs(port, tls), objects)) == [Sent(True)] * 3
        (refused,) = send_files(_pacs(port, stranger, seconds=3), objects)
        assert not refused.delivered and not refused.reachable


def test_stow_over_tls_checks_both_ends(objects: list[Path], tmp_path: Path) -> None:
    tls = _certificate(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    stranger = _certificate(other)
    with _archive([(200, {})] * 3, tls) as (url, seen):
        good = Destination(name="web", kind="stow-rs", url=url, tls=tls, timeout_seconds=5)
        assert list(send_files(good, objects)) == [Sent(True)] * 3
        for wrong in (stranger, replace(stranger, ca=tls.ca), None):  # theirs, ours, neither
            (refused,) = send_files(replace(good, tls=wrong), objects)
            assert not refused.delivered and not refused.reachable
    assert len(seen) == 3


def test_a_failing_archive_is_asked_again_until_it_has_everything_once(
    tmp_path: Path, write_source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmo_edge.runtime.node import Node
    from medmo_edge.runtime.node_config import read_node_config
    from medmo_edge.runtime.node_log import NodeLog, hashed
    from medmo_edge.runtime.node_status import node_status
    from medmo_edge.runtime.session import load

    monkeypatch.setenv("MEDMO_EDGE_DICOM_IN_PROCESS", "1")
    source = write_source("ct", tmp_path / "ct.dcm")
    uid = str(pydicom.dcmread(source).SOPInstanceUID)
    log = io.StringIO()
    with _archive([(503, {}), (200, OUT_OF_MEMORY), (200, {})]) as (url, seen):
        (tmp_path / "rules.toml").write_text(
            '[node]\nae_title = "MEDMO"\nspool = "spool"\nport = 0\naccept_from = ["CT1"]\n'
            "min_free_mb = 1\nretry_seconds = 0.1\nmax_retry_seconds = 0.2\n"
            f'[destinations.web]\nkind = "stow-rs"\nurl = "{url}"\n'
            '[[rules]]\nname = "r"\nquestions = "What?"\nresults = "sr"\nsend_to = "web"\n'
        )
        config = read_node_config(tmp_path / "rules.toml")
        with Node(config, load("fake:yes"), NodeLog(log)) as node:
            node._spool.write("incoming", "a.dcm", [source.read_bytes()])
            node._queue.accept(hashed(uid), "CT1", "a.dcm", 1, time.time())
            deadline = time.monotonic() + 20
            while node_status(config)["destinations"]["web"]["sent"] < 1:
                assert time.monotonic() < deadline, log.getvalue()
                time.sleep(0.05)
    assert "HTTP_status_503" in log.getvalue() and "failure_reason_A700" in log.getvalue()
    assert len(seen) == 3 and len({part for _, part in seen}) == 1  # the same object each time


def test_a_refusing_and_a_silent_archive(objects: list[Path], tmp_path: Path) -> None:
    with _storescp(tmp_path / "a", "--refuse") as port:
        assert list(send_files(_pacs(port), objects)) == [
            Sent(False, "association rejected", False)
        ]
    with _storescp(tmp_path / "b", "--abort-after") as port:
        assert list(send_files(_pacs(port), objects)) == [Sent(False, "no answer", False)]


def test_the_node_over_tls_wants_the_peers_certificate(tmp_path: Path) -> None:
    from medmo_edge.runtime.node import Node
    from medmo_edge.runtime.node_config import read_node_config
    from medmo_edge.runtime.node_log import NodeLog
    from medmo_edge.runtime.session import load

    program = tool("echoscu")
    tls = _certificate(tmp_path)
    (tmp_path / "rules.toml").write_text(
        '[node]\nae_title = "MEDMO"\nspool = "spool"\nport = 0\naccept_from = ["CT1"]\n'
        'tls = {certificate = "certificate.pem", key = "key.pem", ca = "certificate.pem"}\n'
        '[destinations.web]\nkind = "stow-rs"\nurl = "http://127.0.0.1:1/studies"\n'
        '[[rules]]\nname = "r"\nquestions = "What?"\nresults = "sr"\nsend_to = "web"\n'
    )
    config = read_node_config(tmp_path / "rules.toml")
    (tmp_path / "no.pem").write_text("not a certificate")
    wrong = Destination(name="x", kind="stow-rs", url="http://a", tls=Tls(ca=tmp_path / "no.pem"))
    with pytest.raises(NodeError, match=r"\[destinations.x.tls\]: the PEM files cannot be used"):
        Node(replace(config, destinations={"x": wrong}), load("fake:yes"))
    with Node(config, load("fake:yes"), NodeLog(io.StringIO())) as node:
        echo = [program, "-aet", "CT1", "-aec", "MEDMO"]
        place = ["127.0.0.1", str(node.port)]
        known = ["+tls", str(tls.key), str(tls.certificate), "+cf", str(tls.certificate)]
        stalled = socket.create_connection(("127.0.0.1", node.port))  # never says hello
        assert subprocess.run([*echo, *known, *place], capture_output=True).returncode == 0
        anonymous = ["+tla", "+cf", str(tls.certificate)]
        assert subprocess.run([*echo, *anonymous, *place], capture_output=True).returncode != 0
        assert subprocess.run(
            [*echo, "-to", "2", "-ta", "2", *place], capture_output=True
        ).returncode
        stalled.close()
