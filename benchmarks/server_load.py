"""Load on ``medmo-edge serve``: many clients at once, for minutes; and llama.cpp's own server.

    python benchmarks/server_load.py                          # nano, 8 clients, 10 minutes
    python benchmarks/server_load.py --quick                  # 30 seconds
    python benchmarks/server_load.py --peer build/bin/llama-server --clients 1 --minutes 1

Each client streams, one question after the other, over a new connection each: llama-server closes
its own after a stream. Half of the questions are about the client's one image again and again, half
about a new image each. Printed: time to the first text, time to the whole answer, answers and
pieces of text per second, errors, processor time per answer (which other programs on the machine
disturb least), and the server's memory over time. With ``--peer`` the same requests go to
llama-server on the same GGUF files, greedily and for the same number of tokens; ``--parallel`` and
``--slots`` say how many answers each gives at once. The two take turns in rounds, so that both see
the same machine, and the other one idles meanwhile. Not measured: answers' contents
(benchmarks/greedy_agreement.py).
"""

import argparse
import base64
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from medmo_edge.export.export import export_checkpoint
from medmo_edge.manifest import read_manifest
from medmo_edge.phantoms import draw
from medmo_edge.preprocess import Preprocessing

TOKEN = "a-token-for-the-benchmark"
QUESTIONS = ("Is there a nodule?", "Locate the nodule.", "Describe this medical image.")
KINDS = ("same image", "new image")
NEW_TOKENS = 24
ROUNDS = 6  # of each server, when there are two


@dataclass
class Tally:
    """What the clients saw; seconds per kind of question."""

    first: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    whole: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    pieces: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    processor: float = 0.0
    memory: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main() -> None:
    """Run the benchmark and print its tables."""
    arguments = _arguments()
    minutes = 0.5 if arguments.quick else arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        artifact = _artifact(arguments.artifact, Path(folder) / "artifact")
        with ExitStack() as stack:
            servers = {"medmo-edge serve": stack.enter_context(_ours(artifact, arguments))}
            if arguments.peer:
                peer = _peer(arguments.peer, artifact, arguments)
                servers["llama-server"] = stack.enter_context(peer)
            tallies = _take_turns(servers, arguments.clients, 60 * minutes)
    for name, tally in tallies.items():
        _print(name, tally, arguments.clients)
    if arguments.peer:
        _compare(*tallies.values())
    errors = [error for tally in tallies.values() for error in tally.errors]
    if errors:
        sys.exit(f"{len(errors)} errors, the first: {errors[0]}")


def _take_turns(
    servers: dict[str, tuple[int, int]], clients: int, seconds: float
) -> dict[str, Tally]:
    """Measure each server (port, process) for ``seconds`` in all; what its clients saw."""
    tallies = {name: Tally() for name in servers}
    rounds = ROUNDS if len(servers) > 1 else 1
    for number in range(rounds):
        order = list(servers.items())
        for name, (port, process) in order if number % 2 == 0 else order[::-1]:
            _measure(tallies[name], port, process, clients, seconds / rounds, number)
    return tallies


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("artifact", nargs="?", default="nano", help="artifact folder, or nano")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--quick", action="store_true", help="30 seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=4, help="answers at once of ours")
    parser.add_argument("--slots", type=int, default=1, help="answers at once of llama-server")
    parser.add_argument("--peer", type=Path, help="a llama-server binary")
    return parser.parse_args()


def _artifact(name: str, folder: Path) -> Path:
    if name != "nano":
        return Path(name)
    export_checkpoint("nano", "gguf-q8_0", folder)
    return folder


@contextmanager
def _ours(artifact: Path, arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    port = _free_port()
    command = [sys.executable, "-m", "medmo_edge", "serve", str(artifact), "--port", str(port)]
    command += ["--threads", str(arguments.threads), "--parallel", str(arguments.parallel)]
    environment = {**os.environ, "MEDMO_EDGE_TOKEN": TOKEN}
    with _running(command, port, environment) as process:
        yield port, process


@contextmanager
def _peer(binary: Path, artifact: Path, arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """llama-server with the same files, threads and limits."""
    manifest, port = read_manifest(artifact), _free_port()
    if manifest.backend != "llamacpp":
        sys.exit(f"{artifact} is {manifest.target}: llama-server needs a gguf-* artifact")
    pixels = Preprocessing.from_dict(manifest.preprocessing)
    limits = (pixels.min_pixels, pixels.max_pixels)
    tokens = [str(limit // pixels.factor**2) for limit in limits]
    command = [str(binary), "-m", str(manifest.path_of("language")), "--mmproj"]
    command += [str(manifest.path_of("vision")), "--port", str(port), "--host", "127.0.0.1"]
    command += ["-t", str(arguments.threads), "-tb", str(arguments.threads), "--jinja"]
    command += ["-np", str(arguments.slots), "-c", str(2048 * arguments.slots), "--api-key", TOKEN]
    command += ["--image-min-tokens", tokens[0], "--image-max-tokens", tokens[1], "--no-webui"]
    with _running(command, port, dict(os.environ)) as process:
        yield port, process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _running(command: Sequence[str], port: int, environment: dict[str, str]) -> Iterator[int]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
    try:
        _wait(port, process)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {TOKEN}"})
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"{process.args!r} did not start")


def _measure(
    tally: Tally, port: int, process: int, clients: int, seconds: float, turn: int
) -> None:
    """Add what ``clients`` see of a server in ``seconds``; images are new in every ``turn``."""
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=_client, args=(port, turn * clients + number, end, tally))
        for number in range(clients)
    ]
    started, used = time.monotonic(), _processor_seconds(process)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        tally.memory.append(_resident_mb(process))
        threads[0].join(min(5.0, seconds / 10))
    tally.seconds += time.monotonic() - started
    tally.processor += _processor_seconds(process) - used


def _client(port: int, number: int, end: float, tally: Tally) -> None:
    """Ask in turn about the client's own image and about one that nobody has sent before."""
    own, count = _image(number), 0
    while time.monotonic() < end:
        kind = KINDS[count // len(QUESTIONS) % 2]
        image = own if kind == KINDS[0] else _image((number + 1 << 24) + count)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            first, whole, pieces = _ask(connection, image, QUESTIONS[count % len(QUESTIONS)])
        except (OSError, ValueError, http.client.HTTPException) as error:
            with tally.lock:
                tally.errors.append(f"{type(error).__name__}: {error}")
            continue
        finally:
            connection.close()
            count += 1
        with tally.lock:
            tally.first[kind].append(first)
            tally.whole[kind].append(whole)
            tally.pieces += pieces


def _image(seed: int) -> str:
    """A drawn radiograph as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(draw(seed, size=(256, 288)).pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ask(
    connection: http.client.HTTPConnection, image: str, question: str
) -> tuple[float, float, int]:
    """Seconds to the first text and to the end, and the number of pieces of text."""
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": "medmo-edge",
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    reply = connection.getresponse()
    if reply.status != 200:
        raise ValueError(f"status {reply.status}: {reply.read()[:200]!r}")
    first, pieces = 0.0, 0
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(str(event["error"]))
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            pieces += 1
            first = first or time.perf_counter() - started
    if not pieces:
        raise ValueError("an answer without text")
    return first, time.perf_counter() - started, pieces


def _resident_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _print(name: str, tally: Tally, clients: int) -> None:
    answers, seconds, memory = _answers(tally), tally.seconds, tally.memory
    print(f"\n{name}: {clients} clients, {seconds:.0f} s, {answers} answers, ", end="")
    print(f"{answers / seconds:.1f} answers/s, {tally.pieces / seconds:.0f} pieces/s, ", end="")
    print(f"{len(tally.errors)} errors, {_per_answer(tally):.1f} ms of processor per answer")
    print("| question | count | first text p50 | p95 | answer p50 | p95 |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        row = [*_quantiles(tally.first[kind]), *_quantiles(tally.whole[kind])]
        cells = " | ".join(f"{1000 * value:.0f} ms" for value in row)
        print(f"| {kind} | {len(tally.whole[kind])} | {cells} |")
    if len(memory) > 4:
        quarter = len(memory) // 4
        early, late = (
            statistics.mean(memory[quarter : 2 * quarter]),
            statistics.mean(memory[-quarter:]),
        )
        print(f"memory: {early:.1f} MB in the second quarter, {late:.1f} MB in the last")


def _per_answer(tally: Tally) -> float:
    """Milliseconds that the server's process computed for one answer."""
    return 1000 * tally.processor / max(1, _answers(tally))


def _answers(tally: Tally) -> int:
    return sum(len(each) for each in tally.whole.values())


def _quantiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values or [float("nan")])[0], (values or [float("nan")])[0]
    cuts = statistics.quantiles(values, n=20)
    return statistics.median(values), cuts[18]


def _compare(ours: Tally, theirs: Tally) -> None:
    """Ratios above 1 mean that ours is better."""
    print("\n| llama-server / ours | first text p50 | answer p50 |")
    print("|---|---|---|")
    for kind in KINDS:
        first = _quantiles(theirs.first[kind])[0] / _quantiles(ours.first[kind])[0]
        whole = _quantiles(theirs.whole[kind])[0] / _quantiles(ours.whole[kind])[0]
        print(f"| {kind} | {first:.2f} | {whole:.2f} |")
    ratio = (_answers(ours) / ours.seconds) / (_answers(theirs) / theirs.seconds)
    print(f"answers per second, ours / llama-server: {ratio:.2f}")
    print(f"processor time, llama-server / ours: {_per_answer(theirs) / _per_answer(ours):.2f}")


if __name__ == "__main__":
    main()
