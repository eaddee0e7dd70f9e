"""The ONNX Runtime backend where it differs from others; test_runtime_agreement has the rest."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medmo_edge.errors import ArtifactError, BackendUnavailable, GenerationError
from medmo_edge.images import Frame
from medmo_edge.manifest import read_manifest, record_file
from medmo_edge.runtime import ort as ort_module
from medmo_edge.runtime import ort_cache, ort_decoder, ort_fit, ort_native
from medmo_edge.runtime.backends import START
from medmo_edge.runtime.device import Cuda, probe
from medmo_edge.runtime.ort import Ort
from medmo_edge.runtime.session import Session, load

pytest.importorskip("onnxruntime", reason="needs the cpu extra")

Tiny = Callable[..., Path]
# Largest difference of a logit of nano between f16 GGUF and fp32; 0.0098 was measured.
F16_BOUND = 0.03


def _frame(width: int, height: int, seed: int = 0) -> Frame:
    random = np.random.default_rng(seed)
    return Frame.from_pixels(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def copy(tiny_artifacts: Tiny, tmp_path: Path) -> Path:
    """An onnx-fp32 artifact that a test may damage."""
    return Path(shutil.copytree(tiny_artifacts("onnx-fp32"), tmp_path / "copy"))


def _state_again(folder: Path, **changes: Any) -> None:
    """Write the manifest anew over whatever the files are now."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text()) | changes
    values["files"] = {
        name: record_file(folder / name, record["role"]) for name, record in values["files"].items()
    }
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("target", ["onnx-fp16", "onnx-int8", "onnx-int4"])
def test_every_target_runs_and_agrees_with_fp32_in_shape(target: str, tiny_artifacts: Tiny) -> None:
    logits = {}
    for name in ("onnx-fp32", target):
        with load(tiny_artifacts(name), threads=1) as session:
            backend = session.backend
            backend.append_image(_frame(96, 64).pixels)
            logits[name] = backend.decode_tokens([1, 2, 3])
    # Random weights: a bound on the kind of error, not on accuracy.
    cosine = np.corrcoef(logits["onnx-fp32"], logits[target])[0, 1]
    assert cosine > {"onnx-fp16": 0.99999, "onnx-int8": 0.99, "onnx-int4": 0.8}[target], cosine


def test_nano_answers_as_through_llama_cpp(tmp_path: Path) -> None:
    """The answers are the same, but where f16 turns a near-tie of the fp32 logits."""
    pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")
    pytest.importorskip("gguf", reason="exporting needs the export extra")
    from medmo_edge.export.export import export_checkpoint
    from medmo_edge.phantoms import draw

    sizes = [(256, 256), (448, 320), (768, 96), (130, 700)]
    frames = [
        Frame.from_pixels(draw(910_000 + seed, size=size).pixels) for seed, size in enumerate(sizes)
    ]
    for target in ("gguf-f16", "onnx-fp32"):
        export_checkpoint("nano", target, tmp_path / target, golden=False)
    same = boxes = 0
    with (
        load(tmp_path / "gguf-f16", threads=1) as first,
        load(tmp_path / "onnx-fp32", threads=1) as second,
    ):
        for frame in frames:
            prompt, picture = _prompt(first, frame), first._chat.picture(frame)
            answer = first.locate(frame, "nodule", max_new_tokens=80)
            boxes += len(answer.boxes)
            same += answer.text == second.locate(frame, "nodule", max_new_tokens=80).text
            ids = first._chat.tokenizer.encode(answer.text)
            logits = [_forced(each, prompt, picture.resized_HWC, ids) for each in (first, second)]
            assert np.abs(logits[0] - logits[1]).max() < F16_BOUND
            turned = logits[0].argmax(axis=1) != logits[1].argmax(axis=1)
            top = np.sort(logits[1][turned], axis=1)
            assert (top[:, -1] - top[:, -2] < 2 * F16_BOUND).all()
    assert same >= len(frames) - 1
    assert boxes >= 2


def _prompt(session: Session, frame: Frame) -> tuple[list[int], list[int]]:
    """Text before and after the picture."""
    picture = session._chat.picture(frame)
    kept, rest = session._chat.prompt("Locate the nodule.", [picture])
    before, _, after = session._chat.segments(kept, [picture])
    assert isinstance(before, list) and isinstance(after, list)
    return before, after + rest


def _forced(
    session: Session, prompt: tuple[list[int], list[int]], pixels: Any, ids: list[int]
) -> NDArray[np.float32]:
    """Logits [T, V] along a given answer."""
    backend = session.backend
    backend.rewind(START)
    backend.decode_tokens(prompt[0])
    backend.append_image(pixels)
    steps = [backend.decode_tokens(prompt[1])]
    steps += [backend.decode_tokens([id]) for id in ids]
    return np.stack(steps)


def test_a_growing_cache_changes_nothing(
    tiny_artifacts: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [_frame(200, 200), _frame(300, 100, 1)]
    texts = []
    for cells in (2048, 16):
        monkeypatch.setattr(ort_module, "FIRST_CELLS", cells)
        with load(tiny_artifacts("onnx-fp32"), threads=1) as session:
            answer = session.ask(frames, "Describe this medical image.", max_new_tokens=60)
            assert session.backend._decoder.cells >= answer.timings.prompt_tokens + 59  # type: ignore[attr-defined]
        texts.append(answer.text)
    assert texts[0] == texts[1]


def test_chunks_of_any_length_change_nothing(
    tiny_artifacts: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(range(40, 90))
    logits = []
    for chunk in (512, 7):
        monkeypatch.setattr(ort_decoder, "CHUNK", chunk)
        monkeypatch.setattr(ort_module, "CHUNK", chunk)
        with load(tiny_artifacts("onnx-fp32"), threads=1) as session:
            session.backend.append_image(_frame(160, 96).pixels)
            logits.append(session.backend.decode_tokens(ids))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


def test_a_cache_that_cannot_grow_leaves_the_study_usable(
    tiny_artifacts: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_module, "FIRST_CELLS", 128)
    with load(tiny_artifacts("onnx-fp32"), threads=1) as session:
        study = session.study(_frame(96, 96))
        expected = study.ask("Is it?", max_new_tokens=8).text
        cache = ort_cache.KvCache

        def refuse_more(*args: Any) -> Any:
            if args[-1] > 128:
                raise MemoryError
            return cache(*args)

        monkeypatch.setattr(ort_decoder, "KvCache", refuse_more)
        with pytest.raises(GenerationError, match="not suffice for a context of 256"):
            study.ask("Is it?", max_new_tokens=300)
        assert study.ask("Is it?", max_new_tokens=8).text == expected


def test_the_cache_is_written_in_place(tiny_artifacts: Tiny) -> None:
    with load(tiny_artifacts("onnx-fp32"), threads=1) as session:
        backend = session.backend
        assert isinstance(backend, Ort)
        decoder = backend._decoder
        assert decoder is not None
        arrays = decoder._cache._arrays
        for array in arrays:
            array.fill(7)
        backend.decode_tokens([1, 2, 3])
        backend.decode_tokens([4])
        for array in arrays:
            assert not (array[0, :, :4] == 7).any()
            assert (array[0, :, 4:] == 7).all()


def test_saved_bytes_hold_only_the_cells_in_use(tiny_artifacts: Tiny) -> None:
    with load(tiny_artifacts("onnx-fp32"), threads=1) as session:
        backend = session.backend
        backend.decode_tokens([1, 2, 3])
        state, mark = backend.save(), backend.mark()
        assert state.nbytes == 3 * ort_fit.cell_bytes(session.manifest)
        expected = backend.decode_tokens([4])
        backend.rewind(START)
        backend.decode_tokens([9, 9, 9, 9])
        backend.restore(state, mark)
        assert np.array_equal(backend.decode_tokens([4]), expected)


def test_memory_is_given_back(tiny_artifacts: Tiny) -> None:
    """Fifty sessions one after the other: what a leak of weights or cache would add shows."""
    folder = tiny_artifacts("onnx-fp32")
    code = f"""
import medmo_edge, numpy as np
from pathlib import Path
from medmo_edge.images import Frame
from medmo_edge.runtime.session import Session, load
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
frame = Frame.from_pixels(np.zeros((64, 64, 3), np.uint8))
for turn in range(50):
    with load({os.fspath(folder)!r}, verify=False, threads=1) as session:
        session.ask(frame, "Is it?", max_new_tokens=2)
    if turn == 9:
        before = resident()
print(resident() - before)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads memory from /proc")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    weights = ort_fit.weight_bytes(read_manifest(folder))
    # Forty more sessions would add forty times the weights; the allocator keeps a little.
    assert int(result.stdout) < 2 * weights


def test_no_socket_is_opened(tiny_artifacts: Tiny, tmp_path: Path) -> None:
    """Telemetry threads start with the library, and hide on machines that look like CI."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "calls"
    code = (
        "import time, medmo_edge; session = medmo_edge.load("
        f"{os.fspath(tiny_artifacts('onnx-fp32'))!r}, verify=False, threads=1); "
        "print(session.ask([], 'Is it?', max_new_tokens=2).text); time.sleep(3)"
    )
    looks_like_ci = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in looks_like_ci}
    environment |= {"HOME": str(tmp_path)}
    command = [strace, "-f", "-qq", "-e", "trace=network", "-o", str(log)]
    result = subprocess.run(
        [*command, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    if "PTRACE" in result.stderr or "ptrace" in result.stderr:
        pytest.skip("this machine forbids tracing")
    assert result.returncode == 0, result.stderr
    assert log.read_text() == ""
    assert not list(tmp_path.glob("**/.onnxruntime"))


def test_a_truncated_weight_file_is_named(copy: Path) -> None:
    data = copy / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-4096])
    with pytest.raises(ArtifactError, match=r"decoder\.onnx\.data has \d+ bytes, its manifest"):
        load(copy)
    _state_again(copy)  # an exporter that stopped early and did not notice
    with pytest.raises(ArtifactError, match=r"decoder\.onnx refers to weights that its data file"):
        load(copy)


def _with_opset(path: Path, version: int, ir_version: int) -> None:
    onnx = pytest.importorskip("onnx", reason="writes graphs")
    model = onnx.load(path, load_external_data=False)
    for opset in model.opset_import:
        opset.version = version if opset.domain in ("", "ai.onnx") else opset.version
    model.ir_version = ir_version
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("opset", "ir_version", "reason"),
    [(99, 10, "opset 99, ONNX Runtime .* reads up to"), (21, 99, "IR version 99, .* up to")],
)
def test_a_graph_of_the_future_is_refused(
    opset: int, ir_version: int, reason: str, copy: Path
) -> None:
    _with_opset(copy / "vision.onnx", opset, ir_version)
    _state_again(copy)
    with pytest.raises(ArtifactError, match=reason) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_graphs_are_refused(copy: Path, capfd: Any) -> None:
    (copy / "decoder.onnx").write_bytes(b"nonsense")
    _state_again(copy)
    with pytest.raises(ArtifactError, match=r"decoder\.onnx is refused by ONNX Runtime") as caught:
        load(copy)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_graphs_that_do_not_fit_their_manifest_are_refused(copy: Path) -> None:
    model = read_manifest(copy).model
    for changes, reason in (
        ({"num_layers": 3}, "does not have the inputs that its manifest implies"),
        ({"vocab_size": model["vocab_size"] + 64}, "the manifest says bfloat16"),
        ({"hidden_size": 128}, "the manifest says bfloat16"),
        ({"mrope_section": None}, "lacks or garbles model entry"),
        ({"vision": {}}, "sizes of the vision tower"),
    ):
        _state_again(copy, model=model | changes)
        with pytest.raises(ArtifactError, match=reason):
            load(copy)


def test_an_embedding_table_cut_short(copy: Path) -> None:
    table = copy / "embed_tokens.npy"
    table.write_bytes(table.read_bytes()[:-2])
    _state_again(copy)
    with pytest.raises(ArtifactError, match=r"embed_tokens\.npy cannot be read"):
        load(copy)


def test_an_unknown_number_format(copy: Path) -> None:
    manifest = read_manifest(copy)
    _state_again(copy, weights=manifest.weights | {"graph_dtype": "float8"})
    with pytest.raises(ArtifactError, match="graph_dtype 'float8'"):
        load(copy)


def test_reasons_of_a_missing_or_doubled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, reason in (
        ({"onnxruntime": None, "onnxruntime-gpu": None}, r"pip install 'medmo-edge\[cpu\]'"),
        ({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}, "both installed and overwrite"),
        ({"onnxruntime": "1.30.2", "onnxruntime-gpu": None}, "1.30.2 is too old: install 1.31"),
    ):
        monkeypatch.setattr(ort_native, "versions", lambda found=found: found)
        obstacle = ort_module.unavailable()
        assert obstacle is not None
        assert re.search(reason, obstacle)


def test_a_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr(ort_native, "import_module", fail)
    ort_native.load_library.cache_clear()
    try:
        assert "libcublas.so.13" in str(ort_module.unavailable())
        with pytest.raises(BackendUnavailable):
            ort_native.load_library()
    finally:
        ort_native.load_library.cache_clear()


def test_cuda_that_does_not_start_is_said_aloud(
    tiny_artifacts: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The library lists CUDA without a GPU: only the session's own list counts."""
    gpu = Cuda(name="Example GPU", sm=90, memory_bytes=80 << 30)
    device = replace(probe(), cuda=(gpu,), cuda_version="13.0", ram_available_bytes=300 << 20)
    monkeypatch.setattr(ort_native, "has_cuda", lambda: True)
    manifest = read_manifest(tiny_artifacts("onnx-fp16"))
    assert ort_module.place(manifest, device) == ("cuda", "")
    backend = ort_module.open(manifest, device, threads=1)
    assert backend.device.startswith("cpu (")
    assert "could not start CUDA" in caplog.text
    assert backend.max_cells == 1024 < ort_fit.max_cells(manifest, device, "cuda", None)
    assert np.isfinite(backend.decode_tokens([1, 2, 3])).all()
    backend.close()


def test_versions_are_json() -> None:
    assert json.loads(json.dumps(ort_module.describe())).keys() == set(ort_native.DISTRIBUTIONS)
