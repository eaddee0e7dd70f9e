"""Answers by a JSON Schema: what may come, what is refused, and that a model cannot leave it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medmo_edge.errors import UsageError
from medmo_edge.images import Frame
from medmo_edge.runtime import fake
from medmo_edge.runtime.constrain import Grammars, check_schema, schema_text
from medmo_edge.runtime.sampling import Sampler, Sampling
from medmo_edge.runtime.session import load
from medmo_edge.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs the serve extra")
jsonschema = pytest.importorskip("jsonschema_rs", reason="the reference for JSON Schema")

FINDING = {
    "type": "object",
    "properties": {
        "finding": {"enum": ["nodule", "effusion", "none"]},
        "side": {"type": "string", "maxLength": 4},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "sure": {"type": "boolean"},
        "box": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1000},
            "minItems": 4,
            "maxItems": 4,
        },
    },
    "required": ["finding", "count", "box"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint / "tokenizer.json")


def _eos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.special_ids[name] for name in ("<|im_end|>", "<|endoftext|>")]


def _draw(tokenizer: Tokenizer, schema: dict[str, Any], seed: int, length: int) -> str | None:
    """What a model that knows nothing answers, or None when it does not come to an end."""
    constraint = Grammars(tokenizer, _eos(tokenizer)).start(schema_text(schema))
    random = np.random.default_rng(seed)
    sampler = Sampler(Sampling(), tokenizer.length, (), constraint)
    ids: list[int] = []
    while len(ids) < length:
        token = sampler.draw(random.normal(size=tokenizer.length).astype(np.float32))
        if token in _eos(tokenizer):
            return tokenizer.decode(ids)
        ids.append(token)
    return None


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_whatever_the_model_prefers_the_answer_follows_the_schema(
    tokenizer: Tokenizer, seed: int
) -> None:
    text = _draw(tokenizer, FINDING, seed, 400)
    if text is not None:
        jsonschema.validate(FINDING, json.loads(text))


def test_random_answers_do_come_to_an_end(tokenizer: Tokenizer) -> None:
    ended = [_draw(tokenizer, FINDING, seed, 400) for seed in range(20)]
    assert sum(text is not None for text in ended) >= 15


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {
            "finding": st.sampled_from(["nodule", "effusion", "none"]),
            "count": st.integers(0, 20),
            "box": st.lists(st.integers(0, 999), min_size=4, max_size=4),
        },
        optional={"sure": st.booleans()},
    )
)
def test_every_valid_answer_is_possible(tokenizer: Tokenizer, value: dict[str, Any]) -> None:
    ordered = {name: value[name] for name in FINDING["properties"] if name in value}  # type: ignore[attr-defined]
    constraint = Grammars(tokenizer, _eos(tokenizer)).start(schema_text(FINDING))
    for id in tokenizer.encode(json.dumps(ordered)):
        allowed = constraint.allowed()
        assert allowed[id] and not allowed[_eos(tokenizer)].any()
        constraint.accept(id)
    assert np.flatnonzero(constraint.allowed()).tolist() == sorted(_eos(tokenizer))


def test_a_model_with_random_weights_answers_by_the_schema(tiny_artifact: Path) -> None:
    frame = Frame.from_pixels(np.zeros((64, 64), np.uint8))
    schema: dict[str, Any] = {"type": "object", "properties": {"sure": {"type": "boolean"}}}
    schema |= {"required": ["sure"], "additionalProperties": False}
    with load(tiny_artifact, threads=1) as session:
        answer = session.ask(frame, "Is it?", json_schema=schema_text(schema), logprobs=3)
        free = session.ask(frame, "Is it?", max_new_tokens=8)
    assert answer.text in ('{"sure": true}', '{"sure": false}')
    assert answer.finish_reason == "stop" and free.text != answer.text


def test_the_fake_follows_a_schema_if_its_text_does() -> None:
    schema = schema_text({"type": "object"})
    with load('fake:{"a": 1}') as session, load("fake:no") as other:
        assert session.ask([], "What?", json_schema=schema).text == '{"a": 1}'
        with pytest.raises(UsageError, match="no probability to what the JSON schema allows"):
            other.ask([], "What?", json_schema=schema)
        assert other.ask([], "What?").text == "no"  # the session is usable afterwards


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"type": "nonsense"}', "Invalid type"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"$ref": "https://example.org/schema.json"}', "does not fetch"),
        ('{"properties": {"a": {"type": 18446744073709551616}}}', "cannot be used"),
        ('{"properties": {"a": {"minimum": -1e999}}}', "cannot be used"),
        ('{"properties": {"a": {"maxLength": 1e400}}}', "cannot be used"),
        ('{"type": "string", "pattern": "("}', "regex"),
        ('{"a": ' * 100_000, "longer than"),
        ('{"type":"array","items":' * 2000 + "{}" + "}" * 2000, "JSON schema"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(schema: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        check_schema(schema)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_log_probabilities_are_those_of_the_plain_logits() -> None:
    logits = np.array([0.5, 2.0, -1.0, 1.0], np.float32)
    choices: list[Any] = []
    sampler = Sampler(Sampling(temperature=3.0, top_k=1, logprobs=2), 4, (), None, choices)
    assert sampler.draw(logits) == 1
    total = sum(np.exp(value) for value in (0.5, 2.0, -1.0, 1.0))
    assert choices[0].id == 1 and choices[0].logprob == pytest.approx(np.log(np.exp(2.0) / total))
    assert [id for id, _ in choices[0].top] == [1, 3]
    assert choices[0].top[1][1] == pytest.approx(np.log(np.exp(1.0) / total))


def test_the_fakes_tokenizer_is_understood() -> None:
    chat = fake.chat()
    constraint = Grammars(chat.tokenizer, chat.eos_token_ids).start('{"enum": ["ja"]}')
    for id in chat.tokenizer.encode('"ja"'):
        assert np.flatnonzero(constraint.allowed()).tolist() == [id]
        constraint.accept(id)


def test_the_command_line_takes_a_schema(tmp_path: Path) -> None:
    picture, schema = tmp_path / "a.png", tmp_path / "schema.json"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(picture)
    command = [sys.executable, "-m", "medmo_edge", "ask", 'fake:{"a": 1}', str(picture), "What?"]
    for content, code, words in (('{"type": "object"}', 0, '{"a": 1}'), ("{", 2, "not valid JSON")):
        schema.write_text(content)
        done = subprocess.run(
            [*command, "--json-schema", str(schema)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code and words in done.stdout + done.stderr
