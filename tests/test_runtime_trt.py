"""The TensorRT backend on fakes of CUDA and TensorRT that compute: answers, memory, graphs."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_fake import Error
from numpy.typing import NDArray
from trt_artifacts import write_scatter
from trt_machine import Machine, pretend

from medmo_edge.errors import GenerationError
from medmo_edge.images import Frame
from medmo_edge.manifest import read_manifest
from medmo_edge.runtime.backends import START, Interrupted
from medmo_edge.runtime.session import load
from medmo_edge.runtime.trt import Trt
from medmo_edge.runtime.trt_make import make_engines

pytest.importorskip("onnxruntime", reason="the fake GPU computes with it")
pytest.importorskip("onnx", reason="the fake TensorRT parses with it")

# Largest difference of a logit of nano to the ort backend in fp32; 1.6e-5 was measured.
BOUND = 5e-5


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nano for ONNX Runtime, and the same weights in graphs for TensorRT."""
    from medmo_edge.export.export import export_checkpoint

    folder = tmp_path_factory.mktemp("nano")
    export_checkpoint("nano", "onnx-fp32", folder / "ort", golden=False)
    return {"ort": folder / "ort", "trt": write_scatter(folder / "ort", "nano", folder / "trt")}


@pytest.fixture
def machine(artifacts: dict[str, Path]) -> Iterator[Machine]:
    """A GPU for which the engines are built."""
    with pretend() as made:
        make_engines(read_manifest(artifacts["trt"]), made.device)
        yield made


@pytest.fixture
def trt(machine: Machine, artifacts: dict[str, Path]) -> Iterator[Trt]:
    """The loaded backend; nothing of it may be left afterwards."""
    with load(artifacts["trt"], "trt") as session:
        assert isinstance(session.backend, Trt)
        yield session.backend
    assert machine.cuda.leaks() == []


def _pixels(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _logits(backend: Any, *parts: list[int] | NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits [T, V] after each run of text of a conversation from the start."""
    backend.rewind(START)
    steps = []
    for part in parts:
        if isinstance(part, list):
            steps.append(backend.decode_tokens(part))
        else:
            backend.append_image(part)
    return np.stack(steps)


def test_logits_are_those_of_the_ort_backend(trt: Trt, artifacts: dict[str, Path]) -> None:
    """Text, two pictures, prompts longer than a chunk, single steps: everything the cache sees."""
    parts = ([5, 6, 7], _pixels(96, 64), [8], _pixels(320, 256, 1), list(range(20, 120)), [9], [10])
    with load(artifacts["ort"], threads=1) as session:
        expected = _logits(session.backend, *parts)
    found = _logits(trt, *parts)
    assert np.abs(found - expected).max() < BOUND
    assert trt.mark().cells == 3 + 6 + 1 + 80 + 100 + 2
    assert trt.mark().position < trt.mark().cells


def test_answers_are_those_of_the_ort_backend(machine: Machine, artifacts: dict[str, Path]) -> None:
    from medmo_edge.phantoms import draw

    frame = Frame.from_pixels(draw(910_000, size=(256, 256)).pixels)
    texts = []
    for name in ("ort", "trt"):
        with load(artifacts[name], name, threads=1) as session, session.study(frame) as study:
            answers = [study.locate("nodule", max_new_tokens=40), study.ask("Is there a fracture?")]
            texts.append([answer.text for answer in answers])
        assert answers[1].timings.reused_tokens > 64
    assert texts[0] == texts[1]
    assert "<box>" in texts[0][0]
    assert answers[0].provenance.device == "cuda (Example GPU, tensorrt 10.16.1)"
    assert machine.cuda.leaks() == []


def test_half_precision_graphs_run(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = write_scatter(artifacts["ort"], "nano", tmp_path / "half", dtype="float16")
    parts = ([5, 6, 7], _pixels(96, 64), [8, 9], [10])
    with pretend() as machine, load(artifacts["ort"], threads=1) as ort:
        make_engines(read_manifest(folder), machine.device)
        with load(folder, "trt") as session:
            found = _logits(session.backend, *parts)
        expected = _logits(ort.backend, *parts)
    assert 1e-5 < np.abs(found - expected).max() < 0.05


def test_the_tower_alone(trt: Trt, artifacts: dict[str, Path]) -> None:
    picture = _pixels(128, 96)
    with load(artifacts["ort"], threads=1) as session:
        expected = session.backend.encode_image(picture)
    assert np.abs(trt.encode_image(picture) - expected).max() < BOUND
    assert trt.mark() == START


def test_prompts_go_in_chunks_and_steps_in_a_captured_graph(machine: Machine, trt: Trt) -> None:
    launches = machine.world.launches
    launches.clear()
    trt.decode_tokens(list(range(1, 151)))
    assert [rows for _, rows, _ in launches] == [64, 64, 22]
    launches.clear()
    for token in range(2, 8):
        trt.decode_tokens([token])
    # The first step lets TensorRT prepare, the second is captured, the rest only launch the graph.
    assert launches == [("decoder", 1, False), ("decoder", 1, True)]
    assert machine.cuda.calls["cudaGraphLaunch"] == 5
    trt.append_image(_pixels(64, 64))
    trt.decode_tokens([3])
    assert machine.cuda.calls["cudaGraphLaunch"] == 6  # prefill between does not disturb it
    assert machine.cuda.calls["cudaGraphInstantiate"] == 1


def test_a_step_needs_no_allocation(machine: Machine, trt: Trt) -> None:
    for token in range(3):
        trt.decode_tokens([token])
    before = dict(machine.cuda.calls)
    trt.decode_tokens([9])
    changed = {name for name, count in machine.cuda.calls.items() if before.get(name) != count}
    assert changed == {"cudaGraphLaunch", "cudaStreamSynchronize"}


@pytest.mark.parametrize("problem", ["forbidden", "failing"])
def test_steps_run_without_a_graph_where_capturing_fails(
    problem: str,
    machine: Machine,
    artifacts: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with load(artifacts["trt"], "trt") as session:
        expected = _logits(session.backend, [5, 6], [7], [8], [9])
    if problem == "forbidden":
        machine.world.is_capturable = False
    else:
        machine.cuda.failures["cudaGraphInstantiate"] = Error.cudaErrorInvalidValue
    with load(artifacts["trt"], "trt") as session:
        found = _logits(session.backend, [5, 6], [7], [8], [9])
    assert np.array_equal(found, expected)
    assert [each.message for each in caplog.records if "without a CUDA graph" in each.message]
    assert machine.cuda.leaks() == []


def test_an_engine_that_does_not_write_in_place_gets_two_caches(
    machine: Machine, artifacts: dict[str, Path]
) -> None:
    parts = ([5, 6, 7], _pixels(96, 64), [8], [9], [10], [11], [12])
    with load(artifacts["trt"], "trt") as session:
        expected, one = _logits(session.backend, *parts), machine.cuda.used_bytes
    machine.world.in_place = False
    with load(artifacts["trt"], "trt") as session:
        found, two = _logits(session.backend, *parts), machine.cuda.used_bytes
        assert np.array_equal(found, expected)
        state, mark = session.backend.save(), session.backend.mark()
        again = session.backend.decode_tokens([13])
        session.backend.rewind(START)
        session.backend.decode_tokens([1, 2])
        session.backend.restore(state, mark)
        assert np.array_equal(session.backend.decode_tokens([13]), again)
    cache = 2 * 4 * 2 * 512 * 64 * 4  # keys and values, layers, heads, cells, width, bytes
    assert two - one == cache
    # One graph for each of the two ways round.
    assert machine.cuda.calls["cudaGraphInstantiate"] == 1 + 2


def test_saved_bytes_hold_only_the_cells_in_use(trt: Trt) -> None:
    trt.decode_tokens([1, 2, 3])
    state, mark = trt.save(), trt.mark()
    assert state.nbytes == 3 * 2 * 4 * 2 * 64 * 4
    expected = trt.decode_tokens([4])
    trt.rewind(START)
    trt.append_image(_pixels(96, 64))
    trt.restore(state, mark)
    assert np.array_equal(trt.decode_tokens([4]), expected)


def test_what_was_rewound_is_forgotten(trt: Trt) -> None:
    expected = _logits(trt, [1, 2, 3], [4], [5])
    trt.rewind(START)
    trt.append_image(_pixels(320, 320))
    assert np.array_equal(_logits(trt, [1, 2, 3], [4], [5]), expected)


def test_cancelling_between_chunks_loses_nothing(machine: Machine, trt: Trt) -> None:
    trt.decode_tokens([1, 2, 3])
    mark, expected = trt.mark(), trt.decode_tokens([4])
    trt.rewind(mark)
    machine.world.launches.clear()
    trt.set_interrupt(lambda: len(machine.world.launches) == 2)
    with pytest.raises(Interrupted):
        trt.decode_tokens(list(range(200)))
    assert len(machine.world.launches) == 2  # of four
    assert trt.mark() == mark
    trt.set_interrupt(None)
    assert np.array_equal(trt.decode_tokens([4]), expected)


def test_a_cancelled_answer_keeps_what_was_said(
    machine: Machine, artifacts: dict[str, Path]
) -> None:
    cancel = threading.Event()
    with load(artifacts["trt"], "trt") as session:
        stream = session.study([]).stream("Is it?", cancel=cancel, max_new_tokens=100)
        next(iter(stream))
        cancel.set()
        assert stream.finish().finish_reason == "cancelled"


def test_a_full_context_is_an_error_and_harmless(trt: Trt) -> None:
    assert trt.max_cells == 512
    trt.decode_tokens(list(range(1, 501)))
    mark = trt.mark()
    with pytest.raises(GenerationError, match=r"520 tokens do not fit .*--cache-length"):
        trt.decode_tokens(list(range(20)))
    assert trt.mark() == mark
    trt.decode_tokens([1])


def test_a_picture_that_the_engine_was_not_built_for(trt: Trt) -> None:
    with pytest.raises(GenerationError, match="4100 patches, the engine was built for 4 to 4096"):
        trt.encode_image(_pixels(32 * 41, 32 * 25))


def test_a_shorter_context_can_be_asked_for(machine: Machine, artifacts: dict[str, Path]) -> None:
    with load(artifacts["trt"], "trt", max_context=100) as session:
        assert session.backend.max_cells == 100


def test_a_closed_backend_says_so(trt: Trt) -> None:
    trt.close()
    calls: list[Callable[[], Any]] = [
        lambda: trt.decode_tokens([1]),
        lambda: trt.append_image(_pixels(64, 64)),
        lambda: trt.rewind(START),
        trt.save,
    ]
    for call in calls:
        with pytest.raises(GenerationError, match="closed"):
            call()
    trt.close()


def test_a_gpu_that_fails_is_an_error_of_ours(machine: Machine, trt: Trt) -> None:
    machine.cuda.failures["cudaMemcpyAsync"] = Error.cudaErrorIllegalAddress
    with pytest.raises(GenerationError, match=r"illegal memory access .*\(CUDA error 700\)"):
        trt.decode_tokens([1, 2])
    machine.cuda.failures.clear()
    trt.decode_tokens([1, 2])
