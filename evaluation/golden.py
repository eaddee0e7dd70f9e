"""Making the golden cases of an artifact while it is exported.

The expected values ("truth") are computed from the checkpoint by ``plain_forward`` in float32:
neither torch nor the artifact takes part. Where the backend runs on the exporting machine, what the
artifact itself gives is stored beside them ("exported"), and its greedy answer is what logits are
compared along; elsewhere it is a given text where boxes are asked for, and else the first token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge import __version__
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import MedmoError
from medmo_edge.evaluation.gates import Gates, read_gates
from medmo_edge.evaluation.plain_forward import Outputs, Prompt, forward
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest
from medmo_edge.phantoms import MIN_SIDE, draw
from medmo_edge.preprocess import grid_thw, num_vision_tokens, patchify, resize
from medmo_edge.prompts import (
    TASK_PROMPTS,
    ChatTemplate,
    encode_prompt,
    locate_prompt,
    user_message,
)
from medmo_edge.runtime.certified import device_class, has_quantised_tower, libraries_of
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.golden import (
    Golden,
    GoldenCase,
    Values,
    make_values,
    rounded,
    to_png,
)
from medmo_edge.runtime.observe import Observed, Observer
from medmo_edge.runtime.session import load
from medmo_edge.tokenizer import tokenizer_sha256

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_MAX_NEW_TOKENS = 32
_SAMPLED_TOKENS, _SAMPLED_COLUMNS, _LARGEST_COLUMNS, _SAMPLED_PATCH_VALUES = 16, 48, 16, 64
_TOP = 8
# Seed, width and height in vision tokens, question. Positions that are interpolated or numbered
# wrongly show in very wide and tall pictures and hide in square ones.
_CASES = (
    ("square", 7_000_001, (9, 9), locate_prompt("nodule")),
    ("wide", 7_000_002, (34, 2), "Is there a pleural effusion?"),
    ("tall", 7_000_003, (2, 33), TASK_PROMPTS["caption"]),
)
_ODD_PIXELS = 5  # more than whole tokens, so that every picture has to be resized
_BOX_QUESTIONS = (locate_prompt("nodule"),)
# Reading this text tests coordinates; what a model would say does not matter.
_BOX = (125, 250, 500, 875)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drawn:
    """A case before anything was computed."""

    name: str
    pixels: NDArray[np.uint8]
    frame: Frame
    question: str
    resized: NDArray[np.uint8]
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Own:
    """What the artifact itself made of a case."""

    features: Array
    observed: Observed


def make_golden(
    checkpoint: Checkpoint, artifact: Manifest, progress: Progress | None = None
) -> Golden:
    """Golden cases of an artifact whose files and manifest are written already.

    ``progress`` receives ("golden cases", done, all). Errors: CheckpointError.
    """
    drawn = [_draw(checkpoint, *case) for case in _CASES]
    own, origin = _ask_artifact(artifact, drawn)
    answers = [
        list(mine.observed.tokens) if mine else _given_answer(checkpoint, each)
        for each, mine in zip(drawn, own, strict=True)
    ]
    prompts = [
        Prompt(ids=[*each.prompt_ids, *answer[:-1]], images=[each.resized])
        for each, answer in zip(drawn, answers, strict=True)
    ]
    counts = [max(1, len(answer)) for answer in answers]
    report = progress or (lambda stage, done, total: None)
    outputs = forward(
        checkpoint, prompts, counts, lambda done, total: report("golden cases", done, total)
    )
    return Golden(
        source={
            "truth": f"float32 forward pass of the checkpoint, medmo-edge {__version__}",
            "checkpoint": checkpoint.identity(),
            "exported": origin,
        },
        tokenizer_sha256=tokenizer_sha256(checkpoint.tokenizer_path),
        preprocessing_sha256=checkpoint.preprocessing.sha256,
        levels=len(checkpoint.config.vision.deepstack_indexes),
        limits=_limits(read_gates(), artifact),
        cases=[
            _case(checkpoint, *parts) for parts in zip(drawn, outputs, own, answers, strict=True)
        ],
    )


def _draw(
    checkpoint: Checkpoint, name: str, seed: int, size: tuple[int, int], question: str
) -> _Drawn:
    settings = checkpoint.preprocessing
    wide, high = (max(MIN_SIDE, side * settings.factor + _ODD_PIXELS) for side in size)
    pixels = draw(seed, size=(wide, high), nodule=True).pixels
    frame = Frame.from_pixels(pixels, path=name)
    resized = resize(frame.pixels, settings)
    grid = grid_thw(resized.shape[0], resized.shape[1], settings)
    ids = encode_prompt(
        checkpoint.load_tokenizer(),
        ChatTemplate(checkpoint.chat_template),
        [user_message(question, 1)],
        [num_vision_tokens(grid, settings)],
        "<|image_pad|>",
    )
    return _Drawn(
        name=name, pixels=pixels, frame=frame, question=question, resized=resized, prompt_ids=ids
    )


def _ask_artifact(
    artifact: Manifest, drawn: Sequence[_Drawn]
) -> tuple[list[_Own | None], dict[str, Any]]:
    """What the artifact makes of the cases, and where it ran; or why it could not run here."""
    found: list[_Own | None] = []
    if artifact.backend == "trt":
        return [None] * len(drawn), {"obstacle": "its engines are built where they run"}
    try:
        with load(artifact.folder, verify=False) as session:
            observer = Observer(session)
            for each in drawn:
                asked = observer.ask([each.frame], each.question, _MAX_NEW_TOKENS)
                features = observer.look([each.frame]).features[0]
                found.append(_Own(features=features, observed=asked))
            observer.close()
            backend = session.backend
            return found, {
                "backend": backend.name,
                "device": backend.device,
                "device_class": device_class(probe(), backend.device),
                "libraries": libraries_of(backend.name),
            }
    except MedmoError as error:  # no backend, no memory: the checkpoint's values remain
        return [None] * len(drawn), {"obstacle": str(error)}


def _given_answer(checkpoint: Checkpoint, drawn: _Drawn) -> list[int]:
    """What logits are compared along where the artifact cannot answer itself: where boxes are asked
    for, the text of one, so that decoding with a cache is tested too; else the first token alone.
    """
    if drawn.question not in _BOX_QUESTIONS:
        return []
    return checkpoint.load_tokenizer().encode(_box_text(checkpoint, drawn))


def _case(
    checkpoint: Checkpoint,
    drawn: _Drawn,
    truth: Outputs,
    own: _Own | None,
    answer: Sequence[int],
) -> GoldenCase:
    length = checkpoint.load_tokenizer().length
    features, logits = truth.vision[0], truth.logits[:, :length]
    rows = _spread(len(features), _SAMPLED_TOKENS)
    columns = _columns(features, 1 + len(checkpoint.config.vision.deepstack_indexes))
    top_ids = [int(token) for token in np.argsort(-logits[0], kind="stable")[:_TOP]]
    tokens = list(answer) or top_ids[:1]

    def values(features: Array, logits: Array) -> Values:
        return make_values(features, rows, columns, logits, top_ids, tokens)

    patches = patchify(drawn.resized, checkpoint.preprocessing).reshape(-1)
    places = _spread(patches.size, _SAMPLED_PATCH_VALUES)
    return GoldenCase(
        name=drawn.name,
        png=to_png(drawn.pixels),
        question=drawn.question,
        prompt_ids=drawn.prompt_ids,
        patch_places=places,
        patches=[rounded(value) for value in patches[places]],
        rows=rows,
        columns=columns,
        top_ids=top_ids,
        tokens=tokens,
        box_text=_box_text(checkpoint, drawn),
        boxes=[_box_pixels(checkpoint, drawn)],
        truth=values(features, logits),
        exported=values(own.features, own.observed.logits_TV) if own else None,
        answer=own.observed.answer.text if own else None,
    )


def _spread(size: int, count: int) -> list[int]:
    """At most ``count`` indexes from the first to the last."""
    return sorted({int(place) for place in np.linspace(0, size - 1, count).round()})


def _columns(features_MR: Array, num_levels: int) -> list[int]:
    """The same number of columns of every level: the largest, and others evenly between."""
    width = features_MR.shape[1] // num_levels
    columns: list[int] = []
    for level in range(num_levels):
        size = np.abs(features_MR[:, level * width : (level + 1) * width]).mean(axis=0)
        order = [int(column) for column in np.argsort(-size, kind="stable")]
        largest, rest = order[:_LARGEST_COLUMNS], sorted(order[_LARGEST_COLUMNS:])
        spread = [rest[place] for place in _spread(len(rest), _SAMPLED_COLUMNS)] if rest else []
        columns += [level * width + column for column in sorted([*largest, *spread])]
    return columns


def _units(checkpoint: Checkpoint, drawn: _Drawn) -> tuple[int, int]:
    """Width and height of the picture in the units that the checkpoint writes boxes in."""
    height, width = (
        drawn.resized.shape[:2] if checkpoint.coords == "pixel_resized" else drawn.pixels.shape[:2]
    )
    return (1000, 1000) if checkpoint.coords == "norm1000" else (width, height)


def _box_text(checkpoint: Checkpoint, drawn: _Drawn) -> str:
    return f"nodule <box>[{list(_box_units(checkpoint, drawn))}]</box>"


def _box_units(checkpoint: Checkpoint, drawn: _Drawn) -> list[int]:
    width, height = _units(checkpoint, drawn)
    sides = (width, height, width, height)
    return [value * side // 1000 for value, side in zip(_BOX, sides, strict=True)]


def _box_pixels(checkpoint: Checkpoint, drawn: _Drawn) -> list[float]:
    """The same box in pixels of the picture, worked out here and not by ``boxes.to_source``."""
    height, width = drawn.pixels.shape[:2]
    wide, high = _units(checkpoint, drawn)
    sides = ((width, wide), (height, high)) * 2
    units = _box_units(checkpoint, drawn)
    return [value * side / unit for value, (side, unit) in zip(units, sides, strict=True)]


def _limits(gates: Gates, artifact: Manifest) -> dict[str, dict[str, float]]:
    own, site = gates.losses(artifact.target), gates.limits["on_device"]
    vision = gates.vision(quantised=has_quantised_tower(artifact))
    return {
        "any": {"max_patch": site["max_patch"]},
        "truth": {
            "max_mean_error": vision["max_mean_error"],
            "max_worst_error": vision["max_worst_error"],
            "max_difference": own.max_golden_difference,
        },
        "exported": {
            "max_mean_error": site["exported_mean_error"],
            "max_worst_error": site["exported_worst_error"],
            "max_difference": site["exported_max_difference"],
        },
    }
