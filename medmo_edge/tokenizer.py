"""The checkpoint's tokenizer, read from tokenizer.json by the ``tokenizers`` library.

Text in, token ids out and back, whole or piece by piece. Byte-level BPE only (every Qwen model); it
neither renders chats (prompts.py) nor pads, truncates or adds tokens of its own.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import CheckpointError, PromptError, one_line

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A loaded tokenizer; thread-safe after ``load``."""

    def __init__(self, inner: "tokenizers.Tokenizer") -> None:
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        #: content -> id of the tokens that never appear in an answer, such as ``<|im_end|>``
        self.special_ids: dict[str, int] = {
            token.content: id for id, token in sorted(added.items()) if token.special
        }
        # The <|fim_*|> family is control by name, though Qwen's file does not flag it as special.
        self._control = (*self.special_ids, *(t.content for t in added.values() if _is_control(t)))
        breakable = (re.escape(token) for token in self._control if len(token) > 1)
        self._spelled = re.compile("|".join(breakable) or "(?!)")
        self._skipped = frozenset(self.special_ids.values())
        #: number of ids, added tokens included; logits of ids from here on mean nothing
        self.length: int = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json. Errors: CheckpointError if missing, damaged or not byte-level."""
        import tokenizers
        from tokenizers.decoders import ByteLevel

        if not Path(path).is_file():
            raise CheckpointError(
                f"{path} is missing: copy tokenizer.json from the base checkpoint"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{path} cannot be read as a tokenizer: {one_line(error)}"
            ) from error
        if not isinstance(inner.decoder, ByteLevel):
            raise CheckpointError(f"{path} is not a byte-level tokenizer, as every Qwen model has")
        inner.no_truncation()  # left over from training, these would cut or pad prompts silently
        inner.no_padding()
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens written in it are recognised.

        Errors: PromptError for text that is not valid Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"text is not valid Unicode at character {error.start}") from error
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; broken UTF-8 is U+FFFD, unknown ids nothing."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        """The tokenizer in the form of tokenizer.json, without truncation and padding."""
        text: str = self._inner.to_str()
        return text

    def control_tokens_in(self, text: str) -> list[str]:
        """Control tokens (``<|...|>`` and all special ones) that ``text`` spells out."""
        return sorted({token for token in self._control if token in text})

    def break_control_tokens(self, text: str, mark: str) -> str:
        """``text`` with ``mark`` inside every control token that it spells.

        Its parts between the marks, encoded one by one, are plain text with the same characters.
        ``mark`` must not occur in ``text``.
        """
        while self._spelled.search(text):  # what overlapped is still there
            text = self._spelled.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", text)
        return text

    def stream(self) -> "TextStream":
        """A fresh piecewise decoder."""
        return TextStream(self)

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes (perhaps part of a character) that ``id`` adds to an answer."""
        token = None if id in self._skipped else self._inner.id_to_token(id)
        if token is None:
            return b""
        table = _byte_table()
        try:
            return bytes(table[character] for character in token)
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return str(token).encode()


class TextStream:
    """Ids in, text out: the pieces joined equal ``Tokenizer.decode`` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that became complete with ``id``; "" while a character is still missing bytes."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """The end: U+FFFD when the last character never became complete, else ""."""
        return self._utf8.decode(b"", final=True)


def same_tokenizer(path: str | Path, other: str | Path) -> bool:
    """Whether two tokenizer.json files mean the same, however they are laid out.

    Errors: CheckpointError for a file that cannot be read.
    """
    return _meaning(Path(path)) == _meaning(Path(other))


def tokenizer_sha256(path: str | Path) -> str:
    """Hash of what a tokenizer.json means: equal for files that ``same_tokenizer``."""
    text = json.dumps(_meaning(Path(path)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _meaning(path: Path) -> dict[str, Any]:
    """The parts of a tokenizer.json that change ids; merges in one of their two spellings."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model = dict(values["model"])
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [list(pair) for pair in pairs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {one_line(error)}") from error
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"model": model, **{name: values.get(name) for name in parts}}


def _is_control(token: "tokenizers.AddedToken") -> bool:
    content: str = token.content
    return content.startswith("<|") and content.endswith("|>")


@cache
def _byte_table() -> dict[str, int]:
    """GPT-2's alphabet: every byte as one printable character, the others moved to 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(moved)
    }
