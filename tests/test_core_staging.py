"""Folders that appear whole, and what becomes of those whose writers were killed."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medmo_edge import staging
from medmo_edge.staging import staging_folder, take_place

WRITER = """
import sys, time
from pathlib import Path
from medmo_edge.staging import staging_folder
with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""
needs_boot = pytest.mark.skipif(not staging._boot(), reason="this system does not name its boots")


@contextmanager
def writer(target: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is filling a folder for ``target``, and that folder."""
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def killed(target: Path) -> Path:
    """What a writer of ``target`` leaves that dies by SIGKILL."""
    with writer(target) as (process, folder):
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert (folder / "half").is_file()
    return folder


def write(target: Path) -> None:
    """Write ``target`` as a whole."""
    with staging_folder(target) as folder:
        (folder / "whole").write_bytes(b"whole")
        folder.rename(target)


@needs_boot
def test_what_killed_writers_left_is_removed_by_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        killed(tmp_path / "deep" / "a")
    other, longer = killed(tmp_path / "deep" / "b"), killed(tmp_path / "deep" / "a.partial-b")
    write(tmp_path / "deep" / "a")
    left = {other.name, longer.name, "a"}
    assert set(os.listdir(tmp_path / "deep")) == left and not caplog.messages


@needs_boot
def test_another_process_of_the_same_number_is_not_the_writer(tmp_path: Path) -> None:
    """As in a container, where the first process is always number one."""
    folder = killed(tmp_path / "a")
    stem, boot, _, start = folder.name.rsplit("-", 3)
    folder.rename(tmp_path / f"{stem}-{boot}-{os.getpid()}-{start}")
    write(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


@needs_boot
def test_an_error_of_the_next_one_still_removes_what_was_left(tmp_path: Path) -> None:
    killed(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path / "a"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_being_written_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with writer(tmp_path / "a") as (process, folder), staging_folder(tmp_path / "a") as own:
        write(tmp_path / "a")  # a third one, while this process and another are at it
        assert process.poll() is None
        assert {path.name for path in tmp_path.iterdir()} == {"a", folder.name, own.name}
        assert (folder / "half").is_file()
    assert len(caplog.messages) == 3  # one for the second writer, two for the third
    assert all("\n" not in line and "left alone" in line for line in caplog.messages)


@needs_boot
@pytest.mark.parametrize("doubt", ["lock", "process", "boot", "name", "no boot"])
def test_one_reason_to_doubt_is_enough_to_leave_it(
    doubt: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed(tmp_path / "a")
    stem, boot, pid, start = folder.name.rsplit("-", 3)
    lock = None
    if doubt == "lock":  # as seen from another container: the lock is the machine's, pids are not
        lock = staging._lock(folder)
    elif doubt == "process":
        own = f"{os.getpid()}-{staging._start(os.getpid())}"
        folder = folder.rename(tmp_path / f"{stem}-{boot}-{own}")
    elif doubt == "boot":  # another machine, or this one before it was restarted
        folder = folder.rename(tmp_path / f"{stem}-{'0' * len(boot)}-{pid}-{start}")
    elif doubt == "name":  # where locks cannot be had
        folder = folder.rename(tmp_path / stem)
    else:
        monkeypatch.setattr(staging, "_BOOT_ID", tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "a")
    if lock is not None:
        os.close(lock)
    assert (folder / "half").read_bytes() == b"half"
    assert caplog.messages == [
        f"{folder} is left alone, it may be in use: remove it if nobody writes {tmp_path / 'a'}"
    ]


@pytest.mark.parametrize("durable", [False, True])
def test_an_older_folder_gives_its_place(durable: bool, tmp_path: Path) -> None:
    target = tmp_path / "a"
    for name in ("a", ".a.old"):  # of a writer that was killed between its two renames
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_bytes(b"stale")
    with staging_folder(target) as folder:
        (folder / "whole").write_bytes(b"whole")
        take_place(folder, target, durable=durable)
    assert os.listdir(tmp_path) == ["a"] and os.listdir(target) == ["whole"]


def test_where_no_lock_can_be_had_nothing_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_lock", lambda _: None)
    with staging_folder(tmp_path / "a") as folder:
        assert len(folder.name) == len(".a.partial-01234567")


def test_a_link_of_that_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_bytes(b"")
    name = f".a.partial-01234567-{staging._boot()}-{2**22 + 1}-1"  # no process has that number
    (tmp_path / name).symlink_to(tmp_path / "theirs")
    write(tmp_path / "a")
    assert (tmp_path / "theirs" / "file").is_file()
