"""The chat API through OpenAI's own client: answers, streams, usage, errors, all unchanged."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from served import TOKEN, Served, png, served

from medmo_edge.runtime import fake

openai = pytest.importorskip("openai", reason="the client that the server must satisfy")

TEXT = "WBC <box>[[100, 200, 300, 600]]</box>"
URL = "data:image/png;base64," + base64.b64encode(png(200, 50)).decode()
IMAGE = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
ASK: list[dict[str, Any]] = [
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "Locate the cell."}]}
]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(f"fake:{TEXT}", max_images=2, max_body_bytes=1 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with _open(server) as opened:
        yield opened


def _open(server: Served, **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, **options)


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "fake" and client.models.retrieve("fake").owned_by == "medmo-edge"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_an_answer_validates_and_has_boxes_in_source_pixels(client: Any) -> None:
    from openai.types.chat import ChatCompletion

    from medmo_edge.runtime.server_replies import ChatReply

    raw = client.chat.completions.with_raw_response.create(model="fake", messages=ASK)
    values = json.loads(raw.text)
    ChatCompletion.model_validate(values, strict=True)
    ChatReply.model_validate(values)
    answer = raw.parse()
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(TEXT)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(TEXT)
    assert answer.medmo_edge["boxes"] == [
        {"label": "WBC", "image": 0, "xyxy": [20.0, 10.0, 60.0, 30.0]}
    ]
    assert "path" not in answer.medmo_edge["source"][0]


def test_a_stream_gives_the_same_text_and_ends_with_usage(client: Any) -> None:
    from openai.types.chat import ChatCompletionChunk

    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="medmo-edge", messages=ASK, **options))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    said = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(said) == TEXT and len(said) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].medmo_edge["boxes"][0]["label"] == "WBC"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(TEXT)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_clients_own_stream_helper_and_parser_work(client: Any) -> None:
    with client.chat.completions.stream(model="fake", messages=ASK) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


def test_stop_length_and_logprobs(client: Any) -> None:
    def create(**options: Any) -> Any:
        return client.chat.completions.create(model="fake", messages=ASK, **options)

    assert create(stop=["<box>"]).choices[0].message.content == "WBC "
    short = create(max_completion_tokens=3)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("WBC", "length")
    assert create(max_tokens=2).usage.completion_tokens == 2
    tokens = create(logprobs=True, top_logprobs=2, max_tokens=3).choices[0].logprobs.content
    assert [token.token for token in tokens] == ["W", "B", "C"]
    assert tokens[0].bytes == [87] and tokens[0].logprob == 0 and len(tokens[0].top_logprobs) == 2
    chunks = list(create(logprobs=True, stream=True))
    said = [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert "".join(said) == TEXT


def test_turns_and_text_alone(client: Any) -> None:
    first = client.chat.completions.create(model="fake", messages=ASK)
    talk = [
        *ASK,
        first.choices[0].message.model_dump(),  # as users of the client send it back
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    again = client.chat.completions.create(model="fake", messages=talk)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    developer = {"role": "developer", "content": "Be brief."}
    brief = client.chat.completions.create(model="fake", messages=[developer, *talk])
    assert brief.usage.prompt_tokens > again.usage.prompt_tokens
    alone = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "What is a nodule?"}]
    )
    assert alone.choices[0].message.content == TEXT and alone.medmo_edge["source"] == []


def test_the_clients_parser_gets_its_pydantic_model() -> None:
    from pydantic import BaseModel

    class Finding(BaseModel):
        label: str
        side: Literal["left", "right"]
        size: int | None

    class Report(BaseModel):
        findings: list[Finding]

    text = '{"findings": [{"label": "nodule", "side": "left", "size": null}]}'
    with served(f"fake:{text}") as running, _open(running) as client:
        said = client.chat.completions.parse(model="fake", messages=ASK, response_format=Report)
    expected = Report(findings=[Finding(label="nodule", side="left", size=None)])
    assert said.choices[0].message.parsed == expected


def test_json_schema() -> None:
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    form = {"type": "json_schema", "json_schema": {"name": "sure", "schema": schema}}
    with served('fake:{"sure": true}') as running:
        body = {"model": "fake", "messages": [{"role": "user", "content": "Sure?"}]}
        reply = running.client.post("/v1/chat/completions", json={**body, "response_format": form})
        assert json.loads(reply.json()["choices"][0]["message"]["content"]) == {"sure": True}
        form["json_schema"] = {"name": "no", "schema": {"type": "string"}}
        reply = running.client.post("/v1/chat/completions", json={**body, "response_format": form})
        assert reply.status_code == 400 and "schema" in reply.json()["error"]["message"]


FORMATS: list[tuple[Any, int]] = [
    ({"type": "text"}, 200),
    ({"type": "json_object"}, 200),
    ({"type": "json_schema", "json_schema": {"name": "any"}}, 200),
    ({"type": "json_schema", "json_schema": {"name": "any", "schema": {}, "strict": True}}, 200),
    ({"type": "json_schema", "json_schema": {"name": "x" * 65, "schema": {}}}, 400),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, 400),
    ({"type": "json_schema"}, 400),
    ({"type": "xml"}, 400),
    ("json_object", 400),
    ({"type": "json_schema", "json_schema": {"name": "no", "schema": {"type": "array"}}}, 400),
    (
        {
            "type": "json_schema",
            "json_schema": {
                "name": "tree",
                "schema": {
                    "$ref": "#/$defs/tree",
                    "$defs": {
                        "tree": {
                            "type": "object",
                            "properties": {
                                "sure": {"type": "boolean"},
                                "next": {"$ref": "#/$defs/tree"},
                            },
                        }
                    },
                },
            },
        },
        200,
    ),
    (
        {
            "type": "json_schema",
            "json_schema": {"name": "big", "schema": {"description": "x" * 70_000}},
        },
        400,
    ),
]


def test_every_form_of_response_format() -> None:
    with served('fake:{"sure": true}') as running:
        for form, status in FORMATS:
            body = {"model": "fake", "messages": ASK, "response_format": form}
            reply = running.client.post("/v1/chat/completions", json=body)
            assert reply.status_code == status, (form, reply.text)
            if status == 200:
                assert reply.json()["choices"][0]["message"]["content"] == '{"sure": true}'
            else:
                assert "\n" not in reply.json()["error"]["message"]


def test_a_seed_repeats_an_answer_and_is_told(tiny_artifact: Path) -> None:
    with served(tiny_artifact) as running:

        def said(**options: Any) -> tuple[str, int]:
            body = {"model": "medmo-edge", "messages": ASK, "max_tokens": 12, **options}
            reply = running.client.post("/v1/chat/completions", json=body).json()
            return reply["choices"][0]["message"]["content"], reply["medmo_edge"]["seed"]

        first = said(temperature=1.5, seed=11)
        assert first == said(temperature=1.5, seed=11) and first[1] == 11
        drawn = said(temperature=1.5)
        assert drawn == said(temperature=1.5, seed=drawn[1])
        assert len({said(temperature=1.5, seed=seed)[0] for seed in range(4)}) > 1


def test_images_of_recent_chats_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from medmo_edge.runtime import server_state

    with served("fake:yes", max_studies=20) as running:

        def cached(grey: int) -> int:
            url = "data:image/png;base64," + base64.b64encode(png(grey=grey)).decode()
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "Sure?"},
            ]
            body = {"model": "fake", "messages": [{"role": "user", "content": content}]}
            reply = running.client.post("/v1/chat/completions", json=body).json()
            return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])

        new = max(cached(grey) for grey in range(20))
        assert min(cached(grey) for grey in range(20)) > new
        assert cached(20) <= new and cached(0) <= new  # it was the oldest of 21
        assert cached(0) > new
        monkeypatch.setattr(server_state, "_KEPT_PIXEL_BYTES", 1)
        cached(0)
        assert cached(0) <= new


def test_control_tokens_in_a_message_are_plain_text(client: Any) -> None:
    """The fake model's tokens are bytes: as characters the token costs ten, as itself one."""

    def tokens(content: str) -> int:
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(model="fake", messages=messages)
        return int(answer.usage.prompt_tokens)

    assert tokens("a<|im_end|>b") == tokens("a+im_end.-+b") == tokens("ab") + len("<|im_end|>")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "gpt-4"}, "one model"),
        ({"messages": []}, "at least 1 item"),
        ({"n": 2}, "n:"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"max_tokens": 100_000}, "above this server's 4096"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"unheard_of": 1}, "not supported"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "last message"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [IMAGE] * 3}]}, "3 images"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"not": {}}},
                }
            },
            "schema",
        ),
    ],
)
def test_what_cannot_work_is_one_line_and_the_right_class(
    client: Any, change: dict[str, Any], words: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(
                **{"model": "fake", "messages": ASK, "stream": stream}, extra_body=change
            )
        assert refused.value.status_code in (400, 404)
        assert words in refused.value.body["message"] and "\n" not in refused.value.body["message"]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/x.png",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "/etc/passwd",
        "data:image/png;base64,***",
        "data:image/png;base64,",
        "data:image/png,plain",
        "data:image/png;base64," + base64.b64encode(b"no picture").decode(),
        "data:image/png;base64," + base64.b64encode(png()[:40]).decode(),
    ],
)
def test_only_pictures_in_data_urls_are_read(client: Any, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fake", messages=messages)
    assert "/" not in refused.value.body["message"].replace("data URLs", "")


def test_bodies_that_are_none(server: Served) -> None:
    post = server.client.post
    path = "/v1/chat/completions"
    json_type = {"Content-Type": "application/json"}
    assert post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"null", b"1e999"):
        assert post(path, content=content, headers=json_type).status_code == 400
    big = b'{"model": "' + b"x" * (1 << 20) + b'"}'
    assert post(path, content=big, headers=json_type).status_code == 413
    assert server.client.get(path).status_code == 405


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake backend takes 20 ms per token."""
    decode = fake.Fake.decode_tokens

    def decode_slowly(self: fake.Fake, ids: list[int]) -> Any:
        time.sleep(0.02)
        return decode(self, ids)

    monkeypatch.setattr(fake.Fake, "decode_tokens", decode_slowly)


def test_a_client_that_goes_away_stops_its_answer(slow: None) -> None:
    with served(f"fake:{'long ' * 200}") as running:
        body = {"model": "fake", "messages": [{"role": "user", "content": "Go on."}]}
        for stream in (True, False):
            if stream:
                path = "/v1/chat/completions"
                with running.client.stream("POST", path, json={**body, "stream": True}) as reply:
                    next(reply.iter_bytes())
            else:
                with pytest.raises(openai.APITimeoutError), _open(running, timeout=0.3) as client:
                    client.chat.completions.create(**body)
            start = time.monotonic()
            while running.state.engine.running:
                assert time.monotonic() - start < 5
                time.sleep(0.01)
        metrics = running.client.get("/metrics").text
        assert 'medmo_edge_answers_total{finish="cancelled"} 2.0' in metrics
        # the streamed reply had begun with 200; the other one had no status yet
        asked = 'medmo_edge_requests_total{route="POST /v1/chat/completions",status='
        assert f'{asked}"200"}} 1.0' in metrics and f'{asked}"499"}} 1.0' in metrics
        assert "medmo_edge_unexpected_errors_total 0.0" in metrics


def test_a_full_queue_and_a_timeout_have_a_status(slow: None) -> None:
    with served(f"fake:{'long ' * 40}", max_waiting=1, timeout_seconds=2.0) as running:
        ask = {"model": "fake", "messages": [{"role": "user", "content": "Go on."}]}
        found: list[Any] = []

        together = threading.Barrier(4)

        def one() -> None:
            with _open(running) as client:
                client.models.list()
                together.wait()
                try:
                    found.append(client.chat.completions.create(**ask))
                except openai.APIStatusError as error:
                    found.append(error)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = [each for each in found if isinstance(each, openai.RateLimitError)]
    late = [each for each in found if getattr(each, "status_code", 0) == 408]
    cut = [each for each in found if not isinstance(each, Exception)]
    assert len(refused) == 2 and refused[0].response.headers["retry-after"] == "1"
    assert len(cut) == 1 and cut[0].choices[0].finish_reason == "length"
    assert cut[0].medmo_edge["finish_reason"] == "timeout"
    assert len(late) == 1 and late[0].response.headers["x-should-retry"] == "false"
