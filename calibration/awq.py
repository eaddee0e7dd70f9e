"""AWQ: scale input channels before rounding weights, so that the channels that matter lose least.

For each group of linears that read one input, channels are multiplied by s = mean|x|^a and whatever
makes the input is divided by s: the same function in exact arithmetic, another rounding. The
exponent a is searched on a grid, a = 0 (no change) included, for the smallest expected squared
error of the outputs under the record's channel statistics (channels taken as uncorrelated). What
rounding does is the caller's function, so any weight format can be searched for. Needs no torch and
runs no forward pass. Source of the method: Lin et al., AWQ, arXiv 2306.00978.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medmo_edge.calibration.record import Record
from medmo_edge.calibration.statistics import LinearStats
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import CalibrationError
from medmo_edge.model_config import TextConfig

Vector = NDArray[np.float32]
Rows = NDArray[np.float32]
#: rows [n, in] of a weight as they come back after having been stored
RoundTrip = Callable[[Rows], Rows]

_PREFIX = "model.language_model.layers"
_GRID = 20  # exponents 0, 1/20, ... 1
_FLOOR = 1e-4  # of the largest mean |x|: channels below are treated as that large
_MAX_ROWS = 512  # of each matrix, evenly spaced, are enough to compare exponents


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the search found for one group: the exponent, and error left of the unscaled one's."""

    exponent: float
    error_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Scales by tensor name. ``columns`` multiplies input channels of a matrix; ``rows`` divides
    its output channels, or the entries of a norm's weight. ``choices`` is by the group's reader.
    """

    columns: Mapping[str, Vector] = field(default_factory=dict)
    rows: Mapping[str, Vector] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Group:
    """``readers`` share one input, which ``maker`` (a norm, or a linear's rows) produces.

    ``repeats`` is how many query heads share one row of the maker, 1 where it is not attention.
    """

    maker: str
    readers: tuple[str, ...]
    repeats: int = 1


def search(
    checkpoint: Checkpoint,
    record: Record,
    round_trip: RoundTrip,
    progress: Callable[[int, int], None] | None = None,
) -> Scales:
    """Scales for all matrices of the language model's layers; ``progress`` gets (layers, of all).

    Errors: CalibrationError when the record was made from another checkpoint or lacks a layer.
    """
    record.check_belongs(checkpoint)
    text = checkpoint.config.text
    rows: dict[str, Vector] = {}
    choices: dict[str, Choice] = {}
    for layer in range(text.num_layers):
        for group in _groups(layer, text):
            choice, scale = _search_group(checkpoint, record, group, round_trip)
            choices[group.readers[0]] = choice
            if choice.exponent:
                rows[f"{group.maker}.weight"] = scale
        if progress:
            progress(layer + 1, text.num_layers)
    return Scales(columns=columns_of(rows, text), rows=rows, choices=choices)


def columns_of(rows: Mapping[str, Vector], text: TextConfig) -> dict[str, Vector]:
    """The column scales that undo ``rows``: those of every matrix that reads what a row makes."""
    columns: dict[str, Vector] = {}
    for layer in range(text.num_layers):
        for group in _groups(layer, text):
            scale = rows.get(f"{group.maker}.weight")
            if scale is not None:
                spread = _spread(scale, group.repeats, text.head_dim)
                columns |= {f"{name}.weight": spread for name in group.readers}
    return columns


def _groups(layer: int, text: TextConfig) -> Iterator[_Group]:
    attention, mlp = f"{_PREFIX}.{layer}.self_attn", f"{_PREFIX}.{layer}.mlp"
    norms = f"{_PREFIX}.{layer}"
    yield _Group(
        f"{norms}.input_layernorm",
        (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
    )
    repeats = text.num_heads // text.num_kv_heads
    yield _Group(f"{attention}.v_proj", (f"{attention}.o_proj",), repeats)
    yield _Group(f"{norms}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"))
    yield _Group(f"{mlp}.up_proj", (f"{mlp}.down_proj",))


def _search_group(
    checkpoint: Checkpoint, record: Record, group: _Group, round_trip: RoundTrip
) -> tuple[Choice, Vector]:
    """The best exponent and its scale, one value per row of the maker."""
    text = checkpoint.config.text
    stats = _stats(record, group.readers[0])
    weights = [_some_rows(checkpoint, f"{name}.weight") for name in group.readers]
    base = _gathered(stats.mean_abs, group.repeats, text.head_dim)
    best, least, plain = 0.0, np.inf, np.inf
    for step in range(_GRID + 1):
        exponent = step / _GRID
        spread = _spread(_scale(base, exponent), group.repeats, text.head_dim)
        error = sum(_error(rows, spread, stats.mean_sq, round_trip) for rows in weights)
        plain = error if step == 0 else plain
        if error < least:
            best, least = exponent, error
    ratio = least / plain if plain > 0 else 1.0
    return Choice(exponent=best, error_ratio=ratio), _scale(base, best)


def _stats(record: Record, name: str) -> LinearStats:
    stats = record.linears.get(name)
    if stats is None or not stats.amax > 0:
        what = "has no entry" if stats is None else "saw only zeros"
        raise CalibrationError(f"{record.path}: {name} {what}: calibrate again with more samples")
    return stats


def _some_rows(checkpoint: Checkpoint, name: str) -> Rows:
    """At most _MAX_ROWS rows of a matrix, evenly spaced."""
    out, width = checkpoint.tensors[name].shape
    step = max(1, out // _MAX_ROWS)
    blocks = checkpoint.row_blocks(name, 4 * width * step)
    return np.concatenate([block[:1] for block in blocks])


def _scale(base: Vector, exponent: float) -> Vector:
    """base^exponent around 1: the geometric mean of its extremes is 1."""
    raised: Vector = np.maximum(base, _FLOOR * base.max()) ** np.float32(exponent)
    scale: Vector = (raised / np.sqrt(raised.max() * raised.min())).astype(np.float32)
    return scale


def _error(rows: Rows, scale: Vector, mean_sq: Vector, round_trip: RoundTrip) -> float:
    """Expected squared error of the outputs of these rows."""
    lost = round_trip(rows * scale) / scale - rows
    return float((lost * lost).sum(0, dtype=np.float64) @ mean_sq.astype(np.float64))


def _gathered(values: Vector, repeats: int, head_dim: int) -> Vector:
    """Per channel of a key-value head, the mean over the query heads that read it."""
    if repeats == 1:
        return values
    gathered: Vector = values.reshape(-1, repeats, head_dim).mean(1).reshape(-1)
    return gathered


def _spread(scale: Vector, repeats: int, head_dim: int) -> Vector:
    """The inverse of gathering: every query head gets its key-value head's scales."""
    if repeats == 1:
        return scale
    spread: Vector = np.repeat(scale.reshape(-1, 1, head_dim), repeats, axis=1).reshape(-1)
    return spread
