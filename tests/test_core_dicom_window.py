"""VOI curves against the tables of PS3.3 C.11.2.1, and the choice between them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.dicom_window import (
    DEFAULT_PRESETS,
    PRESETS,
    Function,
    Lut,
    Range,
    Subject,
    View,
    Window,
    checked_window,
    choose_view,
)
from medmo_edge.errors import ImageError

# (function, center, width) -> value: grey, from the formulas and notes of PS3.3 C.11.2.1.2 and .3.
TABLE: dict[tuple[Function, float, float], dict[float, float]] = {
    ("LINEAR", 2048, 4096): {-1: 0, 0: 0, 1: 1 / 4095, 2048: 2048 / 4095, 4095: 1, 4096: 1},
    ("LINEAR", 2048, 1): {2047: 0, 2047.5: 0, 2048: 1},
    ("LINEAR", 0, 100): {-51: 0, -50: 0, -49: 1 / 99, 0: 50 / 99, 48: 98 / 99, 49: 1, 50: 1},
    ("LINEAR", 0, 1): {-1: 0, -0.5: 0, 0: 1},
    ("LINEAR_EXACT", 2048, 4096): {0: 0, 1: 1 / 4096, 2048: 0.5, 4095: 4095 / 4096, 4096: 1},
    ("LINEAR_EXACT", 2048, 1): {2047: 0, 2047.5: 0, 2048: 0.5, 2048.5: 1, 2049: 1},
    ("LINEAR_EXACT", 0, 100): {-50: 0, -25: 0.25, 0: 0.5, 50: 1},
    ("LINEAR_EXACT", 0.5, 0.5): {0.25: 0, 0.5: 0.5, 0.75: 1},
    ("SIGMOID", 2048, 4096): {
        -1e9: 0,
        0: 1 / (1 + math.exp(2)),
        2048: 0.5,
        4096: 1 / (1 + math.exp(-2)),
        1e9: 1,
    },
}


@pytest.mark.parametrize(("curve", "expected"), TABLE.items())
def test_curves_follow_the_standard(
    curve: tuple[Function, float, float], expected: dict[float, float]
) -> None:
    function, center, width = curve
    shaded = Window(center, width, function).shade(np.array(list(expected), np.float64))
    np.testing.assert_allclose(shaded, list(expected.values()), atol=1e-12)


@given(
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    st.floats(-1e6, 1e6),
    st.floats(1, 1e6),
    st.lists(st.floats(-1e9, 1e9), min_size=2),
)
def test_every_window_is_monotonic_within_bounds(
    function: Function, center: float, width: float, values: list[float]
) -> None:
    shaded = Window(center, width, function).shade(np.sort(np.array(values)))
    assert (np.diff(shaded) >= 0).all()
    assert shaded.min() >= 0
    assert shaded.max() <= 1


def test_a_range_shows_both_ends_and_survives_the_extremes() -> None:
    huge = np.finfo(np.float64).max
    shaded = Range(-huge, huge).shade(np.array([-huge, 0, huge, np.nan, np.inf]))
    np.testing.assert_allclose(shaded, [0, 0.5, 1, 0, 1])
    assert Range(7, 7).shade(np.array([6.0, 7.0, 8.0])).tolist() == [0, 0, 1]


def test_a_lut_extends_its_end_entries() -> None:
    lut = Lut(-1, np.array([0, 100, 255], np.uint16), 8)
    looked_up = lut.look_up(np.array([-9.0, -1, 0, 1, 9]))
    assert looked_up.tolist() == [0, 0, 100, 255, 255]
    np.testing.assert_allclose(lut.shade(np.array([0.0])), 100 / 255)


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [(0, 0, "LINEAR"), (0, 0.5, "LINEAR"), (0, 0, "LINEAR_EXACT"), (0, -1, "SIGMOID")],
)
def test_widths_a_function_cannot_use_are_refused(
    center: float, width: float, function: Function
) -> None:
    with pytest.raises(ImageError, match="cannot be used"):
        checked_window(center, width, function)


def subject(*, hounsfield: bool = False, body_part: str = "", shallow: bool = False) -> Subject:
    return Subject(
        hounsfield=hounsfield,
        modality="CT" if hounsfield else "MR",
        body_part=body_part,
        stored_range=Range(0, 255) if shallow else None,
        frame_range=Range(3, 90),
    )


VIEWS = (
    View(curve=Window(40, 400), origin="file window", explanation="ABDOMEN^1", index=0),
    View(curve=Window(-600, 1600), origin="file window", explanation="Lung", index=1),
)


def test_the_first_view_of_the_file_is_the_default() -> None:
    assert choose_view(None, VIEWS, subject(hounsfield=True)) is VIEWS[0]


def test_views_are_picked_by_number_and_by_their_own_name() -> None:
    assert choose_view(1, VIEWS, subject()) is VIEWS[1]
    # The file's own name wins over the preset of that name.
    assert choose_view("lung", VIEWS, subject(hounsfield=True)) is VIEWS[1]
    with pytest.raises(ImageError, match="has 2 window.*no window 2"):
        choose_view(2, VIEWS, subject())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_need_hounsfield_units(name: str) -> None:
    view = choose_view(name.upper().replace("-", " "), (), subject(hounsfield=True))
    assert view.curve == Window(*PRESETS[name])
    assert view.origin == f"preset {name}"
    with pytest.raises(ImageError, match="Hounsfield"):
        choose_view(name, (), subject())


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ImageError, match="unknown.*Lung.*auto.*brain"):
        choose_view("heart", VIEWS, subject(hounsfield=True))


def test_an_asked_window_is_linear() -> None:
    assert choose_view((50, 350), VIEWS, subject()).curve == Window(50, 350, "LINEAR")
    with pytest.raises(ImageError, match="cannot be used"):
        choose_view((50, float("nan")), VIEWS, subject())


def test_defaults_without_any_window_of_the_file() -> None:
    head = choose_view(None, (), subject(hounsfield=True, body_part="HEAD"))
    assert head.curve == Window(*PRESETS["brain"])
    other = choose_view(None, (), subject(hounsfield=True, body_part="WHOLEBODY"))
    assert other.curve == Window(*PRESETS["soft-tissue"])
    assert choose_view(None, (), subject(shallow=True)).curve == Range(0, 255)
    assert choose_view(None, (), subject()).curve == Range(3, 90)
    assert choose_view("auto", VIEWS, subject(shallow=True)).curve == Range(3, 90)


def test_every_default_preset_exists() -> None:
    assert set(DEFAULT_PRESETS.values()) <= set(PRESETS)
