"""Fixtures of every room: real data, tiny checkpoints and artifacts, a node, a network guard."""

import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from tiny_checkpoints import write_checkpoint

if TYPE_CHECKING:
    from node_bench import Bench

TESTS = Path(__file__).parent
runpy.run_path(str(TESTS.parent / "benchmarks" / "dcmtk_programs.py"))["prefer_dcmtk"]()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs in background

_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeat", _PATIENT, derandomize=True)
settings.register_profile("search", _PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

MakeCheckpoint = Callable[..., Path]
MakeSource = Callable[..., Path]


def pytest_unconfigure() -> None:
    """Close the two files that llama-cpp-python keeps open for destructors that come late.

    No test leaves it any; and with warnings as errors, Python complains of open files at its end.
    """
    library = sys.modules.get("llama_cpp._utils")
    if library is not None:
        library.outnull_file.close()
        library.errnull_file.close()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, or a skip: tests must pass without it."""
    folder = os.environ.get("MEDMO_EDGE_DATA")
    if not folder:
        pytest.skip("MEDMO_EDGE_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def make_checkpoint() -> MakeCheckpoint:
    """Factory of random checkpoints: ``make_checkpoint(path, **changes) -> path``."""
    return write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, one shard, one deepstack level: the nano shape. Do not write into it."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny_untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, three shards, three deepstack levels: the 8B shape. Do not write into it."""
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "tiny-untied",
        vision={"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 2304},
        tied=False,
        shards=3,
        seed=1,
    )


@pytest.fixture(scope="session")
def tiny_artifacts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``tiny_artifacts(target, checkpoint="tiny_checkpoint")``: exported once. Do not write there.

    ``checkpoint`` names a fixture of this file.
    """
    pytest.importorskip("gguf", reason="exporting needs the export extra")
    from medmo_edge.export.export import export_checkpoint

    made: dict[tuple[str, str], Path] = {}

    def artifact(target: str, checkpoint: str = "tiny_checkpoint") -> Path:
        if (target, checkpoint) not in made:
            folder = tmp_path_factory.mktemp("artifacts") / target
            export_checkpoint(request.getfixturevalue(checkpoint), target, folder, golden=False)
            made[target, checkpoint] = folder
        return made[target, checkpoint]

    return artifact


@pytest.fixture(scope="session")
def tiny_artifact(tiny_artifacts: Callable[..., Path]) -> Path:
    """``tiny_checkpoint`` exported to gguf-f16. Do not write into it."""
    return tiny_artifacts("gguf-f16")


@pytest.fixture(scope="session")
def tiny_untied_artifact(tiny_artifacts: Callable[..., Path]) -> Path:
    """``tiny_untied_checkpoint`` exported to gguf-f16. Do not write into it."""
    return tiny_artifacts("gguf-f16", "tiny_untied_checkpoint")


@pytest.fixture(scope="session")
def tiny_scatter(
    tiny_artifacts: Callable[..., Path],
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """``tiny_checkpoint`` in float32 graphs for TensorRT, without engines. Do not write into it."""
    from trt_artifacts import write_scatter

    folder = tmp_path_factory.mktemp("scatter") / "artifact"
    return write_scatter(tiny_artifacts("onnx-fp32"), tiny_checkpoint, folder)


@pytest.fixture(scope="module")
def short_search() -> Iterator[None]:
    """AWQ tries few exponents: for tests of what comes of it, not of the search itself."""
    from medmo_edge.calibration import awq

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq, "_GRID", 3)
        yield


@pytest.fixture(scope="session")
def write_source() -> MakeSource:
    """``write_source(kind, path, **elements) -> path``: see dicom_sources.py for the kinds."""
    pytest.importorskip("pydicom")
    from dicom_sources import write_source

    return write_source


@pytest.fixture
def decode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """DICOM frames are decoded in this process: a child for each would be most of the time."""
    monkeypatch.setenv("MEDMO_EDGE_DICOM_IN_PROCESS", "1")


@pytest.fixture
def bench(tmp_path: Path, decode_here: None) -> Iterator["Bench"]:
    """A configured DICOM node, not yet running: see node_bench.py."""
    from node_bench import Bench

    with ExitStack() as stack:
        made = Bench(tmp_path, stack)
        made.configure()
        yield made


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that looks beyond this machine fails, even when the code it tests hides the error."""
    attempts: list[str] = []
    real_connect, real_lookup = socket.socket.connect, socket.getaddrinfo

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
            attempts.append(f"connect to {address}")
            raise ConnectionRefusedError(f"tests may not connect to {address}")
        real_connect(self, address)

    def lookup(host: Any, *args: Any, **options: Any) -> Any:
        if host is not None and not _is_loopback(host):
            attempts.append(f"look up {host}")
            raise socket.gaierror(f"tests may not look up {host}")
        return real_lookup(host, *args, **options)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    yield
    assert not attempts, f"the test used the network: {attempts}"


def _is_loopback(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    return name.startswith("127.") or name in ("::1", "localhost", "0.0.0.0", "")
