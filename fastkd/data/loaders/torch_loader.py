"""Large folders: images decoded by torch DataLoader workers, batch by batch, every epoch.

A worker gets (epoch, sample ids) and returns the uint8 pixels; policies, normalisation, and the
padded crop if the recipe has one, run on the device as in `resident`. A sample's appearance is a
function of (seed, epoch, sample id), so it does not depend on the number of workers or ranks, and
starting in mid-epoch decodes nothing earlier.
"""

import atexit
import signal
import weakref
from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from fastkd.data.loaders.decoding import Pixels, Reader
from fastkd.data.loaders.streaming import Key, StreamingLoader
from fastkd.data.loaders.workers import from_workers
from fastkd.errors import FastKDError, UserError

__all__ = ["TorchLoader"]


class _Pictures(Dataset[Pixels | str]):
    """Whole batches by (epoch, sample ids)."""

    def __init__(self, reader: Reader, appearances: Sequence[int]) -> None:
        self._reader = reader
        self._appearances = appearances

    def __getitem__(self, key: Key) -> Pixels | str:
        epoch, index_B = key
        try:
            return self._reader.read(index_B.tolist(), epoch, self._appearances)
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


def _dismiss(loader: weakref.ref[DataLoader[Pixels | str]]) -> None:
    # If multiprocessing terminates the workers at exit, torch ends in a traceback; it prevents that
    # itself only when it pins memory.
    iterator = getattr(loader(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


class TorchLoader(StreamingLoader):
    """A split decoded by Pillow in worker processes.

    workers: processes that decode, from the first batch on; 0: in this process.
    """

    @override
    def _start(self) -> None:
        self._keys = _Keys()
        self._loader: DataLoader[Pixels | str] = DataLoader(
            _Pictures(self._reader, self._appearances),
            batch_size=None,
            sampler=self._keys,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        if self._workers:
            atexit.register(_dismiss, weakref.ref(self._loader))

    @override
    def _stream(self, keys: Sequence[Key]) -> Iterator[Pixels]:
        self._keys.keys = list(keys)
        for pixels in from_workers(self._loader, "data.workers"):
            if isinstance(pixels, str):
                raise UserError(pixels, shared=False)
            yield pixels
