"""Damaged requests to a running ``medmo-edge serve``: no crash, no status from 500 on.

    python benchmarks/server_fuzz.py --minutes 30 [--seed N] [FILE.dcm ...]

Valid requests of every kind (chat JSON, multipart uploads of DICOM and PNG, questions about a
study, result addresses, headers) are changed: bytes flipped, cut, doubled, numbers made huge,
strings replaced by hostile ones. The server is a process of its own with the fake model, so time
goes into parsing. After every hundred requests a plain question must be answered. Not covered: the
model's own parsers of weights.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from medmo_edge.dicom_write import write_radiograph
from medmo_edge.phantoms import draw

TOKEN = "a-token-for-the-benchmark"
HOSTILE = (
    "", "\x00", "../../../../etc/passwd", "<|im_end|>", "%s%n", "a" * 70_000, "\u202e\ud7ff",
    "{{7*7}}", "'; DROP TABLE x; --", "\r\nSet-Cookie: a=b", "NaN", "1e999", "-0", "data:,",
    "data:image/png;base64,AAAA", "data:application/dicom;base64,RElDTQ==", "http://127.0.0.1/",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, 1e-308, 0.5)

Request = tuple[str, str, bytes, dict[str, str]]


class Fuzzer:
    """Makes requests from a seed; knows one study of the server."""

    def __init__(self, seed: int, files: list[bytes], study: str) -> None:
        self.random = random.Random(seed)
        self.files = files
        self.study = study

    def request(self) -> Request:
        """(method, path, body, headers), damaged in one or more places."""
        kinds: tuple[Callable[[], Request], ...] = (
            self.chat,
            self.ask,
            self.upload,
            self.upload,
            self.address,
        )
        method, path, body, headers = self.random.choice(kinds)()
        if self.random.random() < 0.4:
            body = self.damage(body)
        if self.random.random() < 0.1:
            headers["Content-Type"] = self.random.choice(("", "text/plain", "multipart/form-data"))
        return method, path, body, headers

    def chat(self) -> Request:
        """A chat with an image, in which some values are replaced."""
        data = self.random.choice(self.files)
        data = self.damage(data) if self.random.random() < 0.7 else data
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "Is it?"},
        ]
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        body = {
            "model": "fake",
            "messages": [
                {"role": "system", "content": "Short."},
                {"role": "user", "content": content},
            ],
            "max_tokens": 5,
            "temperature": 0.5,
            "seed": 7,
            "stop": ["x"],
            "stream": self.random.random() < 0.3,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": schema},
            },
        }
        if self.random.random() < 0.7:
            del body["response_format"]
        return self._json("/v1/chat/completions", body)

    def ask(self) -> Request:
        """A question about the study."""
        view = {
            "index": 0,
            "frame": 0,
            "window": self.random.choice(("1,2", "lung", "0", "auto", None)),
        }
        body = {"question": "Is it?", "images": [view], "max_tokens": 5}
        return self._json(f"/v1/studies/{self.study}/ask", body)

    def _json(self, path: str, body: dict[str, Any]) -> Request:
        for _ in range(self.random.choice((0, 1, 1, 2, 4))):
            self._replace(body)
        headers = {"Content-Type": "application/json"}
        return "POST", path, json.dumps(body).encode(), headers

    def _replace(self, value: Any) -> None:
        """Replace one value somewhere inside ``value`` by another of any type."""
        while isinstance(value, dict | list) and value:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = self.random.choice(keys)
            if not isinstance(value[key], dict | list) or self.random.random() < 0.2:
                value[key] = self.random.choice((*HOSTILE, *NUMBERS, None, True, [], {}, [[]] * 50))
                return
            value = value[key]

    def upload(self) -> Request:
        """A form with one damaged file and perhaps a window and frame."""
        data = self.damage(self.random.choice(self.files))
        parts = [("file", data)]
        if self.random.random() < 0.3:
            parts.append(
                ("window", self.random.choice(HOSTILE[:9]).encode("utf-8", "replace")[:200])
            )
        if self.random.random() < 0.3:
            parts.append(("frame", str(self.random.choice(NUMBERS)).encode()))
        body = b""
        for name, content in parts:
            kind = f'; filename="{self.random.choice(("a", "../a", ""))}"' if name == "file" else ""
            head = f'--b\r\nContent-Disposition: form-data; name="{name}"{kind}\r\n\r\n'
            body += head.encode() + content + b"\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        return "POST", "/v1/studies", body + b"--b--\r\n", headers

    def address(self) -> Request:
        """Any address below the study, with hostile parts."""
        parts = [
            self.study,
            "images",
            "answers",
            "0",
            "facts",
            "sr",
            "overlay",
            "%00",
            "..%2f",
            "%ff",
        ]
        path = "/v1/studies/" + "/".join(self.random.sample(parts, self.random.randint(1, 4)))
        query = self.random.choice(
            ("", "?frame=99999999999", "?window=%ff", "?view=x", "?frame=1&x=2")
        )
        method = self.random.choice(("GET", "GET", "GET", "DELETE", "POST", "PUT", "HEAD"))
        if method == "DELETE" and path.rstrip("/").endswith(self.study):
            method = "GET"  # the study is still needed
        return method, path + query, b"", {}

    def damage(self, data: bytes) -> bytes:
        """``data`` with flipped, cut, doubled or inserted bytes; headers are hit more often."""
        changed = bytearray(data or b"x")
        for _ in range(self.random.choice((1, 1, 2, 4, 16))):
            reach = len(changed) if self.random.random() < 0.5 else min(len(changed), 2048)
            place = self.random.randrange(reach)
            way = self.random.randrange(5)
            if way < 2:
                changed[place] ^= 1 << self.random.randrange(8)
            elif way == 2:
                changed[place : place + 4] = self.random.choice((b"\xff" * 4, b"\0" * 4))
            elif way == 3:
                del changed[place : place + self.random.randint(1, 64)]
            else:
                changed[place:place] = changed[place : place + self.random.randint(1, 64)]
            changed = changed or bytearray(b"x")
        return bytes(changed)


def main() -> None:
    """Fuzz for the given time; exit 1 at the first finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="more DICOM files or pictures")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = [*_own_files(), *(path.read_bytes() for path in arguments.files)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = _start(port)
    try:
        statuses, failure = fuzz(port, files, arguments.seed, 60 * arguments.minutes)
    finally:
        server.terminate()
        code = server.wait(60)
    print(f"{sum(statuses.values())} requests: {dict(sorted(statuses.items()))}")
    print(f"the server ended with code {code}")
    if failure or code != 0:
        sys.exit(failure or f"exit code {code}")


def fuzz(port: int, files: list[bytes], seed: int, seconds: float) -> tuple[Counter[int], str]:
    """Send requests for ``seconds``: counts by status, and what was found ("" for nothing)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    fuzzer = Fuzzer(seed, files, _study(connection, files[0]))
    statuses: Counter[int] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        request = fuzzer.request()
        status, reply = _send(connection, request)
        statuses[status] += 1
        if status >= 500:
            return statuses, f"status {status} for {request[:2]}, seed {seed}: {reply[:300]!r}"
        if status == 201:
            _send(connection, ("DELETE", f"/v1/studies/{json.loads(reply)['id']}", b"", {}))
        if sum(statuses.values()) % 100 == 0:
            content = [{"role": "user", "content": "Well?"}]
            plain = json.dumps({"model": "fake", "messages": content}).encode()
            body = "/v1/chat/completions", plain, {"Content-Type": "application/json"}
            if _send(connection, ("POST", *body))[0] != 200:
                return statuses, f"a plain question failed after {sum(statuses.values())} requests"
    return statuses, ""


def _send(connection: http.client.HTTPConnection, request: Request) -> tuple[int, bytes]:
    """(status, body); a connection that the server closed is opened again once."""
    method, path, body, headers = request
    for attempt in range(2):
        try:
            connection.request(method, path, body, {**headers, "Authorization": f"Bearer {TOKEN}"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (http.client.HTTPException, ConnectionError):
            connection.close()
            if attempt:
                raise
    raise AssertionError("unreachable")


def _study(connection: http.client.HTTPConnection, file: bytes) -> str:
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + file
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    status, reply = _send(connection, ("POST", "/v1/studies", body + b"\r\n--b--\r\n", headers))
    if status != 201:
        sys.exit(f"the first upload failed: {reply!r}")
    return str(json.loads(reply)["id"])


def _own_files() -> list[bytes]:
    """A drawn DICOM radiograph, an 8-bit PNG and a 16-bit one."""
    pixels = draw(1, size=(96, 112)).pixels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        write_radiograph(path, pixels)
        files = [path.read_bytes()]
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.astype("uint16") * 200)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def _start(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "medmo_edge", "serve", 'fake:{"a": 1}', "--port", str(port)]
    environment = {**os.environ, "MEDMO_EDGE_TOKEN": TOKEN}
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0 and server.poll() is None:
                return server
        time.sleep(0.1)
    sys.exit("the server did not start")


if __name__ == "__main__":
    main()
