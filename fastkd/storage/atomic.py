"""Files that exist completely or not at all, and one sentence for whatever a disk may refuse.

Whole files go through a temporary one, which is flushed and renamed; rows are appended whole.
Checkpoints, weights, run folders and plots are written through here.
"""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastkd.errors import RunFailed

__all__ = ["FULL", "append_line", "atomic_path", "remove_leftovers", "sentence", "writing"]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of a user's share of it, that is full."""

_ELSEWHERE = "or choose another folder (out= for a run)"
_CURES = {
    errno.EROFS: f"The file system is mounted read-only: mount it for writing, {_ELSEWHERE}",
    errno.EACCES: f"Change the permissions of its folder, {_ELSEWHERE}",
    errno.EPERM: f"Change the permissions of its folder, {_ELSEWHERE}",
    errno.EFBIG: "It exceeds the file-size limit (see `ulimit -f`)",
    errno.EMFILE: "Raise the limit of open files, such as by `ulimit -n 4096`",
    errno.ENFILE: "Close other programs, or have the machine's limit of open files raised",
    errno.EIO: f"The disk or the network below it fails: check it, {_ELSEWHERE}",
    errno.ENOENT: "Its folder is gone: it must stay while the run is under way",
    errno.ESTALE: "Its folder is gone on the server: it must stay while the run is under way",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


@contextmanager
def atomic_path(target: Path) -> Generator[Path]:
    """A temporary path next to `target`; it replaces the target when the block succeeds.

    Raises:
        RunFailed: the file cannot be written. `target` is then unchanged.
    """
    beside = target.with_name(f".{target.name}.tmp")
    try:
        with writing(target):
            yield beside
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, target)
            _sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def append_line(target: Path, line: str) -> None:
    """Add one whole line, or nothing; what an interrupted process left of a line is dropped.

    Raises:
        RunFailed: the file cannot be written.
    """
    data = line.encode() + b"\n"
    with writing(target):
        handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = _end_of_lines(handle)
            try:
                os.ftruncate(handle, end)
                done = 0
                while done < len(data):
                    done += os.pwrite(handle, data[done:], end + done)
                os.fsync(handle)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of a process that was killed; no other may be writing there."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


@contextmanager
def writing(target: Path) -> Generator[None]:
    """A block that writes `target`: whatever the disk refuses is RunFailed, in one sentence."""
    try:
        yield
    except OSError as error:
        raise RunFailed(sentence(error, target)) from error


def sentence(error: OSError, target: Path | None = None) -> str:
    """What could not be written or read, why, and what helps. target: by default the error's."""
    file = target or error.filename or "a file"
    cure = _CURES.get(error.errno or 0)
    if error.errno in FULL:
        return f"no space left on the disk: {file} could not be written"
    done = "written" if target else "used"
    return f"{file} could not be {done}: {error.strerror or error}{f'. {cure}' if cure else ''}"


def _end_of_lines(handle: int) -> int:
    """Number of bytes up to the last newline."""
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 65536)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
