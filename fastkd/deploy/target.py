"""A file or folder that gets its name only when it is proven, or not at all.

Nothing that somebody else wrote is ever removed: a file takes the place of a file only, and of a
folder only the files are replaced that an export writes.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkd.errors import UserError
from fastkd.printable import few, shown
from fastkd.storage.atomic import writing

__all__ = ["check_target", "proven"]


def check_target(target: Path, *, force: bool, files: Collection[str] = ()) -> None:
    """UserError if the name is taken, or cannot be given.

    files: what a folder holds that is written; (): a file is written. force: a file is replaced,
    or in a folder those that an earlier export wrote.
    """
    place = Path(os.path.abspath(target))
    if not place.name:
        raise UserError(f"--out {shown(target)} is all there is: name a new file or folder")
    if not place.parent.is_dir():
        raise UserError(f"--out {shown(target)}: there is no folder {shown(target.parent)}")
    if not os.path.lexists(place):
        return
    if place.is_dir() and not files:
        raise UserError(
            f"--out {shown(target)} is a folder, and a file is written: name a file, such as "
            f"{shown(target / 'student.onnx')}"
        )
    if not place.is_dir() and not place.is_file() and not place.is_symlink():
        raise UserError(f"--out {shown(target)} is no ordinary file: name another")
    if files and not place.is_dir():
        raise UserError(f"--out {shown(target)} is a file, and a folder is written: name another")
    inside = sorted(place.iterdir()) if files else []
    others = [one.name for one in inside if one.name not in files or one.is_dir()]
    if others:
        raise UserError(
            f"--out {shown(target)} holds {few(others)}, which no export wrote: name a new folder"
        )
    if not force:
        raise UserError(f"{shown(target)} exists: --force replaces it, or choose another --out")


@contextmanager
def proven(target: Path) -> Iterator[Path]:
    """A path with the name of `target`, to write a file or a folder under.

    It takes the place of `target`, as `check_target` allows it, when the block ends, and is removed
    if the block fails.
    """
    target = Path(os.path.abspath(target))
    with writing(target):
        own = Path(tempfile.mkdtemp(prefix=f".{target.stem}.", suffix=".tmp", dir=target.parent))
    try:
        with writing(target):
            made = own / target.name
            yield made
            if made.is_dir() and target.is_dir():
                for one in sorted(made.iterdir()):
                    os.replace(one, target / one.name)
            else:
                os.replace(made, target)
    finally:
        shutil.rmtree(own, ignore_errors=True)  # made here, under a name that was free
