"""What is counted about the inputs of a linear layer, and how exactly.

Maxima and channel sums are exact up to float64 rounding, added in a fixed order. Percentiles come
from a histogram whose 32,768 bins are the upper 16 bits of |x| in float32, that is |x| cut to
bfloat16: bins are the same for every layer and run, counts add up in any order, and a percentile is
the lower edge of its bin, at most 2^-7 (0.8 %) below the true value and exact for bfloat16 inputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

PERCENTILES = (0.999, 0.9999)
_BINS = 1 << 15
_ROWS = 512  # at a time: the float64 copies of a wide input stay below 50 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStats:
    """The inputs of one linear over all samples, and its weight.

    ``amax``, ``p999``, ``p9999``: largest |x|, and the values below which 99.9 % and 99.99 % of all
    |x| lie. Per input channel, float32 [in]: ``sum_sq`` of x squared, ``mean_abs`` of |x|.
    ``weight_amax``: largest |weight|. Counts are rows seen: tokens of text and of images (in the
    vision tower every patch counts as image).
    """

    amax: float
    p999: float
    p9999: float
    sum_sq: NDArray[np.float32]
    mean_abs: NDArray[np.float32]
    weight_amax: float
    count_text: int
    count_image: int

    @property
    def count(self) -> int:
        """Rows seen in all."""
        return self.count_text + self.count_image

    @property
    def mean_sq(self) -> NDArray[np.float32]:
        """Mean of x squared per input channel, the form importance matrices have."""
        return self.sum_sq / np.float32(self.count)


def stats_from(values: Mapping[str, Any]) -> LinearStats:
    """The statistics of a linear from plain values, as JSON or a record keep them.

    Errors: KeyError, TypeError or ValueError for values that are missing or of another kind.
    """
    return LinearStats(
        amax=float(values["amax"]),
        p999=float(values["p999"]),
        p9999=float(values["p9999"]),
        sum_sq=np.asarray(values["sum_sq"], np.float32),
        mean_abs=np.asarray(values["mean_abs"], np.float32),
        weight_amax=float(values["weight_amax"]),
        count_text=int(values["count_text"]),
        count_image=int(values["count_image"]),
    )


class Tally:
    """Adds up the inputs of one linear, batch of rows by batch of rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._amax = 0.0
        self._counts = {"text": 0, "image": 0}
        self._sums: Any = None  # float64 [2, in] on the device: x squared, |x|
        self._histogram: Any = None  # int64 [_BINS] on the device

    def add(self, x: "Tensor", num_image: int, sample: str) -> None:
        """Add rows ``x`` [rows, in], of which ``num_image`` stand for an image.

        Errors: CalibrationError for NaN or infinity, naming the ``sample``.
        """
        import torch

        if self._sums is None:
            self._sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
            self._histogram = torch.zeros(_BINS, dtype=torch.int64, device=x.device)
        for rows in torch.split(x, _ROWS):
            size = rows.to(torch.float32).abs()
            highest = float(size.max())
            if not math.isfinite(highest):
                raise CalibrationError(
                    f"{self.name}: its input is NaN or infinite for sample {sample}: the "
                    "checkpoint is damaged, or its values need float32 (--dtype float32)"
                )
            self._amax = max(self._amax, highest)
            bits = size.contiguous().view(torch.int32).flatten() >> 16
            self._histogram += torch.bincount(bits, minlength=_BINS)
            wide = size.to(torch.float64)
            self._sums[0] += wide.square().sum(0)
            self._sums[1] += wide.sum(0)
        self._counts["image"] += num_image
        self._counts["text"] += x.shape[0] - num_image

    def finish(self, weight_amax: float) -> LinearStats:
        """The statistics of everything added. Errors: CalibrationError when nothing was."""
        count = sum(self._counts.values())
        if not count:
            raise CalibrationError(f"{self.name} saw no token: calibrate with more samples")
        sums = self._sums.cpu().numpy()
        histogram = self._histogram.cpu().numpy()
        low, high = (percentile(histogram, share) for share in PERCENTILES)
        return LinearStats(
            amax=self._amax,
            p999=low,
            p9999=high,
            sum_sq=sums[0].astype(np.float32),
            mean_abs=(sums[1] / count).astype(np.float32),
            weight_amax=weight_amax,
            count_text=self._counts["text"],
            count_image=self._counts["image"],
        )


def percentile(histogram: NDArray[np.int64], share: float) -> float:
    """Lower edge of the bin that holds the value of rank ceil(share * count), counted from 1."""
    cumulative = np.cumsum(histogram)
    rank = math.ceil(share * int(cumulative[-1]))
    index = int(np.searchsorted(cumulative, max(1, rank)))
    edge: np.float32 = np.array([index << 16], np.uint32).view(np.float32)[0]
    return float(edge)
