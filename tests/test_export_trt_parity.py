"""Graphs for TensorRT, computed on the CPU, against transformers with the same numbers rounded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx_host import (
    Conversation,
    Floats,
    Host,
    Prompt,
    Reference,
    make_prompt,
    open_session,
)
from PIL import Image

from medmo_edge.calibration.record import Record
from medmo_edge.calibration.scales import fp8_scales
from medmo_edge.evaluation.emulated_graph import emulate_graph
from medmo_edge.export.export import export_checkpoint
from medmo_edge.export.onnx_decoder import DecoderPlan
from medmo_edge.export.onnx_read import onnx_tensors
from medmo_edge.manifest import read_manifest
from medmo_edge.phantoms import draw

pytestmark = pytest.mark.usefixtures("short_search")
# Text alone, pictures of several shapes at the start, in the middle and at the end, two pictures.
LAYOUTS: tuple[tuple[int | tuple[int, int], ...], ...] = (
    (7,),
    (40,),
    (3, (64, 96), 4),
    (5, (160, 96)),
    ((64, 128), 6),
    (2, (96, 224), 2),
    (2, (64, 96), 3, (128, 32), 4),
)
TARGETS = ("fp8", "int4-awq", "nvfp4", "fp16")
CELLS = 256
EXACT = 1e-5  # of logits that spread over three units: the order of float32 sums


@pytest.fixture(scope="module")
def reference(tiny_untied_checkpoint: Path) -> Reference:
    return Reference(tiny_untied_checkpoint)


@pytest.fixture(scope="module")
def record(tiny_untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The checkpoint, observed over two pictures."""
    pytest.importorskip("safetensors", reason="calibrating needs the train extra")
    from medmo_edge.calibration.observe import calibrate

    folder = tmp_path_factory.mktemp("record")
    lines = []
    for seed in range(2):
        Image.fromarray(draw(seed, size=(192, 256)).pixels).save(folder / f"{seed}.png")
        content = [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}]
        said = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
        lines.append({"id": str(seed), "task": "vqa", "images": [f"{seed}.png"], "messages": said})
    samples = folder / "samples.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return calibrate(tiny_untied_checkpoint, samples, folder / "record")


@pytest.fixture(scope="module")
def artifacts(
    tiny_untied_checkpoint: Path, record: Record, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with one artifact of each target."""
    folder = tmp_path_factory.mktemp("trt")
    for name in TARGETS:
        export_checkpoint(
            tiny_untied_checkpoint,
            f"trt-{name}",
            folder / name,
            calibration=record.path,
            cache_length=CELLS,
            golden=False,
        )
    return folder


class ArtifactHost(Host):
    """The graphs of an artifact; vision features may be given instead of computed."""

    def __init__(self, reference: Reference, artifact: Path, folder: Path, *, rounded: bool):
        self.checkpoint = reference.checkpoint
        self.plan = DecoderPlan(form="scatter")
        for name in ("vision", "decoder"):
            source, target = artifact / f"{name}.onnx", folder / f"{name}.onnx"
            emulate_graph(source, target, rounded=rounded, form="scatter")
        self.vision, self.decoder = (
            open_session(folder / f"{name}.onnx", optimise=False) for name in ("vision", "decoder")
        )
        self.dtype = np.float32
        self.embeddings = reference.checkpoint.read("model.language_model.embed_tokens.weight")
        self.given: list[tuple[Floats, Floats]] = []

    def start(self, batch: int = 1) -> Conversation:
        talk = super().start(batch)
        heads, width = (
            self.checkpoint.config.text.num_kv_heads,
            self.checkpoint.config.text.head_dim,
        )
        empty = np.zeros((batch, heads, CELLS, width), self.dtype)
        talk.cache = {name: empty.copy() for name in talk.cache}
        return talk

    def encode(self, picture: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        return self.given.pop(0) if self.given else super().encode(picture)


@contextmanager
def features_of(reference: Reference, prompt: Prompt) -> Iterator[list[tuple[Floats, Floats]]]:
    """What transformers' tower makes of the pictures: features and deepstack features of each."""
    found: list[tuple[Floats, Floats]] = []
    cuts = np.cumsum([rows * columns // 4 for _, rows, columns in prompt.grids()])[:-1]

    def note(module: Any, args: Any, output: Any) -> None:
        main = np.split(output.pooler_output.numpy(), cuts)
        levels = [np.split(each.numpy(), cuts) for each in output.deepstack_features]
        found.extend((each, np.stack(parts)) for each, *parts in zip(main, *levels, strict=True))

    hook = reference.model.model.visual.register_forward_hook(note)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def weights_replaced(reference: Reference, weights: dict[str, Floats]) -> Iterator[None]:
    """transformers with other numbers."""
    torch = reference.torch
    held = dict(reference.model.named_parameters())
    kept = {name: held[name].data for name in weights}
    try:
        for name, values in weights.items():
            held[name].data = torch.from_numpy(values).reshape(held[name].shape)
        yield
    finally:
        for name, values in kept.items():
            held[name].data = values


def bfloat16(values: NDArray[Any]) -> Floats:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def fp8(values: Any, step: Any, torch: Any) -> Any:
    return torch.clamp(values / step, -448, 448).to(torch.float8_e4m3fn).float() * step


@contextmanager
def fake_fp8(reference: Reference, record: Record) -> Iterator[None]:
    """Weights per channel, activations per matrix, both scales in bfloat16."""
    torch, scales = reference.torch, fp8_scales(record)
    hooks, weights = [], {}
    for name, module in reference.model.model.language_model.named_modules():
        if not hasattr(module, "in_features"):
            continue
        full = f"model.language_model.{name}"
        largest = module.weight.data.abs().amax(1, keepdim=True)
        step = torch.from_numpy(bfloat16(largest.numpy() / 448))
        weights[f"{full}.weight"] = fp8(module.weight.data, step, torch).numpy()
        given = torch.from_numpy(bfloat16(np.array([scales[full]], np.float32)))
        rounding = [lambda module, args, step=given: (fp8(args[0], step, torch),)]
        hooks.append(module.register_forward_pre_hook(rounding[0]))
    with weights_replaced(reference, weights):
        yield
    for hook in hooks:
        hook.remove()


def test_fp8_is_fake_quantisation(
    reference: Reference, record: Record, artifacts: Path, tmp_path: Path
) -> None:
    """Equal, but for a value on the edge between two codes, which float32 sums in another order
    may push over; that every code is right is the next test's business."""
    host = ArtifactHost(reference, artifacts / "fp8", tmp_path, rounded=False)
    errors, losses = [], []
    for layout in LAYOUTS:
        prompt = make_prompt(reference.checkpoint, layout)
        plain = reference.logits(prompt)[-1]
        with fake_fp8(reference, record), features_of(reference, prompt) as features:
            expected = reference.logits(prompt)[-1]
        host.given = features
        _, logits = host.prefill(prompt)
        errors.append(float(np.abs(logits[0, 0] - expected).max()))
        losses.append(float(np.abs(plain - expected).max()))
    assert sum(error <= EXACT for error in errors) >= len(LAYOUTS) - 1, errors
    assert max(errors) < min(losses), (errors, losses)


def test_every_fp8_code_is_torchs(
    reference: Reference, record: Record, artifacts: Path, tmp_path: Path
) -> None:
    """The codes of all inputs of all matrices, from the values that the graph rounds."""
    torch, scales = reference.torch, fp8_scales(record)
    host = ArtifactHost(reference, artifacts / "fp8", tmp_path, rounded=False)
    model = onnx.load(tmp_path / "decoder.onnx")
    quantisers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    layers = reference.checkpoint.config.text.num_layers
    assert len(quantisers) == 4 * layers  # q k v, o, gate up, down
    for node in quantisers:
        for name, kind in ((node.input[0], 1), (node.output[0], 17)):
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    del model.graph.output[: 1 + 2 * layers]
    onnx.save(model, tmp_path / "watched.onnx")
    host.decoder = open_session(tmp_path / "watched.onnx", optimise=False)
    seen = watch(host, make_prompt(reference.checkpoint, (2, (96, 224), 2)))
    readers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    for index, node in enumerate(quantisers):
        layer, part = divmod(index, 4)
        scale = scales[f"model.language_model.layers.{layer}.{readers[part]}"]
        step = torch.from_numpy(bfloat16(np.array([scale], np.float32)))
        values = torch.from_numpy(seen[node.input[0]])
        codes = torch.clamp(values / step, -448, 448).to(torch.float8_e4m3fn)
        found = seen[node.output[0]].view(np.uint8)
        np.testing.assert_array_equal(found, codes.view(torch.uint8).numpy())
        assert len(np.unique(found)) > 50


def watch(host: Host, prompt: Prompt) -> dict[str, NDArray[Any]]:
    """Every output of the decoder for the whole prompt."""
    seen: dict[str, NDArray[Any]] = {}
    decoder = host.decoder

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(decoder, name)

        def run(self, names: Any, feeds: Any) -> Any:
            import onnxruntime as ort

            names = [each.name for each in decoder.get_outputs()]
            found = decoder.run_with_ort_values(
                names,
                {name: ort.OrtValue.ortvalue_from_numpy(each) for name, each in feeds.items()},
            )
            for name, value in zip(names, found, strict=True):
                seen[name] = value.numpy()
            count = len([name for name in feeds if name.startswith("past")])
            return [np.zeros((1, 1, 1), np.float32), *[None] * count]

    host.decoder = Watched()
    host.prefill(prompt)
    return seen


@pytest.mark.parametrize("name", ["int4-awq", "nvfp4"])
def test_narrow_weights_are_the_matrices_they_stand_for(
    name: str, reference: Reference, artifacts: Path, tmp_path: Path
) -> None:
    """transformers with the weights as ``verify`` reads them back; scales that AWQ moved are in the
    norms and matrices of the artifact, so they are in the reference too."""
    manifest = read_manifest(artifacts / name)
    sizes = {each: info.shape[0] for each, info in reference.checkpoint.tensors.items()}
    stored = {
        each.name: each.rows(0, sizes[each.name])
        for each in onnx_tensors(manifest)
        if each.name in sizes and each.name.startswith("model.language_model.layers")
    }
    host = ArtifactHost(reference, artifacts / name, tmp_path, rounded=False)
    for layout in LAYOUTS:
        prompt = make_prompt(reference.checkpoint, layout)
        plain = reference.logits(prompt)[-1]
        with weights_replaced(reference, stored):
            expected = reference.logits(prompt)[-1]
        _, logits = host.prefill(prompt)
        np.testing.assert_allclose(logits[0, 0], expected, rtol=0, atol=1e-4)
        assert 0.05 < np.abs(expected - plain).max()


def test_fp8_in_chunks_at_unequal_places_of_two_caches(
    reference: Reference, record: Record, artifacts: Path, tmp_path: Path
) -> None:
    """Two sequences in one call, padded, that go on at different cells with pictures in the middle
    of a chunk: the last row of each is that of the sequence alone."""
    host = ArtifactHost(reference, artifacts / "fp8", tmp_path, rounded=False)
    prompts = [make_prompt(reference.checkpoint, LAYOUTS[index]) for index in (3, 6)]
    alone = [host.prefill(prompt)[1][0, 0] for prompt in prompts]
    parts = [host.embed(prompt) for prompt in prompts]
    talk = host.start(batch=2)
    firsts = (6, 9)  # both cut through the first picture
    cells = [0, 0]
    found: dict[int, Floats] = {}
    while len(found) < 2:
        logits, cells = step_both(host, talk, parts, cells, firsts)
        found |= {
            index: logits[index, 0]
            for index, part in enumerate(parts)
            if cells[index] == len(part[0]) and index not in found
        }
    for index in range(2):
        difference = np.abs(found[index] - alone[index])
        assert np.median(difference) < EXACT and difference.max() < 0.3


def step_both(
    host: Host, talk: Conversation, parts: Any, cells: list[int], sizes: tuple[int, int]
) -> tuple[Floats, list[int]]:
    """The next ``sizes`` rows of each sequence, padded to the same number of rows."""
    rows = [
        min(size, len(part[0]) - cell) for size, part, cell in zip(sizes, parts, cells, strict=True)
    ]
    longest = max(1, *rows)

    def take(values: NDArray[Any], index: int, axis: int) -> NDArray[Any]:
        piece = np.take(values, range(cells[index], cells[index] + rows[index]), axis=axis)
        widths = [(0, 0)] * piece.ndim
        widths[axis] = (0, longest - rows[index])
        return np.pad(piece, widths)

    logits = host.step(
        talk,
        np.stack([take(part[0], index, 0) for index, part in enumerate(parts)]),
        np.stack([take(part[1], index, 1) for index, part in enumerate(parts)], axis=1),
        np.stack([take(part[2], index, 1) for index, part in enumerate(parts)], axis=1),
        cells,
        [max(0, count - 1) for count in rows],
    )
    return logits, [cell + count for cell, count in zip(cells, rows, strict=True)]


@pytest.mark.parametrize(("name", "narrow"), [("fp16", np.float16), ("fp8", ml_dtypes.bfloat16)])
def test_every_result_is_rounded_to_the_numbers_of_the_graph(
    name: str, narrow: Any, reference: Reference, artifacts: Path, tmp_path: Path
) -> None:
    """Whatever the artifact's graph holds in 16 bits, the emulated one holds as such a number."""
    host = ArtifactHost(reference, artifacts / name, tmp_path, rounded=True)
    prompt = make_prompt(reference.checkpoint, (3, (64, 96), 4))
    _, logits = host.prefill(prompt)
    typed = onnx.shape_inference.infer_shapes(onnx.load(artifacts / name / "decoder.onnx")).graph
    kinds = {10, 16}
    held = [each.name for each in typed.value_info if each.type.tensor_type.elem_type in kinds]
    model = onnx.load(tmp_path / "decoder.onnx")
    made = {each for node in model.graph.node for each in node.output}
    wanted = [each for each in held if each in made]
    assert len(wanted) > 0.7 * len(held) > 80  # the others are weights on their way, decoded before
    for each in wanted:
        model.graph.output.append(onnx.helper.make_tensor_value_info(each, 1, None))
    onnx.save(model, tmp_path / "watched.onnx")
    host.decoder = open_session(tmp_path / "watched.onnx", optimise=False)
    seen = watch(host, prompt)
    for each in wanted:
        # An activation behind its own rounding to 8 bits is read as such, whatever its product.
        if "DequantizeLinear" not in each:
            np.testing.assert_array_equal(seen[each].astype(narrow).astype(np.float32), seen[each])
    exact = ArtifactHost(reference, artifacts / name, tmp_path, rounded=False)
    _, unrounded = exact.prefill(prompt)
    assert np.abs(logits - unrounded).max() > 1e-3
