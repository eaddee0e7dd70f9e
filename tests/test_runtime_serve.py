"""``medmo-edge serve`` as a user starts and stops it: addresses, tokens, signals, exit codes."""

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.errors import MedmoError, UsageError
from medmo_edge.runtime.serve import TOKEN_VARIABLE, Address, bind, serve
from medmo_edge.runtime.server_engine import Engine, Job
from medmo_edge.runtime.server_metrics import Metrics
from medmo_edge.runtime.server_problems import Problem
from medmo_edge.runtime.session import Session, load

httpx2 = pytest.importorskip("httpx2", reason="comes with the openai client")
for needed in ("llguidance", "prometheus_client", "pydantic", "starlette", "uvicorn"):
    pytest.importorskip(needed, reason="needs the serve extra")

ASK = {"model": "fake", "messages": [{"role": "user", "content": "Go on."}]}


@contextmanager
def _serve(*arguments: str, token: str | None = None) -> Iterator[subprocess.Popen[str]]:
    environment = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
    if token is not None:
        environment[TOKEN_VARIABLE] = token
    command = [sys.executable, "-u", "-m", "medmo_edge", "serve", *arguments]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _greeting(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Stop with" in line:
            break
    return "".join(lines)


def test_a_made_up_token_a_running_answer_and_sigterm(tmp_path: Path) -> None:
    with _serve(f"fake:{'word ' * 2000}", "--port", "0") as process:
        greeting = _greeting(process)
        base = re.search(r"api: (http://127\.0\.0\.1:\d+/v1)", greeting)
        token = re.search(r"token: (\S{32,})", greeting)
        assert base and token and f"#token={token[1]}" in greeting
        assert "Research use only" in greeting
        headers = {"Authorization": f"Bearer {token[1]}"}
        body = {**ASK, "stream": True, "max_tokens": 1500}
        with httpx2.stream(
            "POST", f"{base[1]}/chat/completions", json=body, headers=headers
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)  # the answer that was running is finished
        assert rest[-1] == "" and rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
        said = [json.loads(each[6:]) for each in rest if each.startswith("data: {")]
        assert said[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_a_unix_socket_is_private_and_replaced_when_stale(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with _serve("fake:yes", "--socket", str(path), token="x" * 16) as process:
        assert f"socket: {path}" in _greeting(process)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        transport = httpx2.HTTPTransport(uds=str(path))
        headers = {"Authorization": f"Bearer {'x' * 16}"}
        with httpx2.Client(transport=transport, base_url="http://localhost") as client:
            reply = client.post("/v1/chat/completions", json=ASK, headers=headers)
            assert reply.json()["choices"][0]["message"]["content"] == "yes"
        with pytest.raises(UsageError, match="in use"):
            bind(Address(path=path))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert not path.exists()


def test_a_port_in_use_is_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        with _serve("fake:yes", "--port", taken) as process:
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and "in use: stop the other program" in errors


@pytest.mark.parametrize(
    ("artifact", "address", "token", "words"),
    [
        ("fake:yes", Address(port=0), "short", "16 or more"),
        ("fake:yes", Address(port=0), "sixteen letters and a space", "without spaces"),
        ("missing-artifact", Address(port=0), None, "missing-artifact"),
        ("fake:yes", Address(path=Path("/no/such/folder/socket")), None, "cannot listen"),
    ],
)
def test_what_cannot_start_says_why(
    artifact: str,
    address: Address,
    token: str | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    if token is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(MedmoError, match=words):
        serve(artifact, address)


# ---- the queue ----


@pytest.fixture
def engine() -> Iterator[Engine]:
    running = Engine(Metrics(), max_waiting=6)
    yield running
    running.close(5)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with load("fake:yes") as opened:
        yield opened


def _hold(session: Session, gate: threading.Event, order: list[str], name: str) -> Any:
    def start(seconds: float, cancel: threading.Event) -> Any:
        order.append(name)
        gate.wait(10)
        return session.study([]).stream("Go on.", timeout_seconds=seconds, cancel=cancel)

    return start


def test_lines_of_different_clients_take_turns(engine: Engine, session: Session) -> None:
    order: list[str] = []
    gate = threading.Event()

    async def run() -> None:
        jobs = [engine.submit("first", _hold(session, gate, order, "first"), 20)]
        while not engine.running:
            await asyncio.sleep(0.001)
        for name in ("a", "a", "a", "b", "c"):
            jobs.append(engine.submit(name, _hold(session, gate, order, name), 20))
        gate.set()
        for job in jobs:
            assert (await job.finish())[0].text == "yes"

    asyncio.run(run())
    assert order == ["first", "a", "b", "c", "a", "a"]


def test_full_stopping_and_too_late(engine: Engine, session: Session) -> None:
    gate, order = threading.Event(), list[str]()

    async def run() -> None:
        first = engine.submit("x", _hold(session, gate, order, "x"), 20)
        while not engine.running:
            await asyncio.sleep(0.001)
        late = engine.submit("late", _hold(session, gate, order, "late"), 1e-9)
        waiting = [engine.submit("x", _hold(session, gate, order, "x"), 20) for _ in range(5)]
        with pytest.raises(Problem, match="waiting already") as full:
            engine.submit("y", _hold(session, gate, order, "y"), 20)
        assert full.value.status == 429
        gone = Job(_hold(session, gate, order, "gone"), 20)
        gone.cancelled.set()
        engine.stop()
        for job in (late, *waiting):
            with pytest.raises(Problem, match="stopping") as refused:
                await job.finish()
            assert refused.value.status == 503
        with pytest.raises(Problem, match="stopping"):
            engine.submit("y", _hold(session, gate, order, "y"), 20)
        gate.set()
        assert (await first.finish())[0].text == "yes"  # the running one was let finish

    asyncio.run(run())
    assert order == ["x"]


def test_closing_cancels_an_answer_that_does_not_end(session: Session) -> None:
    engine, begun = Engine(Metrics(), max_waiting=1), threading.Event()

    def start(seconds: float, cancel: threading.Event) -> Any:
        begun.set()
        cancel.wait(30)
        return session.study([]).stream("Go on.", timeout_seconds=seconds, cancel=cancel)

    async def run() -> None:
        job = engine.submit("x", start, 60)
        await asyncio.to_thread(begun.wait)
        started = time.monotonic()
        await asyncio.to_thread(engine.close, 0.2)
        assert time.monotonic() - started < 3
        answer, _ = await job.finish()
        assert answer.finish_reason == "cancelled"

    asyncio.run(run())
