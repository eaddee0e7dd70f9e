"""The text side of a loaded model: from a question to token ids, from an answer to boxes.

Everything here comes from the artifact's manifest, tokenizer and chat template, so all backends get
the same ids. It evaluates nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Coords, Geometry
from medmo_edge.errors import ArtifactError, CheckpointError, PromptError
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest
from medmo_edge.preprocess import Preprocessing, grid_thw, num_vision_tokens, resize
from medmo_edge.prompts import (
    ChatTemplate,
    Message,
    check_user_text,
    encode_prompt,
    plain_messages,
    texts_of,
    user_message,
)
from medmo_edge.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image as the model sees it: uint8 pixels [H, W, 3], number of vision tokens, sizes."""

    resized_HWC: NDArray[np.uint8]
    num_tokens: int
    geometry: Geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """How to talk to one model."""

    tokenizer: Tokenizer
    template: ChatTemplate
    preprocessing: Preprocessing
    coords: Coords
    image_token: str
    image_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_artifact(cls, manifest: Manifest) -> "Chat":
        """Errors: ArtifactError when the manifest, tokenizer or template cannot be used.

        The last step of loading: also when a file was changed on disk since it was checked.
        """
        with manifest.unchanged():
            return cls._of(manifest)

    @classmethod
    def _of(cls, manifest: Manifest) -> "Chat":
        model = manifest.model
        try:
            tokenizer = Tokenizer.load(manifest.path_of("tokenizer"))
            chat = cls(
                tokenizer=tokenizer,
                template=ChatTemplate(manifest.path_of("chat_template").read_text("utf-8")),
                preprocessing=Preprocessing.from_dict(manifest.preprocessing),
                coords=manifest.coords,  # type: ignore[arg-type]
                image_token=model["image_token"],
                image_token_id=model["image_token_id"],
                vision_end_token_id=model["vision_end_token_id"],
                eos_token_ids=tuple(model["eos_token_ids"]),
            )
        except (CheckpointError, KeyError, OSError, TypeError, ValueError) as error:
            raise ArtifactError(f"{manifest.folder}: {_line(error)}: export again") from error
        if tokenizer.length != model.get("tokenizer_length"):
            raise ArtifactError(
                f"{manifest.folder}: tokenizer has {tokenizer.length} ids, manifest says "
                f"{model.get('tokenizer_length')}: export again"
            )
        if tokenizer.length > model.get("vocab_size", 0):
            raise ArtifactError(
                f"{manifest.folder}: tokenizer has {tokenizer.length} ids, the model only "
                f"{model.get('vocab_size')}: export again"
            )
        return chat

    def picture(self, frame: Frame) -> Picture:
        """Resize a frame. Errors: ImageError for sizes that the model cannot see."""
        resized = resize(frame.pixels, self.preprocessing)
        height, width = resized.shape[:2]
        geometry = Geometry(
            width=frame.source.width,
            height=frame.source.height,
            frame_width=frame.pixels.shape[1],
            frame_height=frame.pixels.shape[0],
            resized_width=width,
            resized_height=height,
        )
        tokens = num_vision_tokens(grid_thw(height, width, self.preprocessing), self.preprocessing)
        return Picture(resized_HWC=resized, num_tokens=tokens, geometry=geometry)

    def prompt(
        self, question: str, pictures: Sequence[Picture], image_texts: Sequence[str] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids of one question, cut after the last image: what a study keeps, and the rest.

        The cut is at a special token, where tokens never merge. ``image_texts``: one before each
        image, or none. Errors: PromptError.
        """
        check_user_text(question)
        if image_texts and len(image_texts) != len(pictures):
            raise PromptError(f"{len(image_texts)} image texts for {len(pictures)} images")
        ids = self._encode([user_message(question, len(pictures), image_texts)], pictures)
        cut = 0
        if pictures:
            cut = len(ids) - ids[::-1].index(self.vision_end_token_id)
            cut = min(cut, len(ids) - 1)  # the rest gives the logits: it must not be empty
        return ids[:cut], ids[cut:]

    def conversation(
        self, messages: Sequence[Message], pictures: Sequence[Picture]
    ) -> tuple[list[int], list[int], list[int]]:
        """``prompt`` for several messages; also the lengths at which an earlier answer ends.

        The kept part reaches to the last image or earlier answer. Errors: PromptError.
        """
        _check_messages(messages)
        ids = self._encode(messages, pictures)
        ends = [index + 1 for index, id in enumerate(ids) if id in self.eos_token_ids]
        cuts: list[int] = []
        if len(ends) >= len(messages):  # each message ends with one; a template may add a system's
            last = list(zip(messages[::-1], ends[::-1], strict=False))
            cuts = [end for message, end in last[::-1] if message["role"] == "assistant"]
        keep = max(cuts, default=0)
        if pictures:
            keep = max(keep, len(ids) - ids[::-1].index(self.vision_end_token_id))
        keep = min(keep, len(ids) - 1)
        return ids[:keep], ids[keep:], cuts

    def _encode(self, messages: Sequence[Message], pictures: Sequence[Picture]) -> list[int]:
        """Token ids; control tokens that messages spell are plain text. Errors: PromptError."""
        messages, mark = plain_messages(self.tokenizer, messages)
        counts = [picture.num_tokens for picture in pictures]
        parts = self.tokenizer, self.template, messages, counts, self.image_token
        return encode_prompt(*parts, mark=mark)

    def segments(
        self, ids: Sequence[int], pictures: Sequence[Picture], cuts: Sequence[int] = ()
    ) -> list[list[int] | Picture]:
        """``ids`` as runs of text tokens with the pictures in the places of their image tokens.

        Runs also end at ``cuts``, in ascending order.
        """
        pieces: list[list[int] | Picture] = []
        done = 0
        for picture in pictures:
            start = ids.index(self.image_token_id, done)
            pieces += [*_runs(ids, done, start, cuts), picture]
            done = start + picture.num_tokens
        return pieces + _runs(ids, done, len(ids), cuts)


def _runs(
    ids: Sequence[int], start: int, end: int, cuts: Sequence[int]
) -> list[list[int] | Picture]:
    """``ids[start:end]``, cut; no run is empty."""
    places = [start, *(cut for cut in cuts if start < cut < end), end]
    return [list(ids[a:b]) for a, b in pairwise(places) if a < b]


def _check_messages(messages: Sequence[Message]) -> None:
    """Refuse what the template cannot carry safely. Errors: PromptError."""
    if not messages or messages[-1]["role"] != "user":
        raise PromptError("the last message must be the user's")
    check_user_text(" ".join(texts_of(messages[-1])))


def _line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"manifest.json lacks model entry {error}"
    return " ".join(str(error).split())
