"""Engine folders: what fits a machine and what does not is known before TensorRT sees a file."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cuda_fake import Error, FakeCuda
from trt_artifacts import change_manifest
from trt_machine import Machine, pretend

from medmo_edge.errors import ArtifactError, BackendUnavailable
from medmo_edge.manifest import Manifest, read_manifest
from medmo_edge.runtime import trt_build, trt_engines, trt_fit, trt_make
from medmo_edge.runtime.choice import rank
from medmo_edge.runtime.device import Jetson
from medmo_edge.runtime.doctor import doctor, format_findings
from medmo_edge.runtime.session import load
from medmo_edge.runtime.trt_engines import Engines, read_record
from medmo_edge.runtime.trt_make import make_engines, place_here

pytest.importorskip("onnxruntime", reason="the fake GPU computes with it")
pytest.importorskip("onnx", reason="the fake TensorRT parses with it")

KEY = "tensorrt-10.16.1-sm89-" + trt_engines.system_name()


@pytest.fixture
def artifact(tiny_scatter: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_scatter, tmp_path / "artifact"))


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with a GPU and TensorRT."""
    with pretend() as made:
        yield made


@pytest.fixture
def engines(machine: Machine, artifact: Path) -> Engines:
    """Engines of the artifact for that machine."""
    return make_engines(read_manifest(artifact), machine.device)


def _reason(artifact: Path, machine: Machine) -> str:
    """Why the artifact cannot be loaded; a message of one line, before anything was loaded."""
    before = machine.world.deserialised
    with pytest.raises(BackendUnavailable) as caught:
        load(artifact, "trt")
    assert "\n" not in str(caught.value)
    assert machine.world.deserialised == before
    assert machine.cuda.leaks() == []
    return caught.value.reasons.get("trt") or str(caught.value)


def test_a_folder_says_what_its_engines_are_bound_to(engines: Engines, artifact: Path) -> None:
    assert engines.folder == artifact / "engines" / KEY
    files = {path.name for path in engines.folder.iterdir()}
    assert files == {"vision.engine", "decoder.engine", "timing.cache", "engine.json"}
    values = json.loads((engines.folder / "engine.json").read_text())
    assert (values["library"], values["version"], values["sm"]) == ("tensorrt", "10.16.1.11", 89)
    assert values["driver"] == "580.65.06" and values["cuda_version"] == "13.0"
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    assert values["graphs"]["decoder"] == files["decoder.onnx"]["sha256"]
    assert values["graphs"]["vision_data"] == files["vision.onnx.data"]["sha256"]
    sizes = {name: (engines.folder / name).stat().st_size for name in values["files"]}
    assert values["files"] == sizes
    assert values["profiles"] == {
        "capacity": 512,
        "chunk": 64,
        "opt": 32,
        "vision_patches": [4, 256, 4096],
    }
    layers = read_manifest(artifact).model["num_layers"]
    assert trt_engines.census(values["layers"]) == {
        "KV_CACHE_UPDATE": 2 * layers,
        "ATTENTION_INPUT": layers,
        "ROTARY_EMBEDDING": 2 * layers,
        "QUANTIZE": 0,
        "DEQUANTIZE": 0,
    }
    assert values["seconds"]["decoder"] > 0


def test_without_engines_the_next_command_is_named(machine: Machine, artifact: Path) -> None:
    reason = _reason(artifact, machine)
    assert reason == f"no engine for SM 89 yet; run `medmo-edge build {artifact}` here"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.become(version="10.16.2.3"), "built with tensorrt 10.16.1.11, here is tensor"),
        (lambda m: m.become(sm=120), "is for SM 89 (Example GPU), this Example GPU is SM 120"),
        (lambda m: m.become(cuda_version="12.9"), "built under CUDA 13.0, this driver has 12.9"),
    ],
)
def test_another_machine_is_noticed_before_loading(
    change: Callable[[Machine], None],
    expected: str,
    engines: Engines,
    artifact: Path,
    machine: Machine,
) -> None:
    change(machine)
    reason = _reason(artifact, machine)
    assert expected in reason
    assert f"run `medmo-edge build {artifact}` here" in reason


def test_another_system_is_noticed(
    engines: Engines, artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_engines, "system_name", lambda: "linux-aarch64")
    assert f"built on {engines.record.system}, this is linux-aarch64" in _reason(artifact, machine)


def test_another_artifact_is_noticed(engines: Engines, artifact: Path, machine: Machine) -> None:
    data = artifact / "decoder.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    change_manifest(artifact)
    assert "built from other graphs" in _reason(artifact, machine)


def test_other_sizes_are_noticed(engines: Engines, artifact: Path, machine: Machine) -> None:
    build = read_manifest(artifact).weights["build"] | {"chunk": 128}
    change_manifest(artifact, weights={"build": build})
    assert "built for other sizes" in _reason(artifact, machine)


@pytest.mark.parametrize("damage", ["short", "absent", "record"])
def test_damage_is_noticed(damage: str, engines: Engines, artifact: Path, machine: Machine) -> None:
    engine = engines.path_of("decoder")
    if damage == "short":
        engine.write_bytes(engine.read_bytes()[:-1])
    elif damage == "absent":
        engine.unlink()
    else:
        (engines.folder / "engine.json").write_text('{"schema": 1}')
    expected = "engine.json cannot be used" if damage == "record" else "missing or was cut short"
    assert expected in _reason(artifact, machine)


def test_a_damaged_engine_of_the_right_size_is_refused_by_tensorrt(
    engines: Engines, artifact: Path, machine: Machine
) -> None:
    engine = engines.path_of("decoder")
    engine.write_bytes(b"\0" * engine.stat().st_size)
    with pytest.raises(ArtifactError, match=r"decoder\.engine is refused by tensorrt .*run `medmo"):
        load(artifact, "trt")
    assert machine.cuda.leaks() == []


def test_a_graph_of_another_model_in_its_place(
    engines: Engines, artifact: Path, machine: Machine
) -> None:
    """The record fits, the engine does not: what a mixed-up copy looks like."""
    vision, decoder = (engines.path_of(name) for name in ("vision", "decoder"))
    decoder.write_bytes(vision.read_bytes())
    record = json.loads((engines.folder / "engine.json").read_text())
    record["files"]["decoder.engine"] = decoder.stat().st_size
    (engines.folder / "engine.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"decoder\.engine does not have the inputs"):
        load(artifact, "trt")
    assert machine.cuda.leaks() == []


def test_a_tensor_in_the_wrong_memory_is_refused(
    engines: Engines, artifact: Path, machine: Machine
) -> None:
    machine.world.host_tensors = frozenset({"write_indices"})
    with pytest.raises(ArtifactError, match="wants write_indices in the computer's memory"):
        load(artifact, "trt")
    assert machine.cuda.leaks() == []


def test_engines_are_built_at_once_where_that_is_allowed(
    artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDMO_EDGE_BUILD", "1")
    with load(artifact) as session:
        assert session.backend.name == "trt"
        assert "built first" in session.chosen
    assert (artifact / "engines" / KEY / "engine.json").exists()
    machine.become(version="10.17.0.1")
    with load(artifact) as session:
        assert "10.17.0" in session.backend.device


def test_engines_may_lie_elsewhere(
    artifact: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_engines(read_manifest(artifact), machine.device, output=tmp_path / "elsewhere")
    assert not (artifact / "engines").exists()
    assert "no engine for SM 89 yet" in _reason(artifact, machine)
    monkeypatch.setenv("MEDMO_EDGE_ENGINES", os.fspath(tmp_path / "elsewhere"))
    with load(artifact, "trt") as session:
        assert session.backend.name == "trt"


def test_a_place_that_cannot_be_written_to(
    artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtifactError, match="Permission denied: choose a folder with -o and name"):
        make_engines(read_manifest(artifact), machine.device)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_build_leaves_what_was_there(
    engines: Engines, artifact: Path, machine: Machine
) -> None:
    before = _files(artifact)
    told: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        told.append(stage)
        if stage == "decoder: Building Engine" and done == 1:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.3)  # the main thread gets it, as from a terminal

    with pytest.raises(KeyboardInterrupt):
        make_engines(read_manifest(artifact), machine.device, progress=stop)
    assert told[-2:] == ["decoder: Building Engine"] * 2  # of four: TensorRT was told to stop
    assert _files(artifact) == before
    assert [path.name for path in (artifact / "engines").iterdir()] == [KEY]


def test_an_interrupted_first_build_leaves_nothing(artifact: Path, machine: Machine) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_engines(read_manifest(artifact), machine.device, progress=stop)
    assert not (artifact / "engines").exists()


def test_a_second_build_starts_from_the_timing_cache(
    engines: Engines, artifact: Path, machine: Machine
) -> None:
    assert (engines.folder / "timing.cache").read_bytes() == b"timed timed "
    make_engines(read_manifest(artifact), machine.device)
    assert (engines.folder / "timing.cache").read_bytes() == b"timed " * 4


def test_a_compiler_that_fails_leaves_nothing(artifact: Path, machine: Machine) -> None:
    for message, advice in (
        ("Cannot compile: HW-specific datatypes: fp8_e4m3", "export --target trt-int4-awq"),
        ("Requested amount of GPU memory could not be allocated", "shorter --cache-length"),
        ("Internal error 42", "report this"),
    ):
        machine.world.fails = message
        with pytest.raises(BackendUnavailable, match=advice) as caught:
            make_engines(read_manifest(artifact), machine.device)
        assert message in str(caught.value)
    assert not (artifact / "engines").exists()


def test_an_operator_that_tensorrt_does_not_know(artifact: Path, machine: Machine) -> None:
    machine.world.refuses = frozenset({"TensorScatter"})
    with pytest.raises(ArtifactError, match=r"operator TensorScatter, .* does not know .*: upd"):
        make_engines(read_manifest(artifact), machine.device)


def test_reasons_of_libraries(artifact: Path, machine: Machine, engines: Engines) -> None:
    for packages, expected in (
        ({}, r"TensorRT is not installed: pip install 'medmo-edge[tensorrt-rtx]'"),
        ({"tensorrt": "10.3.0"}, "tensorrt 10.3.0 is too old, 10.15 is the first"),
        ({"tensorrt": "10.13.3"}, "too old, 10.15 is the first that can run these graphs: update "),
        ({"tensorrt": "10.13.3"}, "on a Jetson JetPack 7.2 or newer has it"),
        ({"tensorrt-rtx": "1.6.0.1"}, "tensorrt-rtx 1.6.0.1 is too old, 1.7 is the first"),
        ({"tensorrt": "10.16.1.11"}, "cuda-bindings is not installed: pip install"),
    ):
        machine.packages = dict(packages)
        assert expected in _reason(artifact, machine)


def test_an_artifact_for_a_newer_tensorrt(artifact: Path, machine: Machine) -> None:
    build = read_manifest(artifact).weights["build"] | {"min_tensorrt": "11.2"}
    change_manifest(artifact, weights={"build": build})
    assert "need TensorRT 11.2, here is 10.16.1.11" in _reason(artifact, machine)
    change_manifest(artifact, weights={"build": build | {"min_tensorrt": "10.15"}, "opset": 25})
    assert "are of opset 25, tensorrt 10.16.1.11 reads up to 24" in _reason(artifact, machine)
    change_manifest(artifact, weights={"build": build})
    with pytest.raises(BackendUnavailable, match=r"need TensorRT 11\.2"):
        place_here(read_manifest(artifact), machine.device)


def test_reasons_of_machines(artifact: Path, machine: Machine, engines: Engines) -> None:
    jetson = Jetson(model="NVIDIA Jetson Orin Nano", l4t="36.4.3", jetpack="6.2")
    gpu = machine.device.cuda[0]
    small = replace(gpu, memory_bytes=700 << 20)
    for changes, expected in (
        ({"cuda": ()}, "no CUDA GPU: TensorRT needs one"),
        ({"jetson": jetson}, "JetPack 6.2 has a TensorRT that is too old for a KV cache"),
        ({"cuda": (replace(gpu, sm=75),)}, "bfloat16 needs SM 80, this Example GPU is SM 75: "),
        ({"cuda": (replace(gpu, sm=70),)}, "export --target gguf-q4_k_m"),
        ({"cuda": (small,)}, "for 512 tokens), the GPU has 0.7 GB: export a smaller target"),
    ):
        device = replace(machine.device, **changes)
        (found,) = rank([read_manifest(artifact)], device, "trt")
        assert expected in found.reason


def test_a_shorter_cache_is_proposed_where_it_helps(artifact: Path, machine: Machine) -> None:
    manifest = _with_cache(artifact, 65536)
    needed = 700 << 20
    gpu = replace(machine.device.cuda[0], memory_bytes=needed + (48 << 20))
    (found,) = rank([manifest], replace(machine.device, cuda=(gpu,)), "trt")
    assert "export again with --cache-length" in found.reason


def _with_cache(artifact: Path, capacity: int) -> Manifest:
    build = read_manifest(artifact).weights["build"] | {"capacity": capacity}
    change_manifest(artifact, weights={"build": build})
    return read_manifest(artifact)


def test_too_little_free_memory(engines: Engines, artifact: Path, machine: Machine) -> None:
    machine.world.cuda = FakeCuda(100_000)
    assert "engines and KV cache need 0.00 GB" in _reason(artifact, machine)
    # Enough for what is known before, not for the buffers.
    needed = engines.nbytes + trt_fit.cache_bytes(read_manifest(artifact))
    machine.world.cuda = FakeCuda(needed + 1000)
    with pytest.raises(BackendUnavailable, match=r"the GPU has no .* GB left for .*; or export"):
        load(artifact, "trt")
    assert machine.cuda.leaks() == []


def test_a_driver_that_does_not_start(engines: Engines, artifact: Path, machine: Machine) -> None:
    machine.cuda.failures["cudaSetDevice"] = Error.cudaErrorInsufficientDriver
    assert "install or update the NVIDIA driver" in _reason(artifact, machine)


def test_doctor_names_engines_and_libraries(
    engines: Engines, artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmo_edge.runtime import doctor as doctor_module

    monkeypatch.setattr(doctor_module, "probe", lambda: machine.device)
    findings = doctor(artifact)
    assert findings["libraries"]["tensorrt"] == "10.16.1.11"
    assert findings["backends"][0]["name"] == "trt"
    assert findings["backends"][0]["reason"] == "reads trt-bf16, runs on cuda"
    machine.become(sm=87)
    assert "is SM 87; run `medmo-edge build" in format_findings(doctor(artifact))


def test_on_a_jetson_tactics_may_not_take_all_memory(
    artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    compile_graph = trt_build.compile_graph

    def watch(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return compile_graph(*arguments)

    monkeypatch.setattr(trt_make, "compile_graph", watch)
    jetson = Jetson(model="NVIDIA Jetson AGX Orin", l4t="38.4", jetpack="7.2")
    make_engines(read_manifest(artifact), replace(machine.device, jetson=jetson, ram_bytes=1 << 33))
    assert [each.workspace_bytes for each in seen] == [1 << 31, 1 << 31]


def test_a_record_of_another_schema(engines: Engines) -> None:
    path = engines.folder / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(ArtifactError, match="schema 2"):
        read_record(engines.folder)
