"""Graphs against the real tensorrt-rtx, which compiles without a GPU, and the real CUDA bindings.

Also that the fakes of other tests offer nothing that the real libraries do not.
"""

import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_fake
import pytest
import trt_fake
import trt_fake_builder
import trt_world
from trt_artifacts import change_manifest, write_scatter

from medmo_edge.build import check
from medmo_edge.errors import ArtifactError, BackendUnavailable
from medmo_edge.export.onnx_cut import cut_layers
from medmo_edge.export.onnx_linear import Encoding
from medmo_edge.manifest import Manifest, read_manifest
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.trt_build import Built, Settings
from medmo_edge.runtime.trt_cuda import Gpu
from medmo_edge.runtime.trt_engines import census
from medmo_edge.runtime.trt_library import Library
from medmo_edge.runtime.trt_make import choose_library, compile_one
from medmo_edge.runtime.trt_session import Engine

pytest.importorskip("onnx", reason="cuts graphs")
RTX: ModuleType = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")

# Layers of the decoder for L layers of the model. An fp8 layer quantises its input once for q, k
# and v, once for o, once for gate and up, once for down; each of seven weights is dequantised.
COUNTS = {
    "KV_CACHE_UPDATE": 2,
    "ATTENTION_INPUT": 1,
    "ROTARY_EMBEDDING": 2,
    "QUANTIZE": 0,
    "DEQUANTIZE": 0,
}
QUANTISED = {
    "bf16": {},
    "fp16": {},
    "fp8": {"QUANTIZE": 4, "DEQUANTIZE": 4 + 7},
    "int4-awq": {"DEQUANTIZE": 7},
    "nvfp4": {"DEQUANTIZE": 2 * 7},
}
LAYERS = 2


def _expected(target: str, layers: int = LAYERS) -> dict[str, int]:
    return {name: layers * count for name, count in (COUNTS | QUANTISED[target]).items()}


@pytest.fixture(scope="module")
def library() -> Library:
    return choose_library(rtx=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano as trt-bf16, as a user exports it."""
    from medmo_edge.export.export import export_checkpoint

    folder = tmp_path_factory.mktemp("rtx") / "bf16"
    export_checkpoint("nano", "trt-bf16", folder, golden=False)
    return folder


@pytest.fixture(scope="module")
def fp8(artifact: Path) -> Manifest:
    """Nano in fp8, with scales of no meaning."""
    folder = write_scatter(
        artifact,
        "nano",
        artifact.with_name("fp8"),
        dtype="bfloat16",
        matrix=Encoding(kind="fp8"),
        build={"min_sm": 89, "refused_sm": {"75": "trt-int4-awq"}},
    )
    change_manifest(folder, target="trt-fp8")
    return read_manifest(folder)


@pytest.fixture(scope="module")
def decoder(fp8: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of it."""
    path = tmp_path_factory.mktemp("cut") / "decoder.onnx"
    cut_layers(fp8.path_of("decoder"), path, LAYERS)
    return path


@pytest.fixture(scope="module")
def built(library: Library, fp8: Manifest, decoder: Path) -> Built:
    """An fp8 engine for SM 89."""
    return compile_one(library, "decoder", decoder, fp8, Settings(sm=89))


def test_an_fp8_decoder_becomes_the_layers_that_were_meant(built: Built) -> None:
    assert census({"decoder": built.layers}) == _expected("fp8")
    assert memoryview(built.engine).nbytes > 1 << 20


def test_the_command_compiles_both_graphs_for_another_gpu(artifact: Path) -> None:
    command = [sys.executable, "-m", "medmo_edge", "build", str(artifact), "--check", "--json"]
    result = subprocess.run([*command, "--sm", "120"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert (found["target"], found["sm"]) == ("trt-bf16", 120)
    assert (found["library"], found["version"]) == ("tensorrt-rtx", RTX.__version__)
    assert census({"decoder": found["decoder"]["layers"]}) == _expected("bf16")
    vision = found["vision"]["layers"]
    assert (vision["ATTENTION_INPUT"], vision["ROTARY_EMBEDDING"]) == (LAYERS, 2 * LAYERS)
    assert not (artifact / "engines").exists()


def test_fp8_on_an_older_gpu_is_refused_with_the_alternative(
    fp8: Manifest, library: Library, decoder: Path
) -> None:
    with pytest.raises(BackendUnavailable, match=r"fp8 needs SM 89, .* is SM 86: export --target"):
        check(fp8, [89, 86], lambda *_: None)
    # What TensorRT itself says, should a manifest not know.
    with pytest.raises(BackendUnavailable) as caught:
        compile_one(library, "decoder", decoder, fp8, Settings(sm=86))
    assert "this GPU has no fp8_e4m3: export --target trt-int4-awq" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_rtx_does_not_know(library: Library, fp8: Manifest, decoder: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"compiles for SM 75, .*, not 87: use full"):
        compile_one(library, "decoder", decoder, fp8, Settings(sm=87))


def test_graphs_that_tensorrt_refuses(
    library: Library, fp8: Manifest, decoder: Path, tmp_path: Path
) -> None:
    import onnx

    def change(name: str, edit: Callable[[Any], None]) -> Path:
        model = onnx.load(str(decoder), load_external_data=False)
        edit(model)
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        shutil.copy(f"{decoder}.data", tmp_path / "decoder.onnx.data")
        return path

    def rename(model: Any) -> None:
        next(each for each in model.graph.node if each.op_type == "Sigmoid").op_type = "Sigmoyd"

    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    for path, expected in (
        (change("unknown", rename), "operator Sigmoyd, .* does not know .*: update TensorRT, or e"),
        (broken, "is refused by tensorrt-rtx .*export again"),
    ):
        with pytest.raises(ArtifactError, match=expected) as caught:
            compile_one(library, "decoder", path, fp8, Settings(sm=89))
        assert "\n" not in str(caught.value)


def test_graphs_of_the_future_are_refused(fp8: Manifest) -> None:
    """The parser would read opset 99 and guess."""
    manifest = replace(fp8, weights={**fp8.weights, "opset": 99})
    with pytest.raises(BackendUnavailable, match=r"of opset 99, tensorrt-rtx .* reads up to 24"):
        check(manifest, [89], lambda *_: None)


def test_an_interrupted_compilation_stops_before_its_end(
    library: Library, fp8: Manifest, decoder: Path
) -> None:
    stages: list[tuple[str, int, int]] = []
    seen = threading.Event()

    def watch(*stage: Any) -> None:
        stages.append(stage)
        seen.set()

    def interrupt() -> None:
        seen.wait()
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        compile_one(library, "decoder", decoder, fp8, Settings(sm=89), watch)
    thread.join()
    assert stages[0][0].startswith("decoder: ")
    assert stages[-1][1] < stages[-1][2]


def test_an_engine_without_a_gpu_is_an_error_of_ours(
    built: Built, library: Library, tmp_path: Path
) -> None:
    if probe().cuda:
        pytest.skip("there is a GPU")
    path = tmp_path / "decoder.engine"
    path.write_bytes(built.engine)
    with pytest.raises(BackendUnavailable, match="install or update the NVIDIA driver"):
        Engine(library, path)
    path.write_bytes(b"no engine at all" * 100)
    with pytest.raises(ArtifactError, match="run `medmo-edge build` again"):
        Engine(library, path)


def test_cuda_without_a_driver_is_an_error_of_ours() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if probe().cuda:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match=r"CUDA cannot start: .*\(CUDA error \d+\)"):
        Gpu()


def _members(kind: type) -> Iterator[str]:
    return (name for name in vars(kind) if not name.startswith("_"))


# What the fakes offer to tests only.
OURS = {"Network": {"fill", "path", "flags"}, "Engine": {"inputs", "plan", "tensors", "world"}}
REAL = {
    "Network": "INetworkDefinition",
    "Profile": "IOptimizationProfile",
    "Config": "IBuilderConfig",
    "TimingCache": "ITimingCache",
    "Engine": "ICudaEngine",
    "ExecutionContext": "IExecutionContext",
    "Builder": "Builder",
    "Runtime": "Runtime",
    "OnnxParser": "OnnxParser",
}


@pytest.mark.parametrize("name", REAL)
def test_the_fake_of_tensorrt_offers_nothing_that_is_not_there(name: str) -> None:
    module = trt_fake_builder if hasattr(trt_fake_builder, name) else trt_fake
    fake, real = getattr(module, name), getattr(RTX, REAL[name])
    for member in set(_members(fake)) - OURS.get(name, set()):
        assert hasattr(real, member), member
        if inspect.isfunction(getattr(fake, member)):
            parameters = list(inspect.signature(getattr(fake, member)).parameters)[1:]
            documented = getattr(real, member).__doc__
            assert all(re.search(rf"\b{each}\b", documented) for each in parameters), member
    for enum in ("DataType", "TensorIOMode", "TensorLocation"):
        known = getattr(RTX, enum).__members__
        assert set(getattr(trt_world, enum).__members__) <= set(known)


def test_the_fake_of_cuda_offers_nothing_that_is_not_there() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    for name in _members(cuda_fake.FakeCuda):
        if not name.startswith("cuda"):
            continue
        fake = vars(cuda_fake.FakeCuda)[name]
        if inspect.isfunction(fake):
            signature = (getattr(real, name).__doc__ or "").splitlines()[0]
            parameters = list(inspect.signature(fake).parameters)[1:]
            assert re.findall(r"(\w+)(?:: \w+)?(?=[,)])", signature) == parameters, signature
        elif isinstance(fake, type):
            values = {each.name: each.value for each in fake}  # type: ignore[attr-defined]
            assert values.items() <= {each.name: each.value for each in getattr(real, name)}.items()
        else:
            assert getattr(real, name) == fake


@pytest.fixture(scope="module")
def shelf(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nano in every target for TensorRT."""
    from PIL import Image

    from medmo_edge.calibration.observe import calibrate
    from medmo_edge.export.export import export_checkpoint
    from medmo_edge.phantoms import draw

    folder = tmp_path_factory.mktemp("shelf")
    Image.fromarray(draw(1, size=(192, 256)).pixels).save(folder / "a.png")
    content = [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    line = {"id": "a", "task": "vqa", "images": ["a.png"], "messages": said}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    record = calibrate("nano", folder / "samples.jsonl", folder / "record")
    for name in QUANTISED:
        given = None if name == "bf16" else record.path
        export_checkpoint("nano", f"trt-{name}", folder / name, calibration=given, golden=False)
    return folder


# By what tensorrt-rtx 1.7 said; SM 75 has no int4 there.
COMPILES = {
    "bf16": {86: True, 89: True, 120: True, 75: False},
    "fp16": {75: True, 86: True, 89: True, 120: True},
    "fp8": {86: False, 89: True, 120: True},
    "int4-awq": {75: False, 86: True, 89: True, 120: True},
    "nvfp4": {86: False, 89: False, 120: True},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", QUANTISED)
def test_the_matrix_of_targets_and_gpus(target: str, shelf: Path) -> None:
    manifest = read_manifest(shelf / target)
    for sm, compiles in COMPILES[target].items():
        if not compiles:
            with pytest.raises(BackendUnavailable, match="export --target"):
                check(manifest, [sm], lambda *_: None)
            continue
        (found,) = check(manifest, [sm], lambda *_: None)
        assert census({"decoder": found["decoder"]["layers"]}) == _expected(target)


@pytest.mark.slow
def test_a_whole_folder_for_a_gpu_elsewhere(artifact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medmo_edge", "build", str(artifact), "--rtx", "--sm", "89"]
    command += ["-o", str(tmp_path / "engines"), "--json"]
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    found = json.loads(first.stdout)
    assert (found["library"], found["sm"], found["gpu"]) == ("tensorrt-rtx", 89, "any SM 89")
    layers = read_manifest(artifact).model["num_layers"]
    assert census(found["layers"]) == _expected("bf16", layers)
    assert {path.name for path in Path(found["path"]).iterdir()} == {
        "vision.engine",
        "decoder.engine",
        "engine.json",  # and no timing cache: RTX has none
    }
    assert (found["built"], json.loads(second.stdout)["built"]) == (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_widths_of_the_real_models_compile(
    size: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Two layers with the heads and widths of MedMO: attention kernels depend on them."""
    from medmo_edge.export.export import export_checkpoint

    hidden, inner, heads = {"4b": (2560, 9728, 32), "8b": (4096, 12288, 32)}[size]
    wide, wide_inner = {"4b": (1024, 4096), "8b": (1152, 4304)}[size]
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint",
        text={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_hidden_layers": 3,
            "rope_scaling": _sections(),
            "rope_parameters": {**_sections(), "rope_theta": 5e6},
        },
        vision={
            "hidden_size": wide,
            "intermediate_size": wide_inner,
            "num_heads": 16,
            "out_hidden_size": hidden,
        },
    )
    export_checkpoint(checkpoint, "trt-bf16", tmp_path / "artifact", golden=False)
    for found in check(read_manifest(tmp_path / "artifact"), [89, 120], lambda *_: None):
        assert census({"decoder": found["decoder"]["layers"]}) == _expected("bf16")


def _sections() -> dict[str, Any]:
    return {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
