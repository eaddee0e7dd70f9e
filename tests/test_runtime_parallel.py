"""The server with several answers at once: order, limits, errors, shutdown, OpenAI's client."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lanes_fake import LanesFake, session_on
from served import TOKEN, Served, png, served

from medmo_edge.errors import PromptError
from medmo_edge.runtime.session import Session

openai = pytest.importorskip("openai", reason="the official client checks the API")
for needed in ("llguidance", "prometheus_client", "pydantic", "starlette", "uvicorn"):
    pytest.importorskip(needed, reason="needs the serve extra")

from medmo_edge.runtime.server_engine import Engine, Job  # noqa: E402
from medmo_edge.runtime.server_metrics import Metrics  # noqa: E402
from medmo_edge.runtime.server_problems import Problem  # noqa: E402

LONG = 100_000


class Paced(LanesFake):
    """A millisecond per evaluation; never says that it is done before 60 tokens."""

    def decode_lanes(self, tokens: Any) -> Any:
        time.sleep(0.001)
        return super().decode_lanes(tokens)

    def decode_tokens(self, ids: list[int]) -> Any:
        time.sleep(0.001)
        return super().decode_tokens(ids)

    def _logits(self) -> Any:
        logits = super()._logits()
        logits[self._eos] = 0
        return logits


@pytest.fixture
def session() -> Iterator[Session]:
    with session_on(Paced()) as opened:
        yield opened


def _engine(**options: Any) -> Engine:
    return Engine(Metrics(), max_waiting=32, parallel=4, **options)


def _start(session: Session, order: list[str] | None = None, **options: Any) -> Any:
    def start(seconds: float, cancel: threading.Event) -> Any:
        if order is not None:
            order.append(options["question"])
        given = {"max_new_tokens": 30, **options}
        question = given.pop("question")
        return session.study([]).stream(question, timeout_seconds=seconds, cancel=cancel, **given)

    return start


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")


def _alone(question: str) -> str:
    with session_on(Paced()) as session:
        return session.study([]).ask(question, max_new_tokens=30).text


def test_several_run_at_once_and_lines_take_turns(session: Session) -> None:
    engine, order = _engine(), list[str]()

    async def run() -> None:
        gate = [
            engine.submit("gate", _start(session, question="Hold.", max_new_tokens=LONG), 60)
            for _ in range(4)
        ]
        await _until(lambda: engine.running == 4)
        jobs = {}
        for name in ("a1", "a2", "a3", "a4", "b1", "c1"):
            jobs[name] = engine.submit(name[0], _start(session, order, question=name), 60)
        assert (engine.running, engine.waiting) == (4, 6)
        for job in gate:
            job.cancelled.set()
        for name, job in jobs.items():
            assert (await job.finish())[0].text == _alone(name)

    asyncio.run(run())
    engine.close(5)
    assert order == ["a1", "b1", "c1", "a2", "a3", "a4"]


def test_one_that_is_late_gone_or_wrong_does_not_touch_the_others(session: Session) -> None:
    engine, bugs = _engine(), Metrics()
    engine._metrics = bugs

    def wrong(error: Exception) -> Any:
        def start(seconds: float, cancel: threading.Event) -> Any:
            raise error

        return start

    async def run() -> None:
        good = engine.submit("x", _start(session, question="Is it?", max_new_tokens=300), 60)
        late = engine.submit("x", _start(session, question="Late?", max_new_tokens=LONG), 0.2)
        gone = engine.submit("x", _start(session, question="Gone?", max_new_tokens=LONG), 60)
        await _until(lambda: engine.running == 3)
        refused = engine.submit("x", wrong(PromptError("a question is needed")), 60)
        broken = engine.submit("x", wrong(KeyError("a bug")), 60)
        last = engine.submit("x", _start(session, question="Last?"), 60)
        with pytest.raises(Problem, match="a question is needed"):
            await refused.finish()
        with pytest.raises(Problem, match="see the server's log") as bug:
            await broken.finish()
        assert bug.value.status == 500
        gone.cancelled.set()
        assert (await gone.finish())[0].finish_reason == "cancelled"
        answer = (await late.finish())[0]
        assert answer.finish_reason == "timeout" and answer.text
        assert (await last.finish())[0].text == _alone("Last?")
        assert len((await good.finish())[0].text) == 300

    asyncio.run(run())
    engine.close(5)
    assert "medmo_edge_unexpected_errors_total 1.0" in bugs.text().decode()


def test_stopping_finishes_all_that_run(session: Session) -> None:
    engine = _engine()

    async def run() -> None:
        jobs = [engine.submit("x", _start(session, question=f"{n}?"), 60) for n in range(6)]
        await _until(lambda: engine.running == 4)
        engine.stop()
        for number, job in enumerate(jobs[:4]):
            assert (await job.finish())[0].text == _alone(f"{number}?")
        for job in jobs[4:]:
            with pytest.raises(Problem, match="stopping"):
                await job.finish()

    asyncio.run(run())
    engine.close(5)
    assert not engine._thread.is_alive() and engine.running == 0


def test_closing_cancels_all_that_do_not_end(session: Session) -> None:
    engine = _engine()

    async def run() -> None:
        jobs = [
            engine.submit("x", _start(session, question="On?", max_new_tokens=LONG), 60)
            for _ in range(4)
        ]
        await _until(lambda: engine.running == 4)
        await asyncio.to_thread(engine.close, 0.1)
        for job in jobs:
            assert (await job.finish())[0].finish_reason == "cancelled"

    asyncio.run(run())
    assert not engine._thread.is_alive()


def test_no_running_answer_is_given_after_the_artifact_changed(session: Session) -> None:
    changed = threading.Event()

    def check() -> None:
        if changed.is_set():
            raise Problem(503, "the artifact was changed", "artifact_changed")

    engine = _engine(check=check)

    async def run() -> None:
        jobs: list[Job] = [
            engine.submit("x", _start(session, question=f"{n}?", max_new_tokens=500), 60)
            for n in range(3)
        ]
        await _until(lambda: engine.running == 3)
        changed.set()
        for job in jobs:
            with pytest.raises(Problem, match="artifact was changed"):
                await job.finish()

    asyncio.run(run())
    engine.close(5)


def test_a_failure_of_the_crew_itself_is_not_the_end(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, metrics = _engine(), Metrics()
    engine._metrics = metrics

    async def run() -> None:
        jobs = [
            engine.submit("x", _start(session, question="On?", max_new_tokens=LONG), 60)
            for _ in range(3)
        ]
        await _until(lambda: engine.running == 3)
        with monkeypatch.context() as patch:
            patch.setattr(Paced, "decode_lanes", lambda *_: 1 / 0)
            for job in jobs:
                with pytest.raises(Problem, match="see the server's log"):
                    await job.finish()
        later = engine.submit("x", _start(session, question="Later?"), 60)
        assert (await later.finish())[0].text == _alone("Later?")

    asyncio.run(run())
    engine.close(5)
    assert session.study([]).ask("Free?", max_new_tokens=30).text == _alone("Free?")


# ---- OpenAI's client ----


@pytest.fixture(scope="module")
def server(tiny_artifacts: Callable[..., Path]) -> Iterator[Served]:
    pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")
    with served(tiny_artifacts("gguf-q8_0"), parallel=8) as running:
        yield running


def _bodies() -> list[dict[str, Any]]:
    """Eight questions of every kind, about two pictures."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
    }
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.2, "seed": 3},
        {"temperature": 1.2, "seed": 4, "logprobs": True, "top_logprobs": 2},
        {"response_format": form},
    ]
    bodies = []
    for grey in (40, 200):
        url = "data:image/png;base64," + base64.b64encode(png(96, 64, grey)).decode()
        for kind in kinds:
            parts = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "Is it?"},
            ]
            body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 24, **kind}
            bodies.append({"model": "medmo-edge", **body})
    return bodies


def _stream(server: Served, body: dict[str, Any]) -> tuple[str, list[Any]]:
    address = {"base_url": f"{server.url}/v1", "api_key": TOKEN, "max_retries": 0}
    with openai.OpenAI(**address) as client:
        text, logprobs = "", []
        for chunk in client.chat.completions.create(**body, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                if choice.logprobs is not None:
                    logprobs += [(each.token, each.logprob) for each in choice.logprobs.content]
        return text, logprobs


def test_eight_clients_get_what_each_gets_alone(server: Served) -> None:
    bodies = _bodies()
    alone = [_stream(server, body) for body in bodies]
    with ThreadPoolExecutor(8) as clients:
        for _ in range(2):
            together = list(clients.map(lambda body: _stream(server, body), bodies))
            assert together == alone
    assert json.loads(alone[3][0])["a"] in (1, 2)
    assert alone[2][1] and len({text for text, _ in alone}) > 3
    assert "medmo_edge_answers_running 0.0" in server.client.get("/metrics").text


def test_clients_that_leave_do_not_disturb_those_that_stay(server: Served) -> None:
    bodies = _bodies()
    alone = [_stream(server, body) for body in bodies]
    path = "/v1/chat/completions"

    def leave(body: dict[str, Any]) -> None:
        with server.client.stream("POST", path, json={**body, "stream": True}) as reply:
            next(reply.iter_bytes())

    with ThreadPoolExecutor(8) as clients:
        gone = [clients.submit(leave, body) for body in bodies[::2]]
        stay = [clients.submit(_stream, server, body) for body in bodies[1::2]]
        assert [each.result() for each in stay] == alone[1::2]
        for each in gone:
            each.result()
    until = time.monotonic() + 5
    while server.state.engine.running:
        assert time.monotonic() < until
        time.sleep(0.01)
