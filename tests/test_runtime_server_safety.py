"""What an attacker on this machine, a careless proxy or a full disk would try."""

import base64
import logging
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import TOKEN, Served, png, served

from medmo_edge.runtime.server_files import remove_abandoned

OPEN = ("/", "/viewer.css", "/viewer.js", "/healthz", "/openapi.json")
GUARDED = ("/metrics", "/v1/models", "/v1/studies", "/v1/studies/x", "/nowhere", "/v1/../metrics")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("fake:yes", max_upload_bytes=1 << 20, max_body_bytes=1 << 19) as running:
        yield running


def test_everything_that_holds_data_needs_the_token(server: Served) -> None:
    import httpx2

    with httpx2.Client(base_url=server.url) as stranger:
        assert [stranger.get(path).status_code for path in OPEN] == [200] * len(OPEN)
        for path in GUARDED:
            assert stranger.get(path).status_code == 401, path
        for wrong in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}"):
            reply = stranger.get("/v1/models", headers={"Authorization": wrong})
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        odd = [(b"Authorization", b"Bearer \xff")]
        assert stranger.get("/v1/models", headers=odd).status_code == 401
        assert stranger.post("/v1/studies", files={"file": png()}).status_code == 401


def test_the_token_is_compared_in_constant_time() -> None:
    from medmo_edge.runtime.server_app import _same

    token = "k" * 64
    guesses = ("x" * 64, "k" * 63 + "x", "k")

    def seconds(guess: str) -> float:
        start = time.perf_counter_ns()
        for _ in range(200):
            _same(guess, token)
        return float(time.perf_counter_ns() - start)

    rounds = [[seconds(guess) for guess in guesses] for _ in range(60)]
    best = [statistics.median(sorted(column)[:20]) for column in zip(*rounds, strict=True)]
    assert max(best) < 1.25 * min(best)  # a comparison letter by letter is tens of times apart


def test_other_host_names_are_refused(server: Served) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil", ""):
        reply = server.client.get("/v1/models", headers={"Host": host})
        assert reply.status_code == 421, host
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200, host


def test_no_page_of_another_origin_is_let_in(server: Served) -> None:
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    asked = server.client.options("/v1/chat/completions", headers=origin)
    assert asked.status_code == 405
    for reply in (asked, server.client.get("/", headers=origin), server.client.get("/v1/models")):
        assert "access-control-allow-origin" not in reply.headers
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_the_page_needs_nothing_from_outside() -> None:
    folder = Path(__file__).parent.parent / "runtime"
    files = sorted(folder.glob("viewer*.*"))
    assert len(files) >= 5
    for path in files:
        text = path.read_text(encoding="utf-8")
        outside = text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in outside and "https:" not in outside and "//cdn" not in outside, path
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "document.write",
            "eval(",
            "insertAdjacentHTML",
        ):
            assert forbidden not in text, (path, forbidden)


@pytest.mark.parametrize(
    "path",
    [
        "/..%2f..%2fetc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/viewer.css/../../errors.py",
        "/viewer.py",
        "/serve.py",
        "//etc/passwd",
        "/v1/studies/..%2f..%2fetc%2fpasswd",
        "/v1/studies/%00/images/0",
        "/v1/studies/x/images/..%2f0",
        "/v1/models/..%2f..%2fetc",
    ],
)
def test_paths_lead_nowhere(server: Served, path: str) -> None:
    reply = server.client.get(path)
    assert reply.status_code == 404 and reply.json()["error"]["code"] in (
        "not_found",
        "model_not_found",
    )


def test_bodies_are_bounded_with_and_without_a_length(server: Served) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b"x" * 65536

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = server.client.post("/v1/studies", files={"file": b"x" * (2 << 20)})
    assert reply.status_code == 413
    import httpx2

    for path, headers in (
        ("/v1/chat/completions", {"Content-Type": "application/json"}),
        ("/v1/studies", form),
    ):
        try:
            status = server.client.post(path, content=endless(), headers=headers).status_code
        except httpx2.TransportError:
            continue  # the server answered and hung up before all was sent
        assert status in (400, 413)
    assert server.client.get("/healthz").status_code == 200


def _png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99)))


def _dicom_bomb() -> bytes:
    """A deflated data set that grows a thousandfold, to 128 MB."""

    def element(tag: bytes, vr: bytes, value: bytes) -> bytes:
        return tag + vr + struct.pack("<H", len(value)) + value

    meta = element(b"\2\0\x10\0", b"UI", b"1.2.840.10008.1.2.1.99")
    head = element(b"\2\0\0\0", b"UL", struct.pack("<I", len(meta)))
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = b"\x09\0\x10\x10OB\0\0" + struct.pack("<I", 2**27)
    body = deflater.compress(zeros) + deflater.compress(bytes(2**27)) + deflater.flush()
    return bytes(128) + b"DICM" + head + meta + body


def test_bombs_cost_one_line_and_no_memory(server: Served) -> None:
    bombs = {
        "pixels": (_png_header(60_000, 60_000), "more pixels than the limit"),
        "lies": (_png_header(4000, 4000), "damaged"),
        "deflated": (_dicom_bomb(), "grows beyond the limit"),
    }
    server.client.post("/v1/studies", files={"file": bombs["lies"][0]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (content, words) in bombs.items():
        assert len(content) < 1 << 20
        reply = server.client.post("/v1/studies", files={"file": content})
        assert reply.status_code == 400 and words in reply.text, (name, reply.text)
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        part = {"type": "image_url", "image_url": {"url": url}}
        text = {"type": "text", "text": "Is it?"}
        body = {"model": "fake", "messages": [{"role": "user", "content": [part, text]}]}
        reply = server.client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400 and words in reply.text, (name, reply.text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert server.client.get("/v1/studies").json()["data"] == []


def test_logs_metrics_and_errors_hold_nothing_of_the_patient(
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret, forged = "DOE^JANE", "x\r\n2026-01-01 INFO forged line"
    with served("fake:yes") as running, caplog.at_level(logging.DEBUG):
        client, logger = running.client, logging.getLogger("medmo_edge.server")
        logger.addHandler(caplog.handler)
        logger.setLevel(logging.INFO)
        files = {"file": (f"{secret}.png", png())}
        made = client.post("/v1/studies", files=files).json()
        client.post(
            f"/v1/studies/{made['id']}/ask", json={"question": f"Who is {secret}? {forged}"}
        )
        broken = client.post(
            "/v1/studies", files={"file": (secret, b"\x89PNG\r\n\x1a\n" + secret.encode())}
        )
        client.get(f"/v1/studies/{secret}")
        client.get(f"/v1/models/{secret}%0d%0aforged")
        client.get(
            "/v1/studies", headers={"X-Forged": secret, "User-Agent": forged.replace("\r\n", " ")}
        )
        client.post("/v1/chat/completions", json={"model": secret, "messages": [], "user": secret})
        metrics = client.get("/metrics").text
        logger.removeHandler(caplog.handler)
    assert broken.status_code == 400 and "DOE" not in broken.text
    assert "DOE" not in metrics and "study-" not in metrics
    client_side = ("asyncio", "httpcore", "httpx")
    lines = [
        record.getMessage() for record in caplog.records if not record.name.startswith(client_side)
    ]
    assert len(lines) >= 8 and not any("DOE" in line or "forged" in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_a_bug_is_reported_without_its_message(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served("fake:yes") as running:

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("DOE^JANE")

        monkeypatch.setattr(running.state.session, "study", fail)
        logger = logging.getLogger("medmo_edge.server")
        logger.addHandler(caplog.handler)
        body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
        reply = running.client.post("/v1/chat/completions", json=body)
        logger.removeHandler(caplog.handler)
        assert reply.status_code == 500 and "DOE" not in reply.text
        assert "RuntimeError" in caplog.text and "DOE" not in caplog.text
        assert "medmo_edge_unexpected_errors_total 1.0" in running.client.get("/metrics").text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/studies"])
def test_a_client_that_leaves_during_its_upload_is_no_bug(path: str) -> None:
    media = "application/json" if "chat" in path else "multipart/form-data; boundary=b"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: {media}\r\nContent-Length: 1000\r\n\r\n"
    )
    with served("fake:yes") as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"--b\r\n")
        counted = f'medmo_edge_requests_total{{route="POST {path}",status="499"}} 1.0'
        start = time.monotonic()
        while counted not in (metrics := running.client.get("/metrics").text):
            assert time.monotonic() - start < 5, metrics
            time.sleep(0.01)
        assert "medmo_edge_unexpected_errors_total 0.0" in metrics


def test_a_swapped_artifact_is_not_answered_from(
    tiny_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    logging.getLogger("medmo_edge.server").addHandler(caplog.handler)

    copy = tmp_path / "artifact"
    shutil.copytree(tiny_artifact, copy)
    with served(copy) as running:
        body = {
            "model": "medmo-edge",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 2,
        }
        assert running.client.post("/v1/chat/completions", json=body).status_code == 200
        os.replace(shutil.copy(copy / "manifest.json", tmp_path / "new"), copy / "manifest.json")
        reply = running.client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 503 and "start the server again" in reply.text
        assert reply.headers["x-should-retry"] == "false"
        assert running.client.get("/healthz").status_code == 503
        assert running.client.post("/v1/chat/completions", json=body).status_code == 503
    logging.getLogger("medmo_edge.server").removeHandler(caplog.handler)
    records = {id(record): record.getMessage() for record in caplog.records}
    assert sum("artifact was changed on disk" in line for line in records.values()) == 1


def test_what_a_killed_server_left_behind_is_removed(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    dead = tmp_path / f"medmo-edge-serve-{int(ended.stdout)}-x"
    alive = tmp_path / f"medmo-edge-serve-{os.getpid()}-x"
    other = tmp_path / "medmo-edge-serve-notes"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    remove_abandoned(tmp_path)
    assert not dead.exists() and alive.exists() and other.exists()


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=8)


# Starlette leaves the spooled part of a form that ends too early to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=15)
@given(FLIPS, st.integers(0, 1 << 16))
def test_flipped_bytes_never_break_the_server(
    server: Served, flips: list[tuple[int, int]], cut: int
) -> None:
    body = b'{"model":"fake","messages":[{"role":"user","content":"Is it?"}],"seed":3,"stop":["a"]}'
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + png(16, 16)
        + b'\r\n--b\r\nContent-Disposition: form-data; name="window"\r\n\r\nauto\r\n--b--\r\n'
    )
    for path, media, whole in (
        ("/v1/chat/completions", "application/json", body),
        ("/v1/studies", "multipart/form-data; boundary=b", form),
    ):
        damaged = bytearray(whole)
        for place, change in flips:
            damaged[place % len(damaged)] ^= change
        for content in (bytes(damaged), whole[: cut % len(whole)]):
            reply = server.client.post(path, content=content, headers={"Content-Type": media})
            assert reply.status_code < 500, reply.text
            if reply.status_code == 201:
                server.client.delete(f"/v1/studies/{reply.json()['id']}")
