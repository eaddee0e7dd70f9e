"""A graph cut to fewer layers: still a valid graph, with the operators of that many layers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_host import CAPACITY, open_session, save

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import ArtifactError, UsageError
from medmo_edge.export.onnx_cut import cut_layers
from medmo_edge.export.onnx_decoder import DecoderPlan, build_decoder
from medmo_edge.export.onnx_vision import VisionPlan, build_vision

LAYERS = 4  # of the tiny checkpoints, language and vision


@pytest.fixture(scope="module")
def graphs(tiny_untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    plan = DecoderPlan(form="scatter", capacity=CAPACITY)
    save(build_decoder(checkpoint, plan), folder / "decoder.onnx")
    save(build_vision(checkpoint, VisionPlan(form="scatter")), folder / "vision.onnx")
    return folder


def census(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def names(values: Any) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize("layers", [1, 2, 3, LAYERS, 9])
def test_a_cut_decoder_is_a_decoder_of_fewer_layers(
    graphs: Path, tmp_path: Path, layers: int
) -> None:
    target = tmp_path / "cut.onnx"
    cut_layers(graphs / "decoder.onnx", target, layers)
    onnx.checker.check_model(str(target), full_check=True)
    kept = min(layers, LAYERS)
    found = census(target)
    assert found["TensorScatter"] == 2 * kept and found["Attention"] == kept
    assert found["RotaryEmbedding"] == 2 * kept and found["MatMul"] == 7 * kept + 1
    graph = onnx.load(target, load_external_data=False).graph
    caches = [f"{part}_{layer}" for layer in range(kept) for part in "kv"]
    # Deepstack is added behind the first three layers, but not behind what was the last one.
    levels = [f"deepstack_{level}" for level in range(3 if kept == LAYERS else kept - 1)]
    first = ["inputs_embeds", "rope_cos", "rope_sin", "write_indices", "last_index"]
    assert names(graph.input) == [*first, *levels, *(f"past_{name}" for name in caches)]
    assert names(graph.output) == ["logits", *(f"present_{name}" for name in caches)]
    data = target.with_name("cut.onnx.data").stat().st_size
    whole = (graphs / "decoder.onnx.data").stat().st_size
    assert data == whole if kept == LAYERS else data < whole


def test_what_is_left_computes_as_if_the_others_did_nothing(graphs: Path, tmp_path: Path) -> None:
    """Layers whose two output matrices are zero add nothing: the whole graph is the cut one."""
    cut_layers(graphs / "decoder.onnx", tmp_path / "cut.onnx", 2)
    cut = open_session(tmp_path / "cut.onnx")
    model = onnx.load(graphs / "decoder.onnx")
    for tensor in model.graph.initializer:
        if ("o_proj" in tensor.name or "down_proj" in tensor.name) and ".0." not in tensor.name:
            keep = ".3." in tensor.name
            tensor.raw_data = tensor.raw_data if keep else bytes(len(tensor.raw_data))
    onnx.save(model, tmp_path / "idle.onnx")
    feeds = inputs(model.graph) | {f"deepstack_{level}": np.zeros((1, 5, 256)) for level in (1, 2)}
    feeds = {name: np.asarray(each, feeds["rope_cos"].dtype) for name, each in feeds.items()}
    feeds |= {"write_indices": np.array([0]), "last_index": np.array([[4]])}
    expected = open_session(tmp_path / "idle.onnx").run(["logits"], feeds)[0]
    wanted = {each.name for each in cut.get_inputs()}
    found = cut.run(["logits"], {name: each for name, each in feeds.items() if name in wanted})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


def inputs(graph: Any) -> dict[str, Any]:
    """Five tokens at the start of an empty cache."""
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in graph.input:
        known = {"B": 1, "S": 5}
        dims = value.type.tensor_type.shape.dim
        shape = [known.get(each.dim_param, each.dim_value) for each in dims]
        feeds[value.name] = random.standard_normal(shape, np.float32)
        if value.name.startswith("past"):
            feeds[value.name] *= 0
    return feeds


@pytest.mark.parametrize("layers", [1, 2, LAYERS])
def test_a_cut_tower_keeps_its_inputs_and_outputs(
    graphs: Path, tmp_path: Path, layers: int
) -> None:
    target = tmp_path / "cut.onnx"
    cut_layers(graphs / "vision.onnx", target, layers)
    onnx.checker.check_model(str(target), full_check=True)
    found = census(target)
    assert found["Attention"] == layers and found["Gelu"] == layers + 4  # four mergers
    whole, cut = (
        onnx.load(path, load_external_data=False).graph for path in (graphs / "vision.onnx", target)
    )
    assert cut.input == whole.input and cut.output == whole.output


@pytest.mark.parametrize(
    ("content", "layers", "error", "words"),
    [
        (b"no graph", 2, ArtifactError, "no ONNX graph"),
        (None, 2, ArtifactError, "cannot be read"),
        (onnx.ModelProto().SerializeToString(), 2, ArtifactError, "neither our decoder nor our"),
        (b"", 0, UsageError, "keep at least 1"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tmp_path: Path, content: bytes | None, layers: int, error: type[Exception], words: str
) -> None:
    source = tmp_path / "decoder.onnx"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(error, match=words):
        cut_layers(source, tmp_path / "cut.onnx", layers)


def test_a_data_file_that_is_too_short_is_named(graphs: Path, tmp_path: Path) -> None:
    source = tmp_path / "decoder.onnx"
    source.write_bytes((graphs / "decoder.onnx").read_bytes())
    source.with_name("decoder.onnx.data").write_bytes(b"\0" * 5000)
    with pytest.raises(ArtifactError, match="decoder.onnx.data is too short"):
        cut_layers(source, tmp_path / "cut.onnx", 2)
