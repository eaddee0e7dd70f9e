"""Ordinary pictures: modes, depths and orientations Pillow can write, and what must be refused."""

import hashlib
import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from medmo_edge import image_budgets
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame, read_image, sniff

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(folder: Path, image: Image.Image, name: str = "a.png", **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.gif"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, name: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (16, 9, 3), np.uint8)
    image = Image.fromarray(rgb)
    if name == "a.gif":
        image = image.quantize(144)
        rgb = np.asarray(image.convert("RGB"))
    frame = read_image(save(tmp_path, image, name, lossless=True))  # only WebP listens
    np.testing.assert_array_equal(frame.pixels, rgb)
    assert frame.pixels.flags.c_contiguous
    assert frame.pixels.flags.writeable
    assert (frame.source.width, frame.source.height) == (9, 16)


def test_provenance_of_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(RAMP), "a.jpg", quality=90)
    source = read_image(path).source
    assert source.to_dict() == {
        "path": str(path),
        "format": "jpeg",
        "width": 16,
        "height": 16,
        "frame": 0,
        "num_frames": 1,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    json.dumps(source.to_dict())


def test_grayscale_and_bilevel(tmp_path: Path) -> None:
    grey = read_image(save(tmp_path, Image.fromarray(RAMP))).pixels
    np.testing.assert_array_equal(grey, np.repeat(RAMP[..., np.newaxis], 3, axis=2))
    bits = read_image(save(tmp_path, Image.fromarray(RAMP > 99))).pixels
    assert set(np.unique(bits)) == {0, 255}


def rgba(colour: tuple[int, int, int], alpha: int) -> Image.Image:
    return Image.new("RGBA", (2, 2), (*colour, alpha))


@pytest.mark.parametrize(
    ("image", "expected", "noted"),
    [
        (rgba((10, 20, 30), 255), [10, 20, 30], False),
        (rgba((10, 20, 30), 0), [255, 255, 255], True),
        (rgba((0, 100, 255), 51), [204, 224, 255], True),  # 20 % of the colour, 80 % white
        (Image.new("LA", (2, 2), (0, 51)), [204, 204, 204], True),
        (rgba((10, 20, 30), 0).convert("PA"), [255, 255, 255], True),
    ],
)
def test_transparency_is_put_on_white(
    tmp_path: Path, image: Image.Image, expected: list[int], noted: bool
) -> None:
    name = "a.tif" if image.mode == "PA" else "a.png"
    frame = read_image(save(tmp_path, image, name))
    assert np.abs(frame.pixels.astype(int) - expected).max() <= 1
    assert ("transparency put on white" in frame.source.notes) == noted


def test_a_palette_with_one_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    pixels = read_image(save(tmp_path, image, transparency=1)).pixels
    assert pixels.tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_cmyk_is_converted_and_noted(tmp_path: Path) -> None:
    frame = read_image(save(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "a.tif"))
    assert frame.pixels[0, 0].tolist() == [255, 0, 0]
    assert frame.source.notes == ("converted from CMYK to RGB",)


@pytest.mark.parametrize(
    ("largest", "scale"), [(255, 255), (1000, 1023), (4095, 4095), (16000, 16383), (65535, 65535)]
)
def test_sixteen_bits_are_scaled_by_the_depth_that_holds_them(
    tmp_path: Path, largest: int, scale: int
) -> None:
    values = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    frame = read_image(save(tmp_path, Image.fromarray(values)))
    expected = np.floor(values * (255 / scale) + 0.5)
    np.testing.assert_array_equal(frame.pixels[..., 0], expected)
    assert frame.source.window == {"low": 0.0, "high": float(scale), "from": "bit depth"}


def test_a_sixteen_bit_twin_of_eight_bits_is_the_same_picture(tmp_path: Path) -> None:
    deep = read_image(save(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257)))
    np.testing.assert_array_equal(deep.pixels[..., 0], RAMP)


def test_windows_on_deep_pictures(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[0, 1000, 1500, 2000, 9999]], np.uint16)))
    assert read_image(path, window=(1500.5, 1001)).pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert read_image(path, window="auto").pixels[0, :, 0].tolist() == [0, 26, 38, 51, 255]
    with pytest.raises(ImageError, match="needs a DICOM file"):
        read_image(path, window="lung")
    with pytest.raises(ImageError, match="below 1"):
        read_image(path, window=(0, 0))


def test_a_window_on_eight_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="deeper than 8 bits"):
        read_image(save(tmp_path, Image.fromarray(RAMP)), window=(100, 50))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_natural_scale_take_the_range_of_the_frame(
    tmp_path: Path, dtype: type
) -> None:
    values: NDArray[Any] = np.array([[-50, 0, 50, 150]], dtype)
    frame = read_image(save(tmp_path, Image.fromarray(values), "a.tif"))
    assert frame.pixels[0, :, 0].tolist() == [0, 64, 128, 255]


def test_float_pictures_with_holes(tmp_path: Path) -> None:
    values = np.array([[np.nan, 0, 1, np.inf]], np.float32)
    frame = read_image(save(tmp_path, Image.fromarray(values), "a.tif"))
    assert frame.pixels[0, :, 0].tolist() == [0, 0, 255, 255]
    nothing = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ImageError, match="no finite value"):
        read_image(save(tmp_path, nothing, "b.tif"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int) -> None:
    """EXIF 2.32, 4.6.5: where row 0 and column 0 of the stored picture are when displayed."""
    displayed = np.zeros((4, 6), np.uint8)
    displayed[:2, :3] = 100
    displayed[:2, 3:] = 200  # corners: 100 200 / 0 0
    stored = {
        1: displayed,
        2: displayed[:, ::-1],
        3: displayed[::-1, ::-1],
        4: displayed[::-1],
        5: displayed.T,
        6: np.rot90(displayed, 1),
        7: np.rot90(displayed, 2).T,
        8: np.rot90(displayed, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    frame = read_image(save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    np.testing.assert_array_equal(frame.pixels[..., 0], displayed)
    assert (frame.source.width, frame.source.height) == (6, 4)
    assert bool(frame.source.notes) == (orientation != 1)


def test_frames_of_a_multi_page_picture(tmp_path: Path) -> None:
    pages = [Image.new("L", (3, 2), level) for level in (10, 20, 30)]
    path = tmp_path / "a.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    frame = read_image(path, frame=2)
    assert (frame.pixels == 30).all()
    assert (frame.source.frame, frame.source.num_frames) == (2, 3)
    with pytest.raises(ImageError, match=r"has 3 frame\(s\), counted from 0: no frame 3"):
        read_image(path, frame=3)


def tiny_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(("width", "height"), [(65000, 65000), (9000, 9000), (10**6, 90)])
def test_decompression_bombs_are_refused_before_decoding(
    tmp_path: Path, width: int, height: int
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(tiny_png(width, height))
    with pytest.raises(ImageError, match="limit"):
        read_image(path)


def test_the_largest_allowed_picture_is_not_a_bomb() -> None:
    image_budgets.check_pixels(8192, 8192)
    with pytest.raises(ImageError, match="limit"):
        image_budgets.check_pixels(8192, 8193)
    with pytest.raises(ImageError, match="empty"):
        image_budgets.check_pixels(0, 5)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"])
def test_truncated_pictures_are_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path, Image.fromarray(noise), name)
    data = path.read_bytes()
    for part in (0.95, 0.5, 0.1):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(ImageError):
            read_image(path)


def test_things_that_are_no_picture(tmp_path: Path) -> None:
    empty, text, pipe = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "pipe.png"
    empty.touch()
    text.write_text("hello")
    os.mkfifo(pipe)
    dangling = tmp_path / "dangling.png"
    dangling.symlink_to(tmp_path / "nowhere.png")
    for path, reason in {
        tmp_path / "missing.png": "No such file",
        tmp_path: "directory|regular",
        empty: "is empty",
        text: "neither a DICOM file nor",
        pipe: "is not a regular file",
        dangling: "No such file",
        Path("/dev/zero"): "is not a regular file",
        tmp_path / "a\0b.png": "null",
    }.items():
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(path)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(RAMP))
    path.chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(path)


def test_a_link_to_a_picture_is_followed(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(RAMP))
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_image(link).source.path == str(link)


def test_awkward_names_stay_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\udcff.png"
    path.write_bytes(b"nothing")
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_the_name_of_the_file_does_not_matter(tmp_path: Path) -> None:
    assert read_image(save(tmp_path, Image.fromarray(RAMP), "a.dcm", format="PNG")).pixels.any()


def test_a_dicom_file_wins_over_its_preamble() -> None:
    assert sniff(b"II*\0" + bytes(124) + b"DICM") == "dicom"
    assert sniff(b"II*\0" + bytes(140)) == "picture"


def test_pictures_are_read_without_pydicom(tmp_path: Path) -> None:
    import subprocess

    path = save(tmp_path, Image.fromarray(RAMP))
    code = f"import sys, medmo_edge; medmo_edge.read_image({str(path)!r}); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pydicom" not in run.stdout.split()


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_frames_from_pixels(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    frame = Frame.from_pixels(array)
    assert frame.pixels.shape == (5, 7, 3)
    np.testing.assert_array_equal(frame.pixels[..., 0], array.reshape(5, 7, -1)[..., 0])
    assert not np.shares_memory(frame.pixels, array)
    assert (frame.source.width, frame.source.height) == (7, 5)
    assert "pixels" not in repr(frame)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint16), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)]
)
def test_frames_from_other_arrays_are_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match="is not uint8"):
        Frame.from_pixels(array)


def picture(name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)).save(
        stream, name
    )
    return stream.getvalue()


PICTURES = {name: picture(name) for name in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")}
MUTATIONS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=9)


@pytest.mark.parametrize("name", PICTURES)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=MUTATIONS, keep=st.sampled_from([1.0, 1.0, 0.9, 0.4]))
def test_any_mutation_gives_a_frame_or_an_image_error(
    name: str, changes: list[tuple[float, int]], keep: float, tmp_path: Path
) -> None:
    data = bytearray(PICTURES[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    path = tmp_path / "fuzz"
    path.write_bytes(bytes(data[: max(1, int(keep * len(data)))]))
    try:
        frame = read_image(path)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert frame.pixels.shape == (frame.source.height, frame.source.width, 3)
        json.dumps(frame.source.to_dict())
