"""One process at a time in a run folder, and no folder left by a stage that failed early."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastkd.compute.ranks import World, on_main
from fastkd.errors import Interrupted, UserError
from fastkd.output.run_folder import RunFolder
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
    """Keep other processes out of a run folder; the system releases it when this one dies.

    waiting: called once if another process has the folder, before waiting for it; None: do not wait
    but raise UserError. ask_again_s: seconds between two tries.
    """
    held: list[int] = []

    def take() -> bool:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:
            pass  # a file system without locks: the user must not start two runs in one folder
        held.append(handle)
        # Its last holder may have removed it before releasing it.
        mine = path.exists() and path.stat().st_ino == os.fstat(handle).st_ino
        if mine:
            remove_leftovers(path)
        return mine

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
        for handle in held:
            os.close(handle)


@contextmanager
def tidy(folder: RunFolder, root: Path, world: World) -> Iterator[None]:
    """Remove the folder if the block fails and left nothing to resume."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException:
        if world.is_main:
            # What ended the run is to be told, not that its folder cannot be removed.
            with suppress(OSError):
                folder.discard(root)
        raise
