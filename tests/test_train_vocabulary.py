"""The small tokenizer: Qwen's rules with other merges."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from tokenizers import Tokenizer

from medmo_edge.train.vocabulary import (
    CONTROL,
    PLAIN,
    special_ids,
    tokenizer_config,
    train_tokenizer,
)

TEXTS = [
    "Locate the nodule.",
    "nodule <box>[[123, 456, 789, 1000]]</box>",
    "Is there a nodule?",
] * 9
SMALL = train_tokenizer(TEXTS, 300)


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Z"))))
def test_any_text_comes_back_as_its_nfc_form(text: str) -> None:
    import unicodedata

    assert SMALL.decode(SMALL.encode(text).ids, skip_special_tokens=False) == unicodedata.normalize(
        "NFC", text
    )


def test_every_digit_is_one_token() -> None:
    tokens = SMALL.encode("[[123, 4567]]").tokens
    assert [token for token in tokens if token.isdigit()] == list("1234567")


def test_box_tags_are_plain_text() -> None:
    assert all("<box>" != token for token in SMALL.encode("a <box>[[1, 2, 3, 4]]</box>").tokens)
    assert SMALL.token_to_id("<box>") is None


def test_special_tokens_follow_the_merges_in_order() -> None:
    size = SMALL.get_vocab_size(with_added_tokens=False)
    ids = [SMALL.token_to_id(name) for name in (*CONTROL, *PLAIN)]
    assert ids == list(range(size, size + len(ids)))
    assert SMALL.encode("a<|im_end|>b").ids[1] == special_ids(SMALL).turn_end


def test_training_repeats_itself() -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == SMALL.to_str()


def test_the_same_rules_and_names_as_qwen(data_dir: Path) -> None:
    theirs = json.loads((data_dir / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads(SMALL.to_str())
    assert ours["decoder"]["type"] == theirs["decoder"]["type"]  # its other fields have no effect
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        wanted, found = theirs[part], ours[part]
        assert {key: found[key] for key in wanted} == wanted, part
    flags = [(token["content"], token["special"]) for token in theirs["added_tokens"]]
    assert [(token["content"], token["special"]) for token in ours["added_tokens"]] == flags


def test_both_tokenizer_classes_read_the_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    SMALL.save(str(tmp_path / "tokenizer.json"))
    config = tokenizer_config(SMALL, 512)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nLocate the nodule: 12<|im_end|>"
    assert loaded(text)["input_ids"] == SMALL.encode(text).ids
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>"
    assert isinstance(SMALL, Tokenizer)
