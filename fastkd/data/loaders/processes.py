"""Batches read by torch's worker processes: a key goes in, what `read` makes of it comes out.

A worker gets (epoch, sample ids). What it reads is a function of that alone, so it does not depend
on their number, and starting in mid-epoch reads nothing earlier.
"""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastkd.data.loaders.workers import from_workers
from fastkd.errors import FastKDError, UserError

__all__ = ["Key", "Processes"]

Key = tuple[int, np.ndarray]
"""Epoch and sample ids of a batch."""

T = TypeVar("T")


class _Batches(Dataset[T | str]):
    """Whole batches by (epoch, sample ids)."""

    def __init__(self, read: Callable[[Key], T]) -> None:
        self._read = read

    def __getitem__(self, key: Key) -> T | str:
        try:
            return self._read(key)
        except FastKDError as error:
            # Returned, not raised: the DataLoader would wrap the message in a worker's traceback.
            return str(error)


class _Keys(Sampler[Key]):
    """The keys of the epoch that is about to start; iterated in the main process."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)


def _start_worker(_worker: int) -> None:
    # Ctrl-C and a closed terminal reach the whole process group, and a forked worker inherits the
    # trainer's handlers: the trainer alone decides how to end, and torch must be able to terminate
    # its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _dismiss(loader: weakref.ref[DataLoader[Any]]) -> None:
    # If multiprocessing terminates the workers at exit, torch ends in a traceback; it prevents that
    # itself only when it pins memory.
    iterator = getattr(loader(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


class Processes(Generic[T]):
    """`num` processes, from the first batch on; 0: this one."""

    def __init__(self, read: Callable[[Key], T], num: int, device: torch.device) -> None:
        self._keys = _Keys()
        self._loader: DataLoader[T | str] = DataLoader(
            _Batches(read),
            batch_size=None,
            sampler=self._keys,
            num_workers=num,
            persistent_workers=num > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        if num:
            atexit.register(_dismiss, weakref.ref(self._loader))

    def stream(self, keys: Sequence[Key]) -> Iterator[T]:
        """What is read for each key, in order; one stream at a time. UserError of `read`."""
        self._keys.keys = list(keys)
        for found in from_workers(self._loader, "data.workers"):
            if isinstance(found, str):
                raise UserError(found, shared=False)
            yield found
