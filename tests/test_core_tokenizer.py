"""The tokenizer against llama.cpp's vectors, transformers, and its own streaming form."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import CheckpointError, PromptError
from medmo_edge.tokenizer import Tokenizer, same_tokenizer, tokenizer_sha256


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    pytest.importorskip("transformers", reason="the reference tokenizer needs transformers")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def qwen(data_dir: Path) -> Tokenizer:
    return Tokenizer.load(data_dir / "tokenizer" / "tokenizer.json")


def test_ids_of_llama_cpp_vectors(qwen: Tokenizer, data_dir: Path) -> None:
    stem = data_dir / "tokenizer" / "ggml-vocab-qwen2.gguf"
    text = stem.with_suffix(".gguf.inp").read_bytes().decode()  # read_text would change line ends
    texts = text.split("\n__ggml_vocab_test__\n")
    lines = stem.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert qwen.encode(text) == [int(id) for id in line.split()], repr(text)


def test_known_ids_of_qwen3(qwen: Tokenizer) -> None:
    assert qwen.length == 151669
    assert qwen.special_ids["<|im_end|>"] == 151645
    assert qwen.special_ids["<|image_pad|>"] == 151655
    assert "<think>" not in qwen.special_ids
    # Every digit is one token, and <box> is plain text.
    assert len(qwen.encode("1000")) == 4
    assert len(qwen.encode("<box>")) > 1
    assert (
        qwen.decode(qwen.encode("WBC <box>[[1, 2]]</box><|im_end|>")) == "WBC <box>[[1, 2]]</box>"
    )


@given(text=st.text(max_size=60))
def test_encode_and_decode_equal_transformers(tiny: Tokenizer, reference: Any, text: str) -> None:
    ids = tiny.encode(text)
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert tiny.decode(ids) == reference.decode(ids, skip_special_tokens=True)


ids_of_tiny = st.lists(st.integers(0, 442), max_size=40)


@given(ids=ids_of_tiny)
def test_stream_equals_decode_for_any_ids(tiny: Tokenizer, reference: Any, ids: list[int]) -> None:
    """Random ids are mostly split and broken UTF-8: the hard case."""
    stream = tiny.stream()
    pieces = [stream.push(id) for id in ids] + [stream.flush()]
    assert "".join(pieces) == tiny.decode(ids)
    assert "".join(pieces) == reference.decode(ids, skip_special_tokens=True)


@given(text=st.text(max_size=30))
def test_stream_never_emits_half_a_character(tiny: Tokenizer, text: str) -> None:
    stream, sent = tiny.stream(), ""
    whole = tiny.decode(tiny.encode(text))
    for id in tiny.encode(text):
        sent += stream.push(id)
        assert whole.startswith(sent)
    assert stream.flush() == ""


def test_stream_waits_for_the_last_byte(qwen: Tokenizer) -> None:
    ids = qwen.encode(" \U0001f999")
    assert ids == [11162, 99, 247]
    stream = qwen.stream()
    assert [stream.push(id) for id in ids] == [" ", "", "\U0001f999"]
    stream = qwen.stream()
    assert stream.push(ids[0]) + stream.flush() == " \ufffd" == qwen.decode(ids[:1])


@given(ids=st.lists(st.integers(0, 151_935), max_size=20))
def test_stream_equals_decode_on_the_real_vocabulary(qwen: Tokenizer, ids: list[int]) -> None:
    stream = qwen.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == qwen.decode(ids)


def test_ids_beyond_the_tokenizer_are_nothing(tiny: Tokenizer) -> None:
    assert tiny.length == 443
    assert tiny.decode([443, 447]) == "" == tiny.stream().push(447)


def test_special_tokens_are_skipped_and_added_text_kept(tiny: Tokenizer) -> None:
    ids = tiny.encode("<think>a</think><|im_end|>")
    assert ids[-1] == tiny.special_ids["<|im_end|>"]
    assert tiny.decode(ids) == "<think>a</think>"


def test_control_tokens(tiny: Tokenizer) -> None:
    assert tiny.control_tokens_in("a <|im_<|im_end|>b<|fim_prefix|>") == [
        "<|fim_prefix|>",
        "<|im_end|>",
    ]
    assert tiny.control_tokens_in("<box>[[1, 2, 3, 4]]</box> <think> im_end <|other|>") == []


def test_lone_surrogates_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(PromptError, match="character 2"):
        tiny.encode("ab\ud800")


def test_truncation_and_padding_of_the_file_are_ignored(
    tiny: Tokenizer, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    content = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    content |= {
        "truncation": cut,
        "padding": {**pad, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    text = "Locate the nodule in the left lung."
    assert Tokenizer.load(path).encode(text) == tiny.encode(text)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\x00\x01", '{"version": "1.0"}'])
def test_damaged_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_of_another_checkpoint_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    content = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:5]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not belong to this checkpoint"):
        open_checkpoint(folder).load_tokenizer()


def test_two_files_are_the_same_tokenizer_by_what_they_mean(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tiny_checkpoint / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    merges = values["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for name, merges in (("pairs", pairs), ("texts", [" ".join(pair) for pair in pairs])):
        values["model"]["merges"] = merges  # both spellings are in use
        values["truncation"] = {"max_length": 8}  # never applied by this package
        (tmp_path / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
        assert same_tokenizer(path, tmp_path / name)
        assert tokenizer_sha256(path) == tokenizer_sha256(tmp_path / name)
    values["model"]["merges"].pop()
    (tmp_path / "short").write_text(json.dumps(values), encoding="utf-8")
    assert not same_tokenizer(path, tmp_path / "short")
    (tmp_path / "none").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        same_tokenizer(path, tmp_path / "none")
