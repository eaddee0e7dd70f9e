"""Every encoding of one matrix against an explicit reference, and the bits that are stored."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_host import open_session, save

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import CalibrationError, ExportError
from medmo_edge.export import onnx_linear
from medmo_edge.export.onnx_encode import (
    encode_int4,
    encode_nbits,
    encode_nvfp4,
    nvfp4_step,
    pack_int4,
)
from medmo_edge.export.onnx_graph import Graph
from medmo_edge.export.onnx_linear import FLOAT, Encoding, Folding, GraphDtype, Weights

MATRIX = "model.language_model.layers.0.mlp.down_proj.weight"  # [256, 512]
BIASED = "model.visual.blocks.0.mlp.linear_fc1"  # [256, 128]
Floats = NDArray[np.float32]


def one_linear(
    checkpoint: Path, name: str, encoding: Encoding, opset: int = 21, **options: Any
) -> Weights:
    """y = linear(x) and nothing else."""
    graph = Graph(name="linear", opset=opset)
    options = {"dtype": "float32", **options}
    weights = Weights(graph=graph, checkpoint=open_checkpoint(checkpoint), **options)
    element = onnx_linear.ELEMENT[weights.dtype]
    graph.add_input("x", element, ["B", "n", weights.matrix_shape(name)[1]])
    bias = name.replace(".weight", ".bias") if "visual" in name else ""
    graph.add_many("Identity", weights.linear("x", name, encoding, bias), outputs=["y"])
    graph.add_output("y", element, ["B", "n", weights.matrix_shape(name)[0]])
    return weights


def run(weights: Weights, folder: Path, x: NDArray[Any], accuracy: int | None = None) -> Floats:
    """The output on the CPU; ``accuracy`` replaces MatMulNBits' accuracy_level."""
    for node in weights.graph.nodes:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and accuracy is not None:
                attribute.i = accuracy
    session = open_session(save(weights, folder / "linear.onnx"), optimise=False)
    found: Floats = session.run(None, {"x": x})[0].astype(np.float32)
    return found


def inputs(width: int, rows: int = 9) -> Floats:
    """Rows whose sizes differ a hundredfold."""
    random = np.random.default_rng(3)
    sizes = np.logspace(-1, 1, rows).reshape(1, rows, 1)
    return (sizes * random.standard_normal((1, rows, width))).astype(np.float32)


def blocks(matrix: Floats, block: int) -> Floats:
    return matrix.reshape(matrix.shape[0], -1, block)


@pytest.mark.parametrize("name", [MATRIX, f"{BIASED}.weight"])
def test_float_is_a_matrix_product(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    weights = one_linear(tiny_checkpoint, name, FLOAT)
    matrix = weights.checkpoint.read(name)
    x = inputs(matrix.shape[1])
    bias = weights.checkpoint.read(f"{BIASED}.bias") if "visual" in name else 0
    np.testing.assert_allclose(run(weights, tmp_path, x), x @ matrix.T + bias, atol=1e-4)


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 32), (4, 128), (8, 16)])
@pytest.mark.parametrize("name", [MATRIX, f"{BIASED}.weight"])
def test_blocks_of_bits_are_their_dequantised_matrix(
    tiny_checkpoint: Path, tmp_path: Path, bits: int, block: int, name: str
) -> None:
    weights = one_linear(tiny_checkpoint, name, Encoding(kind="nbits", bits=bits, block=block))
    matrix = weights.checkpoint.read(name)
    x = inputs(matrix.shape[1])
    half = 2 ** (bits - 1)
    groups = blocks(matrix, block)
    high, low = groups.max(axis=2, keepdims=True), groups.min(axis=2, keepdims=True)
    extreme = np.where(high + low > 0, high, low)  # of two as large, the negative one
    scale = extreme / np.float32(-half)
    rounded = np.clip(np.rint(groups / scale), -half, half - 1) * scale
    bias = weights.checkpoint.read(f"{BIASED}.bias") if "visual" in name else 0
    expected = x @ rounded.reshape(matrix.shape).T + bias
    np.testing.assert_allclose(run(weights, tmp_path, x, accuracy=0), expected, atol=1e-4)
    # As shipped, activations are rounded to 8 bits in the same blocks: half a step of the largest
    # of each block, against every weight of it.
    steps = np.abs(blocks(x[0], block)).max(axis=2) / 127
    bound = 0.51 * steps @ np.abs(rounded).sum(axis=2).T
    assert (np.abs(run(weights, tmp_path, x) - expected)[0] <= bound + 1e-4).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_joined_matrices_are_the_same_alone(
    tiny_checkpoint: Path, tmp_path: Path, bits: int
) -> None:
    """Queries, keys and values in one product: no bit of any result changes."""
    names = [f"model.language_model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    encoding = Encoding(kind="nbits", bits=bits, block=32)
    graph = Graph(name="linear", opset=21)
    joined = Weights(graph=graph, checkpoint=open_checkpoint(tiny_checkpoint), dtype="float32")
    graph.add_input("x", "FLOAT", ["B", "n", 256])
    for part, y in zip("qkv", joined.linears("x", names, encoding), strict=True):
        graph.add_many("Identity", y, outputs=[part])
        graph.add_output(part, "FLOAT", ["B", "n", joined.matrix_shape(names["qkv".find(part)])[0]])
    assert [node.op_type for node in graph.nodes][:2] == ["MatMulNBits", "Split"]
    assert list(joined.stored) == names
    x = inputs(256)
    session = open_session(save(joined, tmp_path / "joined.onnx"), optimise=False)
    for name, found in zip(names, session.run(None, {"x": x}), strict=True):
        alone = run(one_linear(tiny_checkpoint, name, encoding), tmp_path, x)
        np.testing.assert_array_equal(found, alone)


def test_nibbles_are_stored_low_half_first() -> None:
    rows = np.array([[-8, 7, -1, 0] + [0] * 12], np.float32)
    codes, scales = encode_nbits(rows, 4, 16, np.dtype(np.float32))
    # The largest, -8, becomes code 0 with scale 1; 7 becomes 15, -1 becomes 7, 0 becomes 8.
    assert scales.tolist() == [[1.0]] and codes[0, 0, :2].tolist() == [0xF0, 0x87]
    codes4, scales4 = encode_int4(np.array([[7, -7, 1, 0]], np.float32), 4, np.dtype(np.float32))
    assert scales4.tolist() == [[1.0]] and codes4.tolist() == [[7, -7, 1, 0]]
    assert pack_int4(codes4).tolist() == [[0x97, 0x01]]


@pytest.mark.parametrize("per_token", [False, True])
def test_dynamic_int8_is_its_integer_arithmetic(
    tiny_checkpoint: Path, tmp_path: Path, per_token: bool
) -> None:
    name = f"{BIASED}.weight"
    encoding = Encoding(kind="dynamic", per_token=per_token)
    weights = one_linear(tiny_checkpoint, name, encoding)
    matrix, bias = weights.checkpoint.read(name), weights.checkpoint.read(f"{BIASED}.bias")
    x = inputs(matrix.shape[1])
    scale = np.abs(matrix).max(axis=1, keepdims=True) / np.float32(127)
    rounded = np.rint(matrix / scale) * scale
    size = np.abs(x).max(axis=2, keepdims=True) if per_token else np.float32(1)
    expected = quantise_dynamically(x / size) * size @ rounded.T + bias
    found = run(weights, tmp_path, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    exact = x @ matrix.T + bias
    small = np.abs(found - exact)[0, 0].max() / np.abs(exact - bias)[0, 0].max()
    assert (small < 0.03) == per_token  # the smallest row drowns when one scale serves all


def quantise_dynamically(x: Floats) -> Floats:
    """ONNX DynamicQuantizeLinear: uint8 between the extremes, zero included."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((high - low) / 255)
    zero = np.rint(np.float32(-low) / step)
    codes: Floats = np.clip(np.rint(x / step) + zero, 0, 255).astype(np.float32)
    found: Floats = (codes - zero) * step
    return found


def test_rows_in_8_bits_are_made_once_and_may_be_zero(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Two matrices that read one input share its codes; a row of zeros stays one."""
    graph = Graph(name="linear", opset=21)
    weights = Weights(graph=graph, checkpoint=open_checkpoint(tiny_checkpoint), dtype="float32")
    prefix = "model.language_model.layers.0.mlp."
    graph.add_input("x", "FLOAT", ["B", "n", 256])
    for name in ("gate", "up"):
        encoding = Encoding(kind="dynamic", per_token=True)
        y = weights.linear("x", f"{prefix}{name}_proj.weight", encoding)
        graph.add_many("Identity", y, outputs=[name])
        graph.add_output(name, "FLOAT", ["B", "n", 512])
    assert [node.op_type for node in graph.nodes].count("DynamicQuantizeLinear") == 1
    x = inputs(256, rows=3)
    x[0, 1] = 0
    session = open_session(save(weights, tmp_path / "two.onnx"))
    for name, found in zip(("gate", "up"), session.run(None, {"x": x}), strict=True):
        assert not found[0, 1].any()
        exact = x @ weights.checkpoint.read(f"{prefix}{name}_proj.weight").T
        np.testing.assert_allclose(found, exact, rtol=0, atol=0.03 * np.abs(exact).max())


def test_plain_int4_is_its_dequantised_matrix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = one_linear(tiny_checkpoint, MATRIX, Encoding(kind="int4", block=32), opset=24)
    matrix = weights.checkpoint.read(MATRIX)
    x = inputs(512)
    found = run(weights, tmp_path, x)
    np.testing.assert_allclose(found, x @ best_int4(matrix, 32).T, atol=1e-4)


def best_int4(matrix: Floats, block: int) -> Floats:
    """Per block the rounding with the smallest error, of those that keep 1, 0.9 or 0.8 of it."""
    found = []
    for row in matrix.reshape(-1, block):
        tries = []
        for part in (1, 0.9, 0.8):
            scale = np.abs(row).max() * np.float32(part / 7)
            tries.append(np.clip(np.rint(row / scale), -8, 7) * scale)
        found.append(min(tries, key=lambda each: float(np.sum((each - row) ** 2))))
    return np.array(found, np.float32).reshape(matrix.shape)


# FLOAT4E2M1 by its definition: sign, two bits of exponent with bias 1, one of mantissa.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def test_nvfp4_is_the_nearest_of_its_values(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """ONNX Runtime cannot read it: its bytes are decoded here, by the formats' definitions."""
    weights = one_linear(tiny_checkpoint, MATRIX, Encoding(kind="nvfp4", block=16), opset=24)
    path = save(weights, tmp_path / "linear.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    held = {each.name: each for each in onnx.load(path).graph.initializer}
    packed = np.frombuffer(held[f"{MATRIX}.codes"].raw_data, np.uint8).reshape(256, -1)
    codes = FP4[np.stack([packed & 15, packed >> 4], axis=-1).reshape(256, 512)]
    scales = np.frombuffer(held[f"{MATRIX}.scales"].raw_data, ml_dtypes.float8_e4m3fn)
    step = np.frombuffer(held[f"{MATRIX}.step"].raw_data, np.float32)[0]
    assert np.log2(step) == np.rint(np.log2(step))
    width = (scales.astype(np.float32) * step).reshape(-1, 1)
    stored = codes.reshape(-1, 16) * width
    wanted = weights.checkpoint.read(MATRIX).reshape(-1, 16)
    grid = np.unique(FP4) * width[:, None]
    nearest = np.abs(grid - wanted[:, :, None]).min(axis=2)
    inside = np.abs(wanted) <= 6 * width
    np.testing.assert_allclose(np.abs(stored - wanted)[inside], nearest[inside], atol=1e-7)
    # A block's largest value is 6 or 4, up to the rounding of the scale (3 bits of mantissa).
    top = np.abs(wanted).max(axis=1) / width[:, 0]
    assert (np.minimum(np.abs(top / 6 - 1), np.abs(top / 4 - 1)) < 1 / 15).all()
    share = float(np.mean(np.abs(top / 4 - 1) < np.abs(top / 6 - 1)))
    assert 0.2 < share < 0.8
    plain = best_of_one(wanted)
    assert np.sum((stored - wanted) ** 2) < 0.95 * np.sum((plain - wanted) ** 2)


def best_of_one(rows: Floats) -> Floats:
    """The usual rule: the largest value of a block becomes 6; scales not rounded, which helps."""
    width = np.abs(rows).max(axis=1, keepdims=True) / 6
    nearest = np.abs(np.unique(FP4) - (rows / width)[:, :, None]).argmin(axis=2)
    found: Floats = np.unique(FP4)[nearest] * width
    return found


@given(
    exponent=st.integers(-60, 60),
    spread=st.integers(0, 20),
    zeros=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_nvfp4_keeps_every_block_whatever_its_size(
    exponent: int, spread: int, zeros: int, seed: int
) -> None:
    """Blocks whose sizes differ 2^spread-fold: none becomes NaN, large ones keep their precision;
    scale times step is exact in bfloat16."""
    random = np.random.default_rng(seed)
    sizes = np.exp2(exponent - random.integers(0, spread + 1, (4, 1, 1)))
    rows = (random.uniform(-1, 1, (4, 2, 16)) * sizes).astype(np.float32)
    rows[:zeros] = 0
    rows = rows.reshape(4, 32)
    step = nvfp4_step(float(np.abs(rows).max()))
    packed, bits = encode_nvfp4(rows, 16, step)
    codes = FP4[np.stack([packed & 15, packed >> 4], axis=-1).reshape(4, 2, 16)]
    width = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, :, None] * step
    assert (width.astype(ml_dtypes.bfloat16).astype(np.float32) == width).all()
    error = np.abs(codes * width - rows.reshape(4, 2, 16)).max(axis=2)
    largest = np.abs(rows).reshape(4, 2, 16).max(axis=2)
    assert (error <= np.maximum(0.2 * largest, 2.0**-10 * 6 * step)).all()


def test_fp8_rounds_both_sides(tiny_checkpoint: Path, tmp_path: Path) -> None:
    key = MATRIX.removesuffix(".weight")
    x = inputs(512)
    amax = np.float32(np.abs(x).max())
    scales = {key: float(amax / 448)}
    encoding = Encoding(kind="fp8")
    weights = one_linear(tiny_checkpoint, MATRIX, encoding, 24, activation_scales=scales)
    matrix = weights.checkpoint.read(MATRIX)
    step = np.abs(matrix).max(axis=1, keepdims=True) / np.float32(448)
    expected = fp8(x, np.array(scales[key])) @ fp8(matrix, step).T
    np.testing.assert_allclose(run(weights, tmp_path, x), expected, rtol=0, atol=1e-4)


def fp8(values: Floats, step: NDArray[np.floating[Any]]) -> Floats:
    clipped = np.clip(values / step.astype(np.float32), -448, 448)
    rounded: Floats = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return rounded * step.astype(np.float32)


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_activation_scale_is_refused(
    tiny_checkpoint: Path, scale: float | None
) -> None:
    scales = {} if scale is None else {MATRIX.removesuffix(".weight"): scale}
    with pytest.raises(CalibrationError, match="down_proj.*calibrate again"):
        one_linear(tiny_checkpoint, MATRIX, Encoding(kind="fp8"), 24, activation_scales=scales)


def test_folded_scales_reach_rows_and_columns(tiny_checkpoint: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    columns = np.exp2(random.integers(-3, 4, 512)).astype(np.float32)
    rows = np.exp2(random.integers(-3, 4, 256)).astype(np.float32)
    folding = Folding(columns={MATRIX: columns}, rows={MATRIX: rows})
    plain = one_linear(tiny_checkpoint, MATRIX, FLOAT)
    folded = one_linear(tiny_checkpoint, MATRIX, FLOAT, folding=folding)
    x = inputs(512)
    expected = run(plain, tmp_path, x)
    found = run(folded, tmp_path, x / columns) * rows
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_rows_that_fit_no_block_fall_back_and_are_named(tiny_checkpoint: Path) -> None:
    weights = one_linear(tiny_checkpoint, MATRIX, Encoding(kind="nbits", bits=4, block=1024))
    assert weights.fallbacks == {MATRIX: "int4 -> float32"}
    assert weights.stored[MATRIX] == ("float32", 256 * 512)


@pytest.mark.parametrize(
    "encoding",
    [
        FLOAT,
        Encoding(kind="nbits", bits=4, block=32),
        Encoding(kind="int4", block=32),
        Encoding(kind="nvfp4", block=16),
        Encoding(kind="dynamic"),
    ],
)
def test_blocks_of_rows_change_no_byte(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: Encoding
) -> None:
    whole = save(one_linear(tiny_checkpoint, MATRIX, encoding), tmp_path / "linear.onnx")
    data = whole.with_name("linear.onnx.data").read_bytes()
    monkeypatch.setattr(onnx_linear, "_BLOCK_BYTES", 7 * 512 * 4)
    save(one_linear(tiny_checkpoint, MATRIX, encoding), whole)
    assert whole.with_name("linear.onnx.data").read_bytes() == data


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [(np.nan, "float32", "NaN or infinity"), (1e6, "float16", "range of float16")],
)
def test_values_that_cannot_be_stored_are_refused(
    make_checkpoint: Any, tmp_path: Path, value: float, dtype: GraphDtype, words: str
) -> None:
    folder = make_checkpoint(tmp_path / "c", dtype="F32")
    info = open_checkpoint(folder).tensors[MATRIX]
    with info.path.open("r+b") as file:
        file.seek(info.offset + 4 * 700)
        file.write(np.float32(value).tobytes())
    weights = one_linear(folder, MATRIX, FLOAT, dtype=dtype)
    with pytest.raises(ExportError, match=f"down_proj.weight .*{words}"):
        save(weights, tmp_path / "linear.onnx")
