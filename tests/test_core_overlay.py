"""Overlays: boxes land on their pixels, files appear whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmo_edge.boxes import Box
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame
from medmo_edge.overlay import COLOURS, check_overlay_path, draw_overlay, save_overlay


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _extent(picture: np.ndarray, colour: str) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((picture == np.asarray(_rgb(colour))).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_box_edges_lie_on_the_scaled_source_pixels() -> None:
    frame = Frame.from_pixels(np.zeros((200, 400, 3), np.uint8))
    picture = draw_overlay(frame, [Box("", 100, 80, 300, 160)])
    # 400 pixels are enlarged twice to reach 768; the notice adds a strip below.
    assert picture.shape == (424, 800, 3)
    assert _extent(picture, COLOURS[0]) == (200, 160, 600, 320)


def test_large_frames_keep_their_size_and_each_label_its_colour() -> None:
    frame = Frame.from_pixels(np.zeros((800, 900, 3), np.uint8))
    boxes = [Box("", 10, 400, 50, 440), Box("b", 100, 400, 150, 440), Box("", 200, 400, 250, 440)]
    picture = draw_overlay(frame, boxes)
    assert picture.shape == (824, 900, 3)
    assert _extent(picture, COLOURS[0]) == (10, 400, 250, 440)
    assert _extent(picture, COLOURS[1])[0] == 100


def test_pixels_away_from_boxes_are_the_frame() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (900, 800, 3), np.uint8)
    picture = draw_overlay(Frame.from_pixels(pixels), [Box("x", 10, 50, 60, 90)])
    np.testing.assert_array_equal(picture[100:900], pixels[100:])


def test_save_refuses_to_replace_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "overlay.png"
    pixels = np.full((4, 5, 3), 7, np.uint8)
    save_overlay(pixels, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    with pytest.raises(ImageError, match="exists already"):
        save_overlay(pixels, path)
    save_overlay(pixels, path, overwrite=True)
    with pytest.raises(ImageError, match="folder does not exist"):
        check_overlay_path(tmp_path / "no" / "o.png", overwrite=False)
    with pytest.raises(ImageError, match="is a folder"):
        check_overlay_path(tmp_path, overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["overlay.png"]
