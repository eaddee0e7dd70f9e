"""Verifiable rewards for reinforcement learning: the table, their weighted sum, TRL's signature.

Importing this needs neither torch nor TRL. Each reward judges one completion against one sample and
gives 0..1, or None where it does not apply. No model judges; nothing rewards length, style or
reasoning.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from medmo_edge.boxes import Box, Coords, Geometry, Parsed, parse_boxes
from medmo_edge.errors import RecipeError, SampleError
from medmo_edge.evaluation.items import LETTERS
from medmo_edge.samples import Sample, target_text
from medmo_edge.train.rewards_boxes import (
    FLOOR,
    FN_WEIGHT,
    FP_WEIGHT,
    box_reward,
    count_reward,
    distinct_reward,
    format_reward,
    iou_reward,
    label_reward,
    labelled_box_reward,
)
from medmo_edge.train.rewards_facts import (
    findings_reward,
    is_quantity,
    number_reward,
    option_reward,
    yes_no_reward,
)

__all__ = [
    "DEFAULT_WEIGHTS",
    "FLOOR",
    "FN_WEIGHT",
    "FP_WEIGHT",
    "REWARDS",
    "Case",
    "box_reward",
    "case_of",
    "columns",
    "combine",
    "count_reward",
    "distinct_reward",
    "findings_reward",
    "format_reward",
    "iou_reward",
    "label_reward",
    "labelled_box_reward",
    "number_reward",
    "option_reward",
    "require_applicable",
    "trl_reward",
    "yes_no_reward",
]

COORDS: Coords = "norm1000"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One completion with what its sample says of the truth.

    ``boxes`` is None where the task is not to locate; ``target`` is a report's or caption's text.
    Overlaps below ``iou_threshold`` earn nothing in the reward ``iou``.
    """

    text: str
    sample_id: str = ""
    boxes: tuple[Box, ...] | None = None
    geometries: tuple[Geometry, ...] = ()
    coords: Coords = COORDS
    answer: str | None = None
    choices: tuple[str, ...] = ()
    target: str | None = None
    iou_threshold: float = 0.0

    @cached_property
    def parsed(self) -> Parsed:
        """The boxes of the completion in source pixels, and what could not be read as one."""
        return parse_boxes(self.text, self.geometries, self.coords)

    @cached_property
    def claimed(self) -> tuple[Box, ...]:
        """The boxes that count against the answer: an unreadable one is a box without area."""
        unread = tuple(Box("", 0, 0, 0, 0) for _ in self.parsed.rejected)
        return (*self.parsed.boxes, *unread)

    @property
    def sizes(self) -> list[tuple[float, float]]:
        """(width, height) of every picture in source pixels."""
        return [(geometry.width, geometry.height) for geometry in self.geometries]


Reward = Callable[[Case], float | None]


def _box(case: Case) -> float | None:
    if case.boxes is None:
        return None
    return labelled_box_reward(case.claimed, case.boxes, sizes=case.sizes, floor=FLOOR)


def _iou(case: Case) -> float | None:
    if case.boxes is None:
        return None
    return iou_reward(case.claimed, case.boxes, threshold=case.iou_threshold)


def _on_boxes(reward: Callable[[Sequence[Box], Sequence[Box]], float]) -> Reward:
    return lambda case: None if case.boxes is None else reward(case.claimed, case.boxes)


def _format(case: Case) -> float | None:
    if case.boxes is None:
        return None
    return format_reward(case.text, case.boxes, geometries=case.geometries, coords=case.coords)


def _option(case: Case) -> float | None:
    if not case.choices or case.answer is None:
        return None
    return option_reward(case.text, _letter(case.answer, case.choices), case.choices)


def _letter(answer: str, choices: Sequence[str]) -> str:
    """The letter of the right option, which a sample may also give as the option's text."""
    known = tuple(LETTERS[: len(choices)])
    if answer.strip().upper() in known:
        return answer.strip().upper()
    fitting = [letter for letter, text in zip(known, choices, strict=True) if text == answer]
    if len(fitting) != 1:
        raise ValueError(f"its answer {answer[:60]!r} is none, or several, of its choices")
    return fitting[0]


def _yes_no(case: Case) -> float | None:
    plain = (case.answer or "").strip(" .").lower()
    return None if case.choices or plain not in ("yes", "no") else yes_no_reward(case.text, plain)


def _number(case: Case) -> float | None:
    if case.choices or case.answer is None or not is_quantity(case.answer):
        return None
    return number_reward(case.text, case.answer)


def _findings(case: Case) -> float | None:
    return None if case.target is None else findings_reward(case.text, case.target)


REWARDS: dict[str, Reward] = {
    "box": _box,
    "iou": _iou,
    "label": _on_boxes(label_reward),
    "count": _on_boxes(count_reward),
    "format": _format,
    "distinct": _on_boxes(distinct_reward),
    "option": _option,
    "yes_no": _yes_no,
    "number": _number,
    "findings": _findings,
}

#: MedMO's weights are not published; these are ours. A task uses those that apply to it.
DEFAULT_WEIGHTS: dict[str, float] = {
    "box": 0.4,
    "iou": 0.3,
    "label": 0.1,
    "count": 0.1,
    "format": 0.05,
    "distinct": 0.05,
    "option": 1.0,
    "yes_no": 1.0,
    "number": 1.0,
    "findings": 1.0,
}


def judge(name: str, case: Case) -> float | None:
    """One reward of one completion.

    Errors: SampleError naming reward and sample when the reward fails or leaves 0..1; RecipeError
    for an unknown name.
    """
    if name not in REWARDS:
        raise RecipeError(f"reward {name!r} is unknown: use {', '.join(REWARDS)}")
    try:
        value = REWARDS[name](case)
    except Exception as error:  # data no reward foresaw; the run must say which sample
        what = " ".join(str(error).split())[:200]
        raise SampleError(
            f"reward {name!r} failed on sample {case.sample_id!r} "
            f"({type(error).__name__}: {what}): put the sample right or leave it out"
        ) from error
    if value is not None and not -1e-9 <= value <= 1 + 1e-9:
        raise SampleError(f"reward {name!r} gave {value} on sample {case.sample_id!r}, not 0..1")
    return value


def combine(case: Case, weights: Mapping[str, float] | None = None) -> float | None:
    """The weighted mean of the rewards that apply, 0..1; None when none does. Errors: as judge."""
    chosen = DEFAULT_WEIGHTS if weights is None else weights
    values = [(weight, judge(name, case)) for name, weight in chosen.items() if weight > 0]
    known = [(weight, value) for weight, value in values if value is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if known else None


def case_of(sample: Sample, geometries: Sequence[Geometry] = (), coords: Coords = COORDS) -> Case:
    """What ``sample`` says of the truth, without a completion."""
    texts = ("report", "caption")
    return Case(
        text="",
        sample_id=sample.id,
        boxes=sample.boxes if sample.task == "locate" else None,
        geometries=tuple(geometries),
        coords=coords,
        answer=sample.answer,
        choices=sample.choices,
        target=target_text(sample) if sample.task in texts else None,
    )


def columns(
    sample: Sample, geometries: Sequence[Geometry] = (), coords: Coords = COORDS
) -> dict[str, Any]:
    """What a data set row must carry so that ``trl_reward`` can judge it: plain JSON values."""
    case = case_of(sample, geometries, coords)
    return {
        "sample_id": case.sample_id,
        "boxes": None if case.boxes is None else [*map(_box_values, case.boxes)],
        "geometries": [_geometry_values(geometry) for geometry in geometries],
        "coords": coords,
        "answer": case.answer,
        "choices": list(case.choices),
        "target": case.target,
    }


_SIDES = ("width", "height", "frame_width", "frame_height", "resized_width", "resized_height")


def _box_values(box: Box) -> dict[str, Any]:
    """Floats only: a table column has one type."""
    return {"label": box.label, "image": box.image, "xyxy": [float(value) for value in box.xyxy]}


def _geometry_values(geometry: Geometry) -> list[int]:
    return [getattr(geometry, name) for name in _SIDES]


def trl_reward(
    weights: Mapping[str, float] | None = None,
    *,
    iou_threshold: Callable[[float], float] = lambda progress: 0.0,
) -> Callable[..., list[float | None]]:
    """A reward function for TRL's trainers: ``f(prompts, completions, completion_ids, **kwargs)``.

    ``kwargs`` has the ``columns`` of every row as lists. Pass one function per reward (weights with
    one name) to have each logged, or one for their mean. ``iou_threshold`` gives the overlap below
    which ``iou`` earns nothing from the part of all steps that is done. Errors of the function:
    SampleError.
    """
    chosen = dict(DEFAULT_WEIGHTS if weights is None else weights)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        threshold = iou_threshold(_progress(kwargs.get("trainer_state")))
        cases = _cases(completions, kwargs)
        return [combine(replace(case, iou_threshold=threshold), chosen) for case in cases]

    reward.__name__ = next(iter(chosen)) if len(chosen) == 1 else "medmo"
    return reward


def _progress(state: Any) -> float:
    """The part of its steps that a trainer has done; 0 where it does not say."""
    return state.global_step / state.max_steps if state is not None and state.max_steps > 0 else 0.0


def _cases(completions: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Case]:
    names = ("sample_id", "boxes", "geometries", "coords", "answer", "choices", "target")
    if missing := [name for name in names if name not in kwargs]:
        raise SampleError(
            f"the data set has no column {missing[0]!r}: make its rows with columns()"
        )
    rows = zip(*(kwargs[name] for name in names), strict=True)
    return [_case(said, *row) for said, row in zip(completions, rows, strict=True)]


def _case(
    said: Any,
    sample_id: str,
    boxes: list[dict[str, Any]] | None,
    geometries: list[list[int]] | None,
    coords: Coords,
    answer: str | None,
    choices: list[str] | None,
    target: str | None,
) -> Case:
    text = said if isinstance(said, str) else "".join(str(turn["content"]) for turn in said)
    return Case(
        text=text,
        sample_id=sample_id,
        boxes=None if boxes is None else tuple(map(_read_box, boxes)),
        geometries=tuple(
            Geometry(**dict(zip(_SIDES, values, strict=True))) for values in geometries or []
        ),
        coords=coords,
        answer=answer,
        choices=tuple(choices or ()),
        target=target,
    )


def _read_box(value: Mapping[str, Any]) -> Box:
    x1, y1, x2, y2 = value["xyxy"]
    return Box(value["label"], x1, y1, x2, y2, value["image"])


def require_applicable(weights: Mapping[str, float], cases: Iterable[Case]) -> None:
    """Refuse a data set that has nothing to judge a chosen reward by.

    Errors: RecipeError naming the first reward that applies to no case.
    """
    waiting = [name for name, weight in weights.items() if weight > 0]
    count = 0
    for case in cases:
        count += 1
        waiting = [name for name in waiting if judge(name, case) is None]
        if not waiting:
            return
    if waiting:
        raise RecipeError(
            f"reward {waiting[0]!r} applies to none of {count} samples: they have no answer for it "
            "(add the data, or take it out of the recipe)"
        )
