"""Frames decoded by forks of a template: same pixels, one process a frame, every fault alone."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom.data
import pytest

import medmo_edge
from medmo_edge import dicom, dicom_pool
from medmo_edge.dicom_pool import DecoderPool
from medmo_edge.errors import ImageError
from medmo_edge.images import read_image

INSTALLED = Path(pydicom.data.__file__).parent / "test_files"
PACKAGE = Path(medmo_edge.__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")

# The real child, but for files that ask for a fault in place of their data set.
FAULTY = f"""
import os, resource, signal, time
exec(open({str(PACKAGE / "dicom_child.py")!r}).read().partition('if __name__')[0])
decode, write = answer, send
ANSWER = {{"shape": [4, 4], "size": [4, 4], "source": {{"notes": []}}}}

def open_files():
    found = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    kinds = [os.readlink(f"/proc/self/fd/{{each}}").partition(":")[0]
             for each in found if os.path.exists(f"/proc/self/fd/{{each}}")]
    return " ".join("file" if kind.endswith(".dcm") else kind for kind in kinds)

def answer(file, request):
    fault = file.read(160)[132:].decode("latin-1").split("\\0")[0]
    file.seek(0)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "spin":
        while True: pass
    if fault == "sleep":
        time.sleep(60)
    if fault == "leave":
        os._exit(3)
    if fault == "lie":
        return {{"shape": [4, 4, 9], "size": [4, 4]}}, None
    if fault == "stay":
        return {{"error": "stay"}}, None
    if fault == "half":
        return ANSWER, np.zeros(3, np.uint8)
    if fault == "tell":
        limits = [resource.getrlimit(kind)[0] for kind in
                  (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE)]
        secret = os.environ.get("ARCHIVE_TOKEN")
        told = f"{{os.getpid()}} {{os.getppid()}} {{limits}} {{open_files()}} {{secret}}"
        return {{"error": told}}, None
    return decode(file, request)

def _render_quietly(file, frame, window, render=_render_quietly):
    if b"eat" in file.read(160):
        bytearray(2 << 30)
    return render(file, frame, window)

def send(pipe, reply, pixels):
    write(pipe, reply, pixels)
    if "stay" in str(reply):
        os.close(pipe)
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecoderPool]:
    """A pool of one template whose children can be told to fail."""
    folder = tmp_path_factory.mktemp("faulty")
    package = folder / "medmo_edge"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(PACKAGE)!r})")
    (package / "dicom_child.py").write_text(FAULTY)
    with pytest.MonkeyPatch.context() as patch, DecoderPool(1) as pool:
        patch.syspath_prepend(str(folder))
        patch.setattr(dicom_pool, "_END_SECONDS", 0.3)
        patch.setenv("ARCHIVE_TOKEN", "secret")
        yield pool


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2) as made:
        yield made


def _ask_for(fault: str, folder: Path, pool: DecoderPool) -> str:
    """The message that a file which asks for ``fault`` ends with."""
    path = folder / f"{fault}.dcm"
    path.write_bytes(bytes(128) + b"DICM" + fault.encode() + bytes(64))
    with pytest.raises(ImageError) as caught:
        read_image(path, decoders=pool)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_pool_and_interpreter_agree(pool: DecoderPool) -> None:
    for name in ("CT_small.dcm", "SC_rgb_jpeg_gdcm.dcm"):
        alone, pooled = read_image(INSTALLED / name), read_image(INSTALLED / name, decoders=pool)
        np.testing.assert_array_equal(alone.pixels, pooled.pixels)
        assert alone.source == pooled.source
    assert len(pool._idle) == 1  # one was enough


def test_files_of_many_clients_are_never_mixed(pool: DecoderPool) -> None:
    names = ("CT_small.dcm", "MR_small_RLE.dcm", "examples_palette.dcm", "rtplan.dcm")
    pictures = {name: read_image(INSTALLED / name, decoders=pool).pixels for name in names[:3]}
    wrong: list[str] = []

    def client(number: int) -> None:
        for turn in range(6):
            name = names[(number + turn) % 4]
            try:
                same = np.array_equal(
                    read_image(INSTALLED / name, decoders=pool).pixels, pictures[name]
                )
            except ImageError as error:
                same = name == "rtplan.dcm" and "holds no pixel data" in str(error)
            if not same:
                wrong.append(name)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(pool._idle) == 2


@pytest.mark.parametrize(
    ("fault", "message", "spared"),
    [
        ("eat", "decoding needs more than 1024 MiB of memory", True),
        ("crash", r"crashed \(signal 11\)", False),
        pytest.param(*("leave", r"could not work \(exit code 3\)", False), marks=pytest.mark.slow),
        ("lie", "damaged answer", True),
        ("stay", "stay", False),
        ("half", r"could not work \(exit code 0\)", True),
    ],
)
def test_a_fault_is_one_line_and_the_next_frame_is_right(
    faulty: DecoderPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
    spared: bool,
) -> None:
    if spared:  # a busy machine lets no child end in time
        monkeypatch.setattr(dicom_pool, "_END_SECONDS", 30.0)
    expected = read_image(INSTALLED / "CT_small.dcm", decoders=faulty).pixels
    template = faulty._idle[0]
    said = _ask_for(fault, tmp_path, faulty)
    assert re.search(message, said), said
    assert len(faulty._idle) == 1 and (faulty._idle[0] is template) == spared
    frame = read_image(INSTALLED / "CT_small.dcm", decoders=faulty)
    np.testing.assert_array_equal(frame.pixels, expected)


@pytest.mark.parametrize(
    ("fault", "wall", "message"),
    [
        ("sleep", 5.0, "took more than 1 s and was stopped"),
        pytest.param("spin", 60.0, "of processor time", marks=pytest.mark.slow),
    ],
)
def test_a_child_that_does_not_end_is_ended(
    faulty: DecoderPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    wall: float,
    message: str,
) -> None:
    monkeypatch.setattr(dicom, "child_seconds", lambda _: 0.2)
    monkeypatch.setattr(dicom, "CHILD_WALL_FACTOR", wall)
    before = read_image(INSTALLED / "CT_small.dcm", decoders=_patient(faulty, monkeypatch)).pixels
    monkeypatch.setattr(dicom, "child_seconds", lambda _: 0.2)
    assert message in _ask_for(fault, tmp_path, faulty)
    after = read_image(INSTALLED / "CT_small.dcm", decoders=_patient(faulty, monkeypatch)).pixels
    np.testing.assert_array_equal(before, after)


def _patient(pool: DecoderPool, monkeypatch: pytest.MonkeyPatch) -> DecoderPool:
    """``pool``, with time enough for a new template to import everything."""
    monkeypatch.setattr(dicom, "child_seconds", lambda _: 8.0)
    return pool


def test_every_frame_has_a_limited_process_without_a_way_back(
    faulty: DecoderPool, tmp_path: Path
) -> None:
    said = [_ask_for("tell", tmp_path, faulty) for _ in range(3)]
    children = {each.split()[0] for each in said}
    parents = {each.split()[1] for each in said}
    assert len(children) == 3 and len(parents) == 1
    for each in said:
        # stdin is the file; the copy of it; stdout, stderr, and the pipe: no socket.
        assert "[1073741824, 9, 0]" in each and "socket" not in each and "pipe" in each
        assert each.endswith("None")  # no token of its parent
    (template,) = faulty._idle
    assert parents == {str(template._process.pid)}
    tasks = Path(f"/proc/{template._process.pid}/task")
    assert len(list(tasks.iterdir())) == 1  # forks of several threads can hang


def test_a_killed_template_is_replaced_and_an_old_one_too(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    read_image(INSTALLED / "CT_small.dcm", decoders=pool)
    (killed,) = pool._idle
    os.kill(killed._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, killed._process.pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(dicom_pool, "FRAMES_PER_TEMPLATE", 2)
    seen = set()
    for _ in range(3):
        read_image(INSTALLED / "CT_small.dcm", decoders=pool)
        seen.add(pool._idle[0]._process.pid)
    assert killed._process.pid not in seen and len(seen) == 2
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ImageError, match="decoders are closed"):
        read_image(INSTALLED / "CT_small.dcm", decoders=pool)
    with pytest.raises(ImageError, match="window is too long"):
        read_image(INSTALLED / "CT_small.dcm", window="x" * 70_000, decoders=pool)


def test_templates_end_with_a_program_that_is_killed() -> None:
    code = (
        "import time; from medmo_edge.dicom_pool import DecoderPool; pool = DecoderPool(2);"
        "pool.warm(); print(*(each._process.pid for each in pool._idle), flush=True);"
        "time.sleep(60)"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    pids = [int(each) for each in program.stdout.readline().split()]
    program.kill()
    program.communicate()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(pids) == 2


def _runs(pid: int) -> bool:
    """Whether a process works; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
