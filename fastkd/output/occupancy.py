"""One process at a time in a run folder; what is left of a stage that ends before its time."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastkd.compute.ranks import World, on_main
from fastkd.errors import Interrupted, UserError
from fastkd.output.run_folder import LOCK, RunFolder
from fastkd.storage.atomic import remove_leftovers, writing

__all__ = ["occupied", "tidy"]


@contextmanager
def occupied(
    path: Path,
    world: World,
    waiting: Callable[[], None] | None = None,
    *,
    ask_again_s: float = 2.0,
) -> Iterator[None]:
    """Keep other processes, also of other hosts, out of a run folder, until this one ends or dies.

    waiting: called once if another process has the folder, before waiting for it; None: do not wait
    but raise UserError. ask_again_s: seconds between two tries.
    """
    held: list[int] = []

    def take() -> bool:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            folder = _hold(path, os.O_RDONLY)
            # Of a lock on a folder a network file system does not tell other hosts.
            file = None if folder is None else _hold(path / LOCK, os.O_RDWR | os.O_CREAT)
        if folder is None or file is None:
            if folder is not None:
                os.close(folder)
            return False
        held.extend((folder, file))
        remove_leftovers(path)
        return True

    asked = 0
    while not on_main(world, take):
        asked += 1
        if waiting is None:
            raise UserError(f"another process is using {path}; wait for it, or stop it first")
        if asked == 1:
            waiting()
        # Ask all ranks every time, or the others would time out in a collective.
        time.sleep(ask_again_s)
    try:
        yield
    finally:
        if held:
            with suppress(OSError):
                (path / LOCK).unlink()
        for handle in held:
            os.close(handle)


def _hold(path: Path, flags: int) -> int | None:
    """A locked descriptor; None if another process has the lock."""
    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass  # a file system without locks: the user must not start two runs in one folder
    # Its last holder may have removed it before releasing it.
    if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
        return handle
    os.close(handle)
    return None


@contextmanager
def tidy(folder: RunFolder, root: Path, world: World) -> Iterator[None]:
    """End the trackers if the block fails, and remove the folder if it left nothing to resume."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        folder.end_tracking("stopped")
        raise
    except BaseException:
        folder.end_tracking("failed")
        if world.is_main:
            # What ended the run is to be told, not that its folder cannot be removed.
            with suppress(OSError):
                folder.discard(root)
        raise
