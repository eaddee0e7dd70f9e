"""Square pixels: which frames are enlarged, and by how much."""

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medmo_edge.dicom_attributes import FrameAttributes
from medmo_edge.dicom_square import resample, square_size
from medmo_edge.errors import ImageError


def attributes(**elements: list[str]) -> FrameAttributes:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return FrameAttributes(dataset=made, groups=(), little_endian=True, signed=False)


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        (["4", "3"], (60, 80)),  # vertical\horizontal: a pixel is taller than wide
        (["1", "2"], (120, 60)),
        (["1", "1"], (60, 60)),
        (["1001", "1000"], (60, 60)),
    ],
)
def test_the_axis_of_the_longer_side_grows(ratio: list[str], size: tuple[int, int]) -> None:
    facts = attributes(PixelAspectRatio=ratio)
    assert square_size(60, 60, facts) == size
    assert bool(facts.notes) == (size != (60, 60))


def test_an_absurd_ratio_is_ignored_with_a_note() -> None:
    facts = attributes(PixelAspectRatio=["1", "30000"])
    assert square_size(60, 60, facts) == (60, 60)
    assert facts.notes == ["PixelAspectRatio 1:30000 ignored"]


@pytest.mark.parametrize("ratio", [["0", "1"], ["-1", "1"]])
def test_an_impossible_ratio_changes_nothing(ratio: list[str]) -> None:
    assert square_size(60, 60, attributes(PixelAspectRatio=ratio)) == (60, 60)


def test_an_enlarged_frame_has_the_same_limit() -> None:
    with pytest.raises(ImageError, match="above the limit"):
        square_size(8000, 8000, attributes(PixelAspectRatio=["4", "1"]))


def test_anisotropic_spacing_is_noted_and_left_alone() -> None:
    facts = attributes(PixelSpacing=["1.0", "0.5"])
    assert square_size(60, 60, facts) == (60, 60)
    assert facts.notes == ["pixels are 1 x 0.5 mm (rows x columns): shown as stored"]


def test_resampling_keeps_a_ramp_a_ramp() -> None:
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[:, np.newaxis], 5, axis=1)
    assert resample(ramp, (5, 60)) is ramp
    tall = resample(ramp, (5, 120)).astype(int)
    assert tall.shape == (120, 5)
    assert np.abs(tall[4:-4, 0] - (np.arange(4, 116) * 2 - 1)).max() <= 1
