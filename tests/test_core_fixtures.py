"""The shared fixtures themselves: a guard that cannot fail would guard nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medmo_edge.checkpoint import open_checkpoint

OFFLINE_TEST = """
import socket
import pytest

def test_hidden_connect():
    with socket.socket() as client:
        client.settimeout(1)
        try:
            client.connect(("192.0.2.1", 80))
        except OSError:
            pass  # a library that swallows the error

def test_look_up():
    with pytest.raises(OSError):
        socket.getaddrinfo("example.org", 443)

def test_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
"""


def test_the_network_guard_fails_tests(tmp_path: Path) -> None:
    (tmp_path / "test_offline.py").write_text(OFFLINE_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [*command, "--rootdir", "."],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "3 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert "used the network: [\"connect to ('192.0.2.1', 80)\"]" in done.stdout
    assert "used the network: ['look up example.org']" in done.stdout


def test_checkpoints_are_small_and_reproducible(
    tiny_checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert open_checkpoint(tiny_checkpoint).num_parameters < 6_000_000
    again, other = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", seed=9)
    for path in tiny_checkpoint.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    weights = "model.safetensors"
    assert (again / weights).read_bytes() != (other / weights).read_bytes()


@pytest.mark.parametrize("which", ["tiny_checkpoint", "tiny_untied_checkpoint"])
def test_random_weights_give_sane_logits(request: pytest.FixtureRequest, which: str) -> None:
    """Spread over a few units: neither all alike nor one token that always wins."""
    torch = pytest.importorskip("torch", reason="the forward pass needs torch")
    transformers = pytest.importorskip("transformers", reason="the model is transformers'")
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        request.getfixturevalue(which), dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(input_ids=torch.arange(100, 164)[None]).logits[0].numpy()
    spread = logits.std(axis=1)
    assert 1 < spread.min() and spread.max() < 6
    assert len(np.unique(logits.argmax(axis=1))) > 20
