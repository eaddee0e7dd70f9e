"""Statistics of inputs against plain numpy, for any values and any batches."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="calibrating needs the train extra")

from medmo_edge.calibration.statistics import Tally, percentile  # noqa: E402
from medmo_edge.errors import CalibrationError  # noqa: E402

VALUES = st.floats(-1e6, 1e6, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=VALUES)


def tally(*batches: NDArray[np.float32]) -> Tally:
    result = Tally("layer")
    for number, rows in enumerate(batches):
        result.add(torch.from_numpy(rows), num_image=len(rows) // 2, sample=str(number))
    return result


@given(rows=ROWS)
def test_sums_and_percentiles_hold_their_bounds(rows: NDArray[np.float32]) -> None:
    stats = tally(rows).finish(1.0)
    wide = np.abs(rows.astype(np.float64))
    assert stats.amax == wide.max()
    np.testing.assert_allclose(stats.sum_sq, (wide * wide).sum(0), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(stats.mean_abs, wide.mean(0), rtol=1e-6, atol=1e-30)
    ordered = np.sort(wide, axis=None)
    for share, found in ((0.999, stats.p999), (0.9999, stats.p9999)):
        rank = ordered[math.ceil(share * ordered.size) - 1]
        assert found <= rank
        # Below the normal numbers bins have a fixed width instead of a relative one.
        assert found >= rank * (1 - 2**-7) - 2.0**-126
    assert (stats.count_text, stats.count_image) == (len(rows) - len(rows) // 2, len(rows) // 2)


@given(rows=hnp.arrays(np.float32, 200, elements=VALUES))
def test_percentiles_of_bfloat16_numbers_are_exact(rows: NDArray[np.float32]) -> None:
    short = (rows.view(np.uint32) & 0xFFFF0000).view(np.float32)
    histogram = np.bincount(np.abs(short).view(np.uint32) >> 16, minlength=1 << 15)
    ordered = np.sort(np.abs(short))
    for share in (0.5, 0.9, 0.999, 1.0):
        assert percentile(histogram, share) == ordered[math.ceil(share * 200) - 1]


@given(parts=st.lists(ROWS, min_size=2, max_size=5), data=st.data())
def test_maxima_percentiles_and_counts_do_not_depend_on_the_order(
    parts: list[NDArray[np.float32]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(parts))
    one, other = tally(*parts).finish(0.0), tally(*shuffled).finish(0.0)
    for name in ("amax", "p999", "p9999", "count_text", "count_image"):
        assert getattr(one, name) == getattr(other, name)


def test_many_rows_are_the_same_as_few() -> None:
    rows = np.random.default_rng(0).standard_normal((1500, 3)).astype(np.float32)
    whole, parts = tally(rows).finish(0.0), tally(rows[:700], rows[700:]).finish(0.0)
    assert whole.p9999 == parts.p9999
    np.testing.assert_allclose(whole.sum_sq, parts.sum_sq, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_name_layer_and_sample(value: float) -> None:
    rows = np.array([[1, value, 2]], np.float32)
    with pytest.raises(CalibrationError, match="layer: its input is NaN or infinite for sample 0"):
        tally(rows)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="saw no token"):
        Tally("layer").finish(0.0)
