"""Answers that must follow a JSON Schema: which tokens may come next, for every backend alike.

llguidance (MIT, no torch) turns a schema and the checkpoint's own tokenizer into a mask over the
vocabulary; the sampler applies it to the logits, so backends know nothing of it. Nothing is
repaired afterwards: an answer cut off by its length limit is cut-off JSON. References to other
documents are not fetched, and what the library cannot promise (``not``, ``uniqueItems``) is
refused, not ignored.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import UsageError
from medmo_edge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_CHARACTERS = 1 << 16

# One form of white space, json.dumps' own: with a choice, a small model can write line breaks until
# its length limit.
_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """The state of one constrained answer."""

    def __init__(self, matcher: "LLMatcher", vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens [V] may come next; only end-of-text ones when the JSON is complete.

        Errors: UsageError when the schema became too costly to follow.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        bits = np.unpackbits(mask, count=self._vocabulary, bitorder="little")
        return bits.view(np.bool_)

    def accept(self, token: int) -> None:
        """``token`` was chosen. Errors: UsageError when it was not allowed."""
        self._matcher.consume_token(token)
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            reason = _line(self._matcher.get_error())
            raise UsageError(f"the JSON schema cannot be followed: {reason}")


class Grammars:
    """Compiles schemas for one tokenizer; thread-safe. The tokenizer is prepared at first use."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._prepared: LLTokenizer | None = None
        self._lock = threading.Lock()

    def prepare(self) -> "LLTokenizer":
        """Read the vocabulary: one to two seconds for 150,000 tokens, then free.

        Errors: UsageError when llguidance is not installed.
        """
        with self._lock:
            if self._prepared is None:
                self._prepared = _library().LLTokenizer(
                    self._tokenizer.to_json(),
                    n_vocab=self._tokenizer.length,
                    eos_token=self._eos_token_ids,
                )
            return self._prepared

    def start(self, schema: str) -> Constraint:
        """A constraint at its beginning. Errors: UsageError as ``check_schema``."""
        library = _library()
        prepared = self.prepare()
        matcher = library.LLMatcher(prepared, _grammar(schema), log_level=0)
        if matcher.is_error():
            raise UsageError(f"JSON schema cannot be used: {_line(matcher.get_error())}")
        return Constraint(matcher, self._tokenizer.length)


def schema_text(schema: Mapping[str, Any]) -> str:
    """``schema`` as ``GenerationOptions.json_schema`` takes it. Errors: UsageError if unusable."""
    text = json.dumps(schema)
    check_schema(text)
    return text


def check_schema(schema: str) -> None:
    """Refuse what cannot be followed, before a model is asked.

    Errors: UsageError for text that is no JSON Schema, is too long, or asks for something that
    cannot be guaranteed; also when llguidance is not installed.
    """
    failed, messages = _library().LLMatcher.validate_grammar_with_warnings(_grammar(schema))
    if failed:
        raise UsageError(f"JSON schema cannot be used: {_line(' '.join(messages))}")


def _grammar(schema: str) -> str:
    if len(schema) > MAX_SCHEMA_CHARACTERS:
        raise UsageError(f"JSON schema is longer than {MAX_SCHEMA_CHARACTERS} characters")
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"JSON schema is not valid JSON: {_line(str(error))}") from error
    if not isinstance(value, dict):
        raise UsageError("JSON schema must be an object")
    value.pop("x-guidance", None)  # the library's own switches are not for callers
    try:
        grammar: str = _library().LLMatcher.grammar_from_json_schema(value, overrides=_OPTIONS)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:  # 2**64, for one
        raise UsageError(f"JSON schema cannot be used: {_line(str(error))}") from error
    return grammar


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UsageError(
            "answers by a JSON schema need llguidance: pip install 'medmo-edge[serve]'"
        ) from error
    return llguidance


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
