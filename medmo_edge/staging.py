"""Folders that appear whole: filled under a hidden name beside their place, then renamed into it.

A writer that is killed leaves its folder behind; the next one of the same place removes it, but
only where it is certain that nobody writes there any more: the folder's name says under which boot
of which machine it was made and by which process, and a lock on it lasts as long as that process.
What is in the folders is the writer's business; so is the renaming, for which ``take_place`` is
there where an older folder may have to go.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, whose parents are made, for the block to fill and rename.

    What killed writers of ``target`` left is removed before. On any error and on Ctrl-C the folder
    goes again, and so do the parents. Errors: OSError.
    """
    staging = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    made: list[Path] = []
    lock = None
    try:
        _make_parents(target.parent, made)
        _remove_abandoned(target)
        staging.mkdir()
        lock, boot, start = _lock(staging), _boot(), _start(os.getpid())
        if lock is not None and boot and start:  # by any other name it is nobody's to remove
            staging = staging.rename(f"{staging}-{boot}-{os.getpid()}-{start}")
        yield staging
    except BaseException:
        _remove_tree(staging)
        for folder in made:
            _remove_empty(folder)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def take_place(staging: Path, target: Path, *, durable: bool = False) -> None:
    """Rename ``staging`` to ``target``; an older folder of that name is removed only after that.

    ``durable`` removes it only when the new name is on the disk, past a power cut. Errors: OSError.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a writer that was killed
    if target.exists():
        target.rename(old)
    staging.rename(target)
    if durable:
        sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Return when the file or folder is on the disk: a power cut could lose a name before."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed writers of ``target`` left; say what may be of one that still runs."""
    stem = rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}"
    for path in target.parent.iterdir():
        parts = re.fullmatch(rf"{stem}(?:-(\w+)-(\d+)-(\d+))?", path.name)
        if parts is None:
            continue
        boot, pid, start = parts.groups()
        gone = boot is not None and boot == _boot() and _start(pid) != start
        lock = _lock(path) if gone else None
        if lock is not None:
            _remove_tree(path)
            os.close(lock)
        if path.exists():
            getLogger("medmo_edge").warning(
                "%s is left alone, it may be in use: remove it if nobody writes %s", path, target
            )


def _boot() -> str | None:
    """What no other machine has, nor this one after a restart; its containers share it."""
    try:
        return _BOOT_ID.read_text().replace("-", "")[:12]
    except OSError:  # no Linux
        return None


def _start(pid: int | str) -> str | None:
    """When a process began, in ticks since the boot; None where there is none that can be seen.

    Containers number their processes alike, but no two of one number began in the same tick.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22 of proc_pid_stat(5)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on ``folder``; None where it is taken or there is none."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make the missing parents; ``made`` lists them innermost first, so a failure can undo them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir()
        made.insert(0, each)


def _remove_tree(folder: Path) -> None:
    """Remove a folder; a second, impatient Ctrl-C must not leave gigabytes behind."""
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except KeyboardInterrupt:
            continue
        except OSError:
            return  # the first error is the one to report


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # somebody else put something there meanwhile
