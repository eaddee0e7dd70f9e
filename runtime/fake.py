"""The fake backend: ``load("fake:TEXT")`` answers TEXT to every question, everywhere, at once.

For vendors' tests and for baselines. Everything around it is the real thing: prompts, token loop,
stop strings, streaming, cancelling, box parsing (coordinates in norm1000), timings. It has no
weights, reads no pixels, and its tokens are the bytes of the text.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing
from medmo_edge.prompts import ChatTemplate
from medmo_edge.runtime.backends import Interrupted, Mark
from medmo_edge.runtime.chat import Chat
from medmo_edge.runtime.device import Device
from medmo_edge.tokenizer import Tokenizer

PREFIX = "fake:"
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}\
{% for item in message.content %}{% if item.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def unavailable() -> str | None:
    """It is always there."""
    return None


def unsuited(manifest: Manifest, device: Device) -> str | None:
    """It runs everywhere."""
    return None


def place(manifest: Manifest, device: Device) -> tuple[str, str]:
    """It computes nothing, and that on the CPU."""
    return "cpu", ""


def describe() -> dict[str, Any]:
    """It needs no library."""
    return {}


def artifact(text: str) -> Manifest:
    """The manifest of an artifact that exists only in memory and answers ``text``."""
    return Manifest(
        target="fake",
        backend="fake",
        model={"answer": text},
        coords="norm1000",
        preprocessing=Preprocessing().to_dict(),
        files={},
        weights={},
        checkpoint={"name": PREFIX + text, "sha256": ""},
        calibration=None,
        exporter={},
        certificate=None,
        licence="Apache-2.0",
    )


def chat() -> Chat:
    """A byte tokenizer with Qwen's special tokens, and a chat template of Qwen's form."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer = Tokenizer(inner)
    ids = tokenizer.special_ids
    return Chat(
        tokenizer=tokenizer,
        template=ChatTemplate(_TEMPLATE),
        preprocessing=Preprocessing(),
        coords="norm1000",
        image_token="<|image_pad|>",
        image_token_id=ids["<|image_pad|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_ids=(ids["<|im_end|>"],),
    )


def open(
    manifest: Manifest,
    device: Device,
    *,
    threads: int | None = None,
    max_context: int | None = None,
) -> "Fake":
    """A backend that answers the manifest's text; ``threads`` mean nothing here."""
    return Fake(manifest.model["answer"], max_context or 1 << 20)


class Fake:
    """Spells its answer after every prompt; see ``Backend`` for the methods."""

    name = "fake"
    device = "none"

    def __init__(self, answer: str, max_cells: int) -> None:
        tokenizer = chat().tokenizer
        self.max_cells = max_cells
        self._answer = [*tokenizer.encode(answer), tokenizer.special_ids["<|im_end|>"]]
        self._opening = tokenizer.encode("<|im_start|>assistant\n")
        self._length = tokenizer.length
        self._ids: list[int] = []
        self._hook: Callable[[], bool] | None = None

    def decode_tokens(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits that allow only the answer's next token."""
        self._append(ids)
        opened = self._ids[::-1].index(self._opening[0]) if self._opening[0] in self._ids else 0
        said = max(0, opened + 1 - len(self._opening))  # tokens after "<|im_start|>assistant"
        logits = np.full(self._length, -np.inf, dtype=np.float32)
        logits[self._answer[min(said, len(self._answer) - 1)]] = 0
        return logits

    def append_image(self, resized_HWC: NDArray[np.uint8]) -> None:
        """Takes as many cells as the image has vision tokens."""
        self._append([-1] * len(self.encode_image(resized_HWC)))

    def encode_image(self, resized_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One zero per vision token: it looks at no pixel."""
        side = Preprocessing().factor
        return np.zeros((resized_HWC.shape[0] // side * (resized_HWC.shape[1] // side), 1), "f4")

    def _append(self, ids: list[int]) -> None:
        if self._hook is not None and self._hook():
            raise Interrupted
        self._ids += ids

    def mark(self) -> Mark:
        """See ``Backend``."""
        return Mark(len(self._ids), len(self._ids))

    def rewind(self, mark: Mark) -> None:
        """See ``Backend``."""
        del self._ids[mark.cells :]

    def save(self) -> NDArray[np.uint8]:
        """See ``Backend``."""
        return np.array(self._ids, dtype=np.int32).view(np.uint8)

    def restore(self, state: NDArray[np.uint8], mark: Mark) -> None:
        """See ``Backend``."""
        self._ids = state.view(np.int32).tolist()

    def set_interrupt(self, hook: Callable[[], bool] | None) -> None:
        """See ``Backend``."""
        self._hook = hook

    def close(self) -> None:
        """See ``Backend``."""
