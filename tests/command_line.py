"""The command in this process, and what a refusal must look like: for the tests of commands."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medmo_edge.cli import main


def run_here(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str | Path,
) -> subprocess.CompletedProcess[str]:
    """What a run gives, without the start-up of a new process."""
    monkeypatch.setattr(sys, "argv", ["medmo-edge", *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    code = ended.value.code if isinstance(ended.value.code, int) else 1
    return subprocess.CompletedProcess(arguments, code, output.out, output.err)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and exactly one line on stderr that says what is wrong."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("medmo-edge: "), result.stderr
    assert all(word in lines[0] for word in words), result.stderr
    assert result.stdout == ""
