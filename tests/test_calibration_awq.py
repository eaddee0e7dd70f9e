"""AWQ: the same function in exact arithmetic, smaller expected errors, and no guesses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="calibrating needs the train extra")

from medmo_edge.calibration import awq  # noqa: E402
from medmo_edge.calibration.record import Record  # noqa: E402
from medmo_edge.calibration.statistics import LinearStats  # noqa: E402
from medmo_edge.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from medmo_edge.errors import CalibrationError  # noqa: E402

PREFIX = "model.language_model.layers"


def round_trip(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Four bits in blocks of 32, symmetric, written down on its own."""
    groups = rows.reshape(len(rows), -1, 32)
    scales = np.maximum(np.abs(groups).max(-1, keepdims=True) / 7, 1e-12)
    values: NDArray[np.float32] = (np.clip(np.rint(groups / scales), -8, 7) * scales).reshape(
        rows.shape
    )
    return values


def make_record(checkpoint: Checkpoint, seed: int = 0) -> Record:
    """Inputs in which one channel in sixteen is thirty times as large as the others."""
    random = np.random.default_rng(seed)
    linears = {}
    for name, info in checkpoint.tensors.items():
        if name.startswith(PREFIX) and name.endswith("_proj.weight"):
            size = random.uniform(0.5, 1.5, info.shape[1]).astype(np.float32)
            size[::16] *= 30
            linears[name.removesuffix(".weight")] = LinearStats(
                amax=float(size.max()) * 4,
                p999=1.0,
                p9999=1.0,
                sum_sq=size * size * 100,
                mean_abs=size,
                weight_amax=1.0,
                count_text=60,
                count_image=40,
            )
    return Record(
        path=Path("record"),
        checkpoint=checkpoint.identity(),
        samples={},
        preprocessing=checkpoint.preprocessing.sha256,
        coords=checkpoint.coords,
        seed=0,
        run={},
        linears=linears,
    )


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    name = {"tied": "tiny_checkpoint", "untied": "tiny_untied_checkpoint"}[request.param]
    return open_checkpoint(request.getfixturevalue(name))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint) -> awq.Scales:
    return awq.search(checkpoint, make_record(checkpoint), round_trip)


def fold(weights: Mapping[str, Any], scales: awq.Scales) -> dict[str, Any]:
    folded = {name: value.clone() for name, value in weights.items()}
    for name, scale in scales.columns.items():
        folded[name] *= torch.from_numpy(scale)
    for name, scale in scales.rows.items():
        divisor = torch.from_numpy(scale)
        folded[name] /= divisor if folded[name].ndim == 1 else divisor[:, None]
    return folded


def test_every_group_is_searched_and_outliers_are_worth_scaling(
    checkpoint: Checkpoint, found: awq.Scales
) -> None:
    layers = checkpoint.config.text.num_layers
    assert len(found.choices) == 4 * layers
    for name, choice in found.choices.items():
        assert 0 < choice.exponent <= 1 and choice.error_ratio < 0.9, name
    assert len(found.columns) == 7 * layers
    assert f"{PREFIX}.0.input_layernorm.weight" in found.rows


def test_folding_changes_nothing_in_exact_arithmetic(
    checkpoint: Checkpoint, found: awq.Scales
) -> None:
    """transformers' model in float64 with and without folding, so only real mistakes show."""
    from transformers import Qwen3VLForConditionalGeneration

    loader: Any = Qwen3VLForConditionalGeneration
    model = loader.from_pretrained(checkpoint.path, dtype=torch.float32).eval().double()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        state = {
            name: value
            for name, value in model.state_dict().items()
            if name in found.columns or name in found.rows
        }
        assert state.keys() == set(found.columns) | set(found.rows)
        folded = fold(state, found)
        assert all(not torch.equal(folded[name], state[name]) for name in state)
        model.load_state_dict(folded, strict=False)
        after = model(input_ids=ids).logits
    assert float((before - after).abs().max()) < 1e-9


def test_the_error_it_reports_is_the_error_of_the_outputs(checkpoint: Checkpoint) -> None:
    """Against a Monte Carlo estimate with inputs that have the record's statistics."""
    record = make_record(checkpoint)
    found = awq.search(checkpoint, record, round_trip)
    name = f"{PREFIX}.0.mlp.down_proj"
    weight, scale = checkpoint.read(f"{name}.weight"), found.columns[f"{name}.weight"]
    mean_sq = record.linears[name].mean_sq
    random = np.random.default_rng(1)
    x = random.standard_normal((4000, weight.shape[1])) * np.sqrt(mean_sq)
    plain = np.square(x @ (round_trip(weight) - weight).T).mean()
    scaled = np.square(x @ (round_trip(weight * scale) / scale - weight).T).mean()
    assert scaled / plain == pytest.approx(found.choices[name].error_ratio, rel=0.05)


def test_heads_that_share_keys_share_scales(checkpoint: Checkpoint, found: awq.Scales) -> None:
    text = checkpoint.config.text
    repeats = text.num_heads // text.num_kv_heads
    columns = found.columns[f"{PREFIX}.0.self_attn.o_proj.weight"]
    rows = found.rows[f"{PREFIX}.0.self_attn.v_proj.weight"].reshape(-1, text.head_dim)
    for head, own in enumerate(columns.reshape(-1, text.head_dim)):
        assert np.array_equal(own, rows[head // repeats])


def test_weights_that_lose_nothing_are_left_alone(checkpoint: Checkpoint) -> None:
    found = awq.search(checkpoint, make_record(checkpoint), lambda rows: rows)
    assert all(choice.exponent == 0 for choice in found.choices.values())
    assert not found.columns and not found.rows


def test_a_layer_that_was_not_seen_is_an_error(checkpoint: Checkpoint) -> None:
    record = make_record(checkpoint)
    linears = dict(record.linears)
    del linears[f"{PREFIX}.1.mlp.down_proj"]
    from dataclasses import replace

    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj has no entry"):
        awq.search(checkpoint, replace(record, linears=linears), round_trip)
