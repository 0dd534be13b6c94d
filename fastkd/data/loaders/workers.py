"""What ends the workers of a DataLoader, as one sentence: memory, open files, processes.

Both loaders iterate through here. torch passes a worker's end on as a traceback, often without its
cause.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

from fastkd.errors import UserError

__all__ = ["from_workers"]

T = TypeVar("T")

_SHARED_MEMORY = (
    "the shared memory that workers pass images through is too small ({shm}): start the container "
    "with --shm-size=8g or --ipc=host, or set {key}=0"
)
# What torch says of it -> what it means; the first that fits.
_MEANINGS = (
    (r"bus error|shared memory|\(shm\)|</torch_|unable to (mmap|resize|write)", _SHARED_MEMORY),
    (
        r"too many open files|ancdata",
        "too many files are open: raise the limit, `ulimit -n 65536`, or set {key}=0",
    ),
    (
        r"cannot allocate memory|resource temporarily unavailable|can't start new thread",
        "this machine has no room for another process: lower {key}, or set {key}=0",
    ),
    (
        r"killed by signal: killed|exited unexpectedly",
        "the system has killed it, as it does when memory runs out. Lower {key} or the batch size, "
        "or set {key}=0; in a container ({shm}) --shm-size=8g or --ipc=host may help",
    ),
)


def from_workers(items: Iterable[T], key: str) -> Iterator[T]:
    """The items of a DataLoader. key: what sets the number of its workers.

    Raises:
        UserError: the workers do not get what they need from this machine.
    """
    try:
        yield from items
    except (RuntimeError, OSError) as error:
        if meaning := _meaning(error):
            said = meaning.format(key=key, shm=_size_of_shared_memory())
            raise UserError(f"a worker of the data loader ended: {said}", shared=False) from error
        raise


def _meaning(error: Exception) -> str | None:
    text = str(error)
    if text.startswith("Caught "):
        # The traceback of a worker, which ends with its error.
        text = text.strip().splitlines()[-1]
    elif "DataLoader" in text:
        # Its handler of signals knows more.
        text = f"{error.__cause__ or error.__context__} {text}"
    return next((means for says, means in _MEANINGS if re.search(says, text, re.IGNORECASE)), None)


def _size_of_shared_memory() -> str:
    try:
        place = os.statvfs("/dev/shm")
    except OSError:
        return "there is no /dev/shm"
    return f"/dev/shm has {place.f_frsize * place.f_blocks / 2**20:,.2f} MiB"
