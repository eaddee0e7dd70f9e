"""Calibration records: read back as written, refused when they are another's or damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.calibration.imatrix import read_imatrix, write_imatrix
from medmo_edge.calibration.record import JSON_FILE, TENSOR_FILE, Record, read_record, write_record
from medmo_edge.calibration.scales import fp8_scales, importance, int8_scales
from medmo_edge.calibration.statistics import LinearStats
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import CalibrationError

pytest.importorskip("safetensors", reason="writing a record needs the train extra")

LAYER = "model.language_model.layers.0"
QUERY, KEY, VALUE = (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
DOWN = f"{LAYER}.mlp.down_proj"


def stats(width: int, amax: float = 4.0, **changes: Any) -> LinearStats:
    values: dict[str, Any] = {
        "amax": amax,
        "p999": amax / 4,
        "p9999": amax / 2,
        "sum_sq": np.linspace(1, 2, width, dtype=np.float32),
        "mean_abs": np.linspace(0.1, 0.2, width, dtype=np.float32),
        "weight_amax": 0.5,
        "count_text": 3,
        "count_image": 7,
    }
    return LinearStats(**(values | changes))


def make_record(checkpoint: Checkpoint, folder: Path, **linears: LinearStats) -> Record:
    """A record of some layers; keyword names are q, k, v, down."""
    names = {"q": QUERY, "k": KEY, "v": VALUE, "down": DOWN}
    folder.mkdir()
    record = Record(
        path=folder,
        checkpoint=checkpoint.identity(),
        samples={"file": "s.jsonl", "sha256": "ab", "count": 1},
        preprocessing=checkpoint.preprocessing.sha256,
        coords=checkpoint.coords,
        seed=7,
        run={"dtype": "float32"},
        linears={names[key]: value for key, value in linears.items()},
    )
    write_record(record)
    return record


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture
def record(checkpoint: Checkpoint, tmp_path: Path) -> Record:
    text = checkpoint.config.text
    return make_record(
        checkpoint,
        tmp_path / "record",
        q=stats(text.hidden_size, 3.0),
        k=stats(text.hidden_size, 3.0),
        v=stats(text.hidden_size, 6.0),
        down=stats(text.intermediate_size, 11.0),
    )


def test_a_record_is_read_as_it_was_written(record: Record, checkpoint: Checkpoint) -> None:
    read = read_record(record.path)
    assert (read.seed, read.samples, read.checkpoint) == (7, record.samples, checkpoint.identity())
    assert read.linears.keys() == record.linears.keys()
    for name, wanted in record.linears.items():
        found = read.linears[name]
        assert (found.amax, found.p999, found.count) == (wanted.amax, wanted.p999, 10)
        assert np.array_equal(found.sum_sq, wanted.sum_sq)
        assert np.array_equal(found.mean_abs, wanted.mean_abs)
    read.check_belongs(checkpoint)


def test_scales_are_shared_by_linears_with_one_input(record: Record) -> None:
    fp8, int8 = fp8_scales(record), int8_scales(record)
    assert fp8[QUERY] == fp8[KEY] == fp8[VALUE] == np.float32(6.0) / np.float32(448)
    assert fp8[DOWN] == np.float32(11.0) / np.float32(448)
    assert int8[QUERY] == int8[VALUE] == np.float32(3.0) / np.float32(127)
    assert fp8_scales(record, "p999")[DOWN] == np.float32(2.75) / np.float32(448)


def test_the_importance_matrix_is_the_mean_square_in_llama_cpps_file(
    record: Record, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="importance matrices need the export extra")
    names = {"blk.0.attn_q.weight": QUERY, "blk.0.ffn_down.weight": DOWN, "x": "not seen"}
    matrix = importance(record, names)
    write_imatrix(tmp_path / "m.gguf", matrix)
    read = read_imatrix(tmp_path / "m.gguf")
    assert read.means.keys() == {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"}
    sums = record.linears[QUERY].sum_sq
    np.testing.assert_allclose(read.means["blk.0.attn_q.weight"], sums / 10, rtol=1e-6)
    assert read.counts["blk.0.attn_q.weight"] == 10
    assert "sha256:ab" in read.datasets[0]


@pytest.mark.parametrize("amax", [0.0, float("nan"), float("inf")])
def test_ranges_that_cannot_be_used_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, amax: float
) -> None:
    broken = make_record(
        checkpoint, tmp_path / "r", q=stats(checkpoint.config.text.hidden_size, amax, p9999=amax)
    )
    for use in (fp8_scales, int8_scales):
        with pytest.raises(CalibrationError, match=r"q_proj saw .* no scale: calibrate with more"):
            use(broken)
    if amax != 0.0:
        with pytest.raises(CalibrationError, match=r"q_proj has a range that is NaN, infinite"):
            read_record(broken.path)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / JSON_FILE
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: d.update(schema=2), "schema 2, this version reads 1"),
        (lambda d: d.pop("seed"), "is damaged .*seed"),
        (lambda d: d["linears"][QUERY].update(amax="wide"), "is damaged"),
        (lambda d: d["linears"][QUERY].update(count_text=-1), "counts or sizes that cannot be"),
        (lambda d: d["linears"][QUERY].update(p999=-1.0), "NaN, infinite or negative"),
        (lambda d: d["linears"].update(other=d["linears"][QUERY]), "is damaged .*other"),
        (lambda d: d.update(vectors_sha256="0"), "is not the file that calibration.json names"),
        (lambda d: d.update(linears=[]), "is damaged"),
    ],
)
def test_damaged_records_are_one_clear_line(
    record: Record, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    edit(record.path, change)
    with pytest.raises(CalibrationError, match=what) as caught:
        read_record(record.path)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_cut_are_named(record: Record, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere is no calibration record .*calibrate"):
        read_record(tmp_path / "nowhere")
    vectors = record.path / TENSOR_FILE
    vectors.write_bytes(vectors.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match=r"calibration\.safetensors is missing or damaged"):
        read_record(record.path)
    (record.path / JSON_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(CalibrationError, match="not valid JSON"):
        read_record(record.path)


def test_a_record_of_another_checkpoint_is_refused(
    record: Record, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(CalibrationError, match=r"another checkpoint .*weights or settings differ"):
        record.check_belongs(open_checkpoint(other))
    with pytest.raises(CalibrationError, match=r"another checkpoint .*prepared in another way"):
        record.check_belongs(open_checkpoint("nano"))
    narrow = make_record(open_checkpoint(tiny_checkpoint), tmp_path / "narrow", q=stats(8))
    with pytest.raises(CalibrationError, match=r"another checkpoint .*is not the same layer"):
        narrow.check_belongs(open_checkpoint(tiny_checkpoint))
