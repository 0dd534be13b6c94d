"""Files that exist completely or not at all: write a temporary file, flush it, rename it.

Checkpoints, weights, run folders and plots are written through here.
"""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fastkd.errors import RunFailed

__all__ = ["atomic_path", "explain_full_disk"]


@contextmanager
def atomic_path(target: Path) -> Generator[Path]:
    """A temporary path next to `target`; it replaces the target when the block succeeds.

    Raises:
        RunFailed: the disk is full. `target` is then unchanged.
    """
    beside = target.with_name(f".{target.name}.tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
        _sync_folder(target.parent)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            explain_full_disk(error, target)
        raise


def explain_full_disk(error: OSError, target: Path) -> None:
    """Raise RunFailed if the error means a full disk; return otherwise."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise RunFailed(f"no space left on the disk: {target} could not be written") from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
