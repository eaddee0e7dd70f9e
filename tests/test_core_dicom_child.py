"""The decoding child: its limits, its end, and that it changes no pixel."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom.data
import pytest

from medmo_edge import dicom
from medmo_edge.dicom_process import IN_PROCESS
from medmo_edge.errors import ImageError
from medmo_edge.images import Frame, read_image

INSTALLED = Path(pydicom.data.__file__).parent / "test_files"


def test_a_hanging_child_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "child_seconds", lambda _: 0.05)
    start = time.monotonic()
    with pytest.raises(ImageError, match="took more than .* s and was stopped"):
        read_image(INSTALLED / "CT_small.dcm")
    assert time.monotonic() - start < 5


# An answer whose pixels never come.
ANSWER = '{"shape": [4, 4], "size": [4, 4], "source": {"notes": []}}'


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"crashed \(signal 11\)"),
        ("raise SystemExit(3)", r"could not work \(exit code 3\)"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 9))\nwhile True: pass",
            "took more than .* s of processor time",
        ),
        ("print('no json')", "damaged answer"),
        ('print(\'{"shape": [4, 4, 9], "size": [4, 4]}\')', "damaged answer"),
        ('print(\'{"shape": [-4, 4], "size": [4, 4]}\')', "damaged answer"),
        (f"print({ANSWER!r})", r"could not work \(exit code 0\)"),
    ],
)
def test_a_child_that_ends_badly_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    package = tmp_path / "medmo_edge"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "dicom_child.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImageError, match=reason):
        read_image(INSTALLED / "CT_small.dcm")


def test_the_child_is_limited() -> None:
    code = (
        "import resource; from medmo_edge.dicom_child import limit_resources; limit_resources(3);"
        "print(*(resource.getrlimit(k)[0] for k in "
        "(resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(2**30), "3", "0"]


def test_child_and_process_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples_ybr_color.dcm", "MR_small_RLE.dcm"):
        apart = read_image(INSTALLED / name)
        monkeypatch.setenv(IN_PROCESS, "1")
        inside = read_image(INSTALLED / name)
        monkeypatch.delenv(IN_PROCESS)
        np.testing.assert_array_equal(apart.pixels, inside.pixels)
        assert apart.source == inside.source


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm"]
)
def test_mutated_codestreams_never_harm_this_process(name: str, tmp_path: Path) -> None:
    """Through the child: C decoders may crash on these, the caller sees one line."""
    random = np.random.default_rng(0)
    data = np.frombuffer((INSTALLED / name).read_bytes(), np.uint8)
    path = tmp_path / "fuzz.dcm"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(25):
        changed = data.copy()
        changed[random.integers(len(data), size=12)] = random.integers(256, size=12)
        path.write_bytes(changed.tobytes())
        try:
            assert isinstance(read_image(path), Frame)
        except ImageError as error:
            assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert os.listdir(tmp_path) == ["fuzz.dcm"]
