"""A file or folder that gets its name only when it is proven, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastkd.errors import UserError
from fastkd.storage.atomic import writing

__all__ = ["check_target", "proven"]


def check_target(target: Path, *, force: bool) -> None:
    """UserError if the name is taken, or its folder does not exist."""
    if not target.parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}")
    if target.exists() and not force:
        raise UserError(f"{target} exists: --force replaces it, or choose another --out")


@contextmanager
def proven(target: Path) -> Iterator[Path]:
    """A name beside `target` with its suffix, to write a file or a folder under.

    It takes the place of `target` when the block ends, and is removed if the block fails.
    """
    beside = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        with writing(target):
            yield beside
            if target.is_dir():
                shutil.rmtree(target)
            elif target.exists() and beside.is_dir():
                target.unlink()
            os.replace(beside, target)
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
