"""A small tokenizer of Qwen's kind, trained on our own questions and answers.

Same normaliser, pre-tokenizer (every digit alone), byte-level BPE and special-token names and
order as Qwen3-VL's, so that readers of the big checkpoints read this one; only the merges differ.
``<box>`` is plain text, as in MedMO. A checkpoint that is fine-tuned keeps its own tokenizer: this
is for training from nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen2's split; {1,3} digits of GPT-4 became one digit, which box coordinates rely on.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
CONTROL: tuple[str, ...] = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE,
    VIDEO,
)
#: added tokens that decode to text, as Qwen marks them (special: false)
PLAIN: tuple[str, ...] = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialIds:
    """Ids that the model config and the collator need."""

    end_of_text: int
    turn_end: int
    vision_start: int
    vision_end: int
    image: int
    video: int


def train_tokenizer(texts: Iterable[str], bpe_size: int) -> "Tokenizer":
    """Byte-level BPE of at most ``bpe_size`` tokens, the 256 bytes first, special tokens last."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level: dict[str, Any] = {
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(**byte_level),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    added = [AddedToken(name, normalized=False, special=True) for name in CONTROL]
    added += [AddedToken(name, normalized=False, special=False) for name in PLAIN]
    tokenizer.add_tokens(added)
    return tokenizer


def read_tokenizer(checkpoint: Path, rows: int) -> "Tokenizer":
    """The tokenizer of a checkpoint folder, for an embedding table of ``rows``.

    Errors: CheckpointError.
    """
    from tokenizers import Tokenizer

    path = checkpoint / "tokenizer.json"
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if found.get_vocab_size() > rows:
        raise CheckpointError(
            f"{path} has {found.get_vocab_size()} tokens, the recipe's table {rows} rows: it "
            "cannot start this recipe's next stage"
        )
    return found


def special_ids(tokenizer: "Tokenizer") -> SpecialIds:
    """The ids of the special tokens in ``tokenizer``."""
    id_of = tokenizer.get_vocab()
    return SpecialIds(
        end_of_text=id_of[END_OF_TEXT],
        turn_end=id_of[TURN_END],
        vision_start=id_of[VISION_START],
        vision_end=id_of[VISION_END],
        image=id_of[IMAGE],
        video=id_of[VIDEO],
    )


def tokenizer_config(tokenizer: "Tokenizer", max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json in the form that transformers 4.57 and 5.x both read."""
    decoder: dict[str, Any] = {
        str(tokenizer.token_to_id(name)): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": name in CONTROL,
        }
        for name in _added()
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(CONTROL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": max_positions,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _added() -> Sequence[str]:
    return (*CONTROL, *PLAIN)
