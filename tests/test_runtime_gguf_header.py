"""GGUF headers against the gguf package's reader, and damaged at every place."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.errors import ArtifactError
from medmo_edge.runtime.gguf_header import (
    ARRAY,
    LANGUAGE_KEYS,
    POSITIVE,
    TEXT,
    VISION_KEYS,
    VISION_TENSORS,
    Array,
    check_header,
    read_header,
)

gguf = pytest.importorskip("gguf", reason="the reference is the gguf package")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key of every kind and two tensors."""
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "example")
    writer.add_uint8("a.u8", 200)
    writer.add_int16("a.i16", -5)
    writer.add_uint32("a.u32", 7)
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "caf\u00e9")
    writer.add_array("a.words", ["one", "", "three"])
    writer.add_array("a.numbers", [1, 2])
    writer.add_tensor("first", np.zeros((2, 3), np.float32))
    writer.add_tensor("second", np.zeros(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_of_every_kind(small: Path) -> None:
    header = read_header(small)
    assert header.values == {
        "general.architecture": "example",
        "a.u8": 200,
        "a.i16": -5,
        "a.u32": 7,
        "a.u64": 1 << 40,
        "a.f32": 0.5,
        "a.f64": 0.25,
        "a.bool": True,
        "a.text": "caf\u00e9",
        "a.words": Array(3),
        "a.numbers": Array(2),
    }
    assert header.tensors == ("first", "second")


def test_exported_files_pass_and_hold_the_keys_of_the_reference_reader(
    tiny_artifact: Path,
) -> None:
    for name, keys, tensors in (
        ("model.gguf", LANGUAGE_KEYS, ()),
        ("mmproj.gguf", VISION_KEYS, VISION_TENSORS),
    ):
        path = tiny_artifact / name
        check_header(path, keys, tensors)
        reader = gguf.GGUFReader(path)
        header = read_header(path)
        assert set(header.values) == {key for key in reader.fields if not key.startswith("GGUF.")}
        assert list(header.tensors) == [tensor.name for tensor in reader.tensors]


@pytest.mark.parametrize(
    ("key", "what", "fits"),
    [
        ("a.u32", POSITIVE, True),
        ("a.f32", POSITIVE, True),
        ("a.i16", POSITIVE, False),
        ("a.bool", POSITIVE, False),
        ("a.u64", POSITIVE, False),  # no count of a model is that large
        ("a.text", POSITIVE, False),
        ("a.absent", POSITIVE, False),
        ("a.text", TEXT, True),
        ("a.u32", TEXT, False),
        ("a.words", ARRAY, True),
        ("a.text", ARRAY, False),
    ],
)
def test_required_values(key: str, what: str, fits: bool, small: Path) -> None:
    if fits:
        check_header(small, {key: what})
    else:
        with pytest.raises(ArtifactError, match=rf"small\.gguf: {key} is not {what}"):
            check_header(small, {key: what})


def test_required_tensors(small: Path) -> None:
    check_header(small, {}, ["second"])
    with pytest.raises(ArtifactError, match="tensor third is missing"):
        check_header(small, {}, ["first", "third"])


def test_every_shortening_is_an_error_in_one_line(
    small: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = small.read_bytes()
    end = content.index(b"second") + len("second") + 4 + 8 + 4 + 8
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    for length in range(end):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError) as caught:
            read_header(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(content[:end])
    assert read_header(path) == read_header(small)


@given(data=st.data())
def test_damage_is_an_error_or_a_header_but_never_anything_else(
    data: st.DataObject, small: Path
) -> None:
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 400))
        content[place] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 255]))
    path = small.with_name("damaged.gguf")
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ArtifactError as error:
        assert "\n" not in str(error)
    else:
        assert len(header.values) <= 12


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="absent"):
        read_header(tmp_path / "absent.gguf")
