"""The reference side of a verification: what transformers makes of a checkpoint in float32.

Everything that can be independent of our runtime is: transformers' image processor, tokenizer and
chat template, its vision tower and language model, and box coordinates worked out here from the
source's size. Only the grammar of boxes in answers is shared (``parse_boxes``). A checkpoint that
does not fit into memory goes through layer by layer (``calibration.streamed``).

Shape suffixes: N patches, M vision tokens, T tokens of an answer, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Box, Geometry, parse_boxes
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import UsageError
from medmo_edge.evaluation.verify_cases import Case

Array = NDArray[np.float32]
#: (case, tokens that the answer begins with) -> a guess how it goes on, those tokens included
Draft = Callable[[Case, tuple[int, ...]], tuple[int, ...]]

_IMAGE_TOKEN = "<|image_pad|>"
_MAX_ROUNDS = 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """One side's way through one case: patches [N, P] and features [M, R] of each image, prompt
    ids, greedy tokens with their logits [T, V], and what the answer says. ``complete`` is False
    when the answer could not be followed to its end.
    """

    patches: tuple[Array, ...]
    features: tuple[Array, ...]
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    logits_TV: Array
    text: str
    boxes: tuple[Box, ...]
    rejected: tuple[str, ...]
    complete: bool = True


class Reference(Protocol):
    """A checkpoint that answers; ``describe`` says by what and how."""

    chunk: int  # cases that are best traced together

    def trace(self, cases: Sequence[Case], draft: Draft, max_new_tokens: int) -> list[Trace]:
        """The traces of ``cases``; ``draft`` may be used to get there faster, never believed."""

    def describe(self) -> dict[str, Any]:
        """Library versions, precision, and whether the model was whole or layer by layer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """A case as transformers' processor sees it."""

    ids: list[int]
    patches: tuple[Array, ...]
    grids: list[tuple[int, int, int]]


class _Processor:
    """transformers' own image processor, tokenizer and template of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        transformers = load_library("transformers")
        self.images: Any = transformers.AutoImageProcessor.from_pretrained(checkpoint.path)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
        self.tokenizer.chat_template = checkpoint.chat_template
        self.length = len(self.tokenizer)

    def prepare(self, case: Case) -> _Prepared:
        """Patches, grids and prompt ids, the image token repeated as Qwen3VLProcessor does."""
        seen = [self.images(images=[f.pixels], return_tensors="pt") for f in case.frames]
        grids = [tuple(each["image_grid_thw"][0].tolist()) for each in seen]
        content = [{"type": "image"} for _ in case.frames]
        content.append({"type": "text", "text": case.question})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        merged = self.checkpoint.config.vision.merge_size**2
        pieces = text.split(_IMAGE_TOKEN)
        counts = [int(np.prod(grid)) // merged for grid in grids]
        expanded = pieces[0] + "".join(
            _IMAGE_TOKEN * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )
        return _Prepared(
            ids=self.tokenizer(expanded, add_special_tokens=False)["input_ids"],
            patches=tuple(each["pixel_values"].numpy() for each in seen),
            grids=grids,
        )

    def finish(
        self,
        case: Case,
        prepared: _Prepared,
        features: tuple[Array, ...],
        tokens: Sequence[int],
        logits_TV: Array,
        *,
        complete: bool = True,
    ) -> Trace:
        """The answer's text and boxes, from its tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        boxes, rejected = self._boxes(case, prepared, text)
        return Trace(
            patches=prepared.patches,
            features=features,
            prompt_ids=tuple(prepared.ids),
            tokens=tuple(tokens),
            logits_TV=logits_TV[:, : self.length],
            text=text,
            boxes=boxes,
            rejected=rejected,
            complete=complete,
        )

    def _boxes(
        self, case: Case, prepared: _Prepared, text: str
    ) -> tuple[tuple[Box, ...], tuple[str, ...]]:
        """Boxes in source pixels: read in the model's own units, then scaled here."""
        if not case.frames:
            return (), ()
        patch, coords = self.checkpoint.config.vision.patch_size, self.checkpoint.coords
        limits, scales = [], []
        for frame, (_, rows, columns) in zip(case.frames, prepared.grids, strict=True):
            height, width = frame.pixels.shape[:2]
            units = {
                "norm1000": (1000, 1000),
                "pixel_resized": (columns * patch, rows * patch),
                "pixel_original": (width, height),
            }[coords]
            limits.append(_same_units(*units))
            scales.append((frame.source.width / units[0], frame.source.height / units[1]))
        parsed = parse_boxes(text, limits, coords)
        return tuple(_scaled(box, *scales[box.image]) for box in parsed.boxes), parsed.rejected


def _same_units(width: int, height: int) -> Geometry:
    """A picture whose pixels are the model's units, so that reading boxes converts nothing."""
    return Geometry(
        width=width,
        height=height,
        frame_width=width,
        frame_height=height,
        resized_width=width,
        resized_height=height,
    )


def _scaled(box: Box, x: float, y: float) -> Box:
    return Box(box.label, box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y, box.image)


class WholeReference:
    """The whole checkpoint in memory, float32, answering with transformers' own ``generate``."""

    chunk = 1

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._torch = load_library("torch")
        transformers = load_library("transformers")
        transformers.utils.logging.disable_progress_bar()
        loader = transformers.Qwen3VLForConditionalGeneration
        self._processor = _Processor(checkpoint)
        self._model: Any = loader.from_pretrained(
            checkpoint.path, dtype=self._torch.float32, attn_implementation="sdpa"
        ).eval()
        self._eos = list(checkpoint.config.eos_token_ids)

    def trace(self, cases: Sequence[Case], draft: Draft, max_new_tokens: int) -> list[Trace]:
        """See ``Reference``; ``draft`` is not needed."""
        return [self._trace(case, max_new_tokens) for case in cases]

    def _trace(self, case: Case, max_new_tokens: int) -> Trace:
        prepared = self._processor.prepare(case)
        with self._torch.no_grad():
            features = tuple(
                self._features(patches, grid)
                for patches, grid in zip(prepared.patches, prepared.grids, strict=True)
            )
            tokens, logits = self._generate(prepared, max_new_tokens)
        return self._processor.finish(case, prepared, features, tokens, logits)

    def _features(self, patches: Array, grid: tuple[int, int, int]) -> Array:
        torch = self._torch
        seen = self._model.model.visual(torch.tensor(patches), grid_thw=torch.tensor([grid]))
        rows = torch.cat([seen.pooler_output, *seen.deepstack_features], dim=1)
        return np.ascontiguousarray(rows.numpy())

    def _generate(self, prepared: _Prepared, max_new_tokens: int) -> tuple[list[int], Array]:
        torch, model, length = self._torch, self._model, self._processor.length
        ids = torch.tensor([prepared.ids])
        images = {}
        if prepared.grids:
            images = {
                "pixel_values": torch.tensor(np.concatenate(prepared.patches)),
                "image_grid_thw": torch.tensor(prepared.grids),
            }
        padding = range(length, model.config.text_config.vocab_size)
        settings = load_library("transformers").GenerationConfig(
            do_sample=False,  # nothing of the checkpoint's own sampling settings
            pad_token_id=self._eos[0],
            max_new_tokens=max_new_tokens,
            eos_token_id=self._eos,
            suppress_tokens=list(padding) or None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        result = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            **images,
            generation_config=settings,
        )
        return result.sequences[0, len(prepared.ids) :].tolist(), torch.cat(result.logits).numpy()

    def describe(self) -> dict[str, Any]:
        """See ``Reference``."""
        return _describe("whole model in memory")


@dataclass(slots=True, eq=False)
class _Pursuit:
    """One case on its way to the reference's greedy answer: the guess, and what is known so far."""

    case: Case
    prepared: _Prepared
    guess: tuple[int, ...]
    features: tuple[Array, ...] = ()
    tokens: tuple[int, ...] = ()
    logits_TV: Array | None = None
    complete: bool = False


class StreamedReference:
    """One layer in memory at a time, many cases at once.

    Generating token by token would read all weights once per token. Instead a guess is checked:
    where the reference's own most likely token differs from the guess, that token is taken and the
    rest is guessed anew. What comes out is the reference's greedy answer, whatever the guesses.
    """

    chunk = 32

    def __init__(self, checkpoint: Checkpoint) -> None:
        load_library("torch")
        self._checkpoint = checkpoint
        self._processor = _Processor(checkpoint)
        self._eos = set(checkpoint.config.eos_token_ids)

    def trace(self, cases: Sequence[Case], draft: Draft, max_new_tokens: int) -> list[Trace]:
        """See ``Reference``."""
        pursuits = [
            _Pursuit(
                case, self._processor.prepare(case), self._cut(draft(case, ()), max_new_tokens)
            )
            for case in cases
        ]
        for _ in range(_MAX_ROUNDS):
            running = [each for each in pursuits if not each.complete]
            if not running:
                break
            for each, output in zip(running, self._forward(running), strict=True):
                self._advance(each, *output, draft, max_new_tokens)
        return [self._finish(each) for each in pursuits]

    def _advance(
        self,
        pursuit: _Pursuit,
        features: tuple[Array, ...],
        logits_TV: Array,
        draft: Draft,
        max_new_tokens: int,
    ) -> None:
        """Take the guess as far as it was right, and the reference's own token after it."""
        best = logits_TV[:, : self._processor.length].argmax(axis=1).tolist()
        pairs = enumerate(zip(pursuit.guess, best, strict=True))
        right = next((index for index, (a, b) in pairs if a != b), len(best))
        tokens = self._cut((*pursuit.guess[:right], *best[right : right + 1]), max_new_tokens)
        pursuit.features, pursuit.tokens = features, tokens
        pursuit.logits_TV = logits_TV[: len(tokens)]
        pursuit.complete = tokens[-1] in self._eos or len(tokens) == max_new_tokens
        if not pursuit.complete:
            # One token more than is known, or a round would bring nothing.
            pursuit.guess = self._cut(draft(pursuit.case, tokens), max_new_tokens)

    def _finish(self, pursuit: _Pursuit) -> Trace:
        assert pursuit.logits_TV is not None
        return self._processor.finish(
            pursuit.case,
            pursuit.prepared,
            pursuit.features,
            pursuit.tokens,
            pursuit.logits_TV,
            complete=pursuit.complete,
        )

    def _cut(self, tokens: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
        """``tokens`` up to the first that ends an answer."""
        ends = [index + 1 for index, token in enumerate(tokens) if token in self._eos]
        return tokens[: min([max_new_tokens, *ends])]

    def _forward(self, running: Sequence[_Pursuit]) -> Iterator[tuple[tuple[Array, ...], Array]]:
        """Features, and the logits before each token of the guess."""
        from medmo_edge.calibration.streamed import Prompt, forward
        from medmo_edge.preprocess import resize

        settings = self._checkpoint.preprocessing
        prompts = []
        for each in running:
            start = len(each.prepared.ids) - 1
            prompts.append(
                Prompt(
                    ids=[*each.prepared.ids, *each.guess[:-1]],
                    images=[resize(frame.pixels, settings) for frame in each.case.frames],
                    positions=range(start, start + len(each.guess)),
                )
            )
        for output in forward(self._checkpoint, prompts):
            yield output.features, output.logits

    def describe(self) -> dict[str, Any]:
        """See ``Reference``."""
        return _describe("layer by layer")


class Remembered:
    """Another reference's traces, computed once: for several artifacts over the same samples."""

    def __init__(self, inner: Reference) -> None:
        self._inner = inner
        self._known: dict[tuple[str, int], Trace] = {}
        self.chunk = inner.chunk

    def trace(self, cases: Sequence[Case], draft: Draft, max_new_tokens: int) -> list[Trace]:
        """See ``Reference``."""
        new = [case for case in cases if (case.sample.id, max_new_tokens) not in self._known]
        if new:
            traces = self._inner.trace(new, draft, max_new_tokens)
            for case, trace in zip(new, traces, strict=True):
                self._known[case.sample.id, max_new_tokens] = trace
        return [self._known[case.sample.id, max_new_tokens] for case in cases]

    def describe(self) -> dict[str, Any]:
        """See ``Reference``."""
        return self._inner.describe()


def open_reference(checkpoint: Checkpoint, free_bytes: int, taken_bytes: int) -> Reference:
    """The whole model when its float32 weights fit into ``free_bytes`` beside ``taken_bytes``.

    Errors: UsageError when torch or transformers is missing.
    """
    needed = 4 * checkpoint.num_parameters * 1.15 + (1 << 30)  # activations, libraries
    fits = needed + taken_bytes < free_bytes
    return WholeReference(checkpoint) if fits else StreamedReference(checkpoint)


def load_library(name: str) -> Any:
    """Import torch or transformers. Errors: UsageError naming the extra."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"comparing with a checkpoint needs {name} ({error}): pip install 'medmo-edge[train]', "
            "or use --on-device, which needs neither"
        ) from error


def _describe(how: str) -> dict[str, Any]:
    return {
        "transformers": metadata.version("transformers"),
        "torch": metadata.version("torch"),
        "precision": "float32",
        "how": how,
    }
