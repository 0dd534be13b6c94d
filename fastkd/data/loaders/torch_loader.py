"""Large folders: images decoded by torch DataLoader workers, batch by batch, every epoch.

A worker returns the uint8 pixels of a batch; policies, normalisation, and the padded crop if the
recipe has one, run on the device as in `resident`. A sample's appearance is a function of (seed,
epoch, sample id), so it does not depend on the number of workers or ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from typing_extensions import override

from fastkd.data.loaders.decoding import Pixels, Reader
from fastkd.data.loaders.processes import Key, Processes
from fastkd.data.loaders.streaming import StreamingLoader

__all__ = ["TorchLoader"]


@dataclass(frozen=True)
class _Read:
    """Whole batches by (epoch, sample ids)."""

    reader: Reader
    appearances: Sequence[int]

    def __call__(self, key: Key) -> Pixels:
        epoch, index_B = key
        return self.reader.read(index_B.tolist(), epoch, self.appearances)


class TorchLoader(StreamingLoader):
    """A split decoded by Pillow in worker processes.

    workers: processes that decode, from the first batch on; 0: in this process.
    """

    @override
    def _start(self) -> None:
        read = _Read(self._reader, self._appearances)
        self._processes = Processes(read, self._workers, self._device)

    @override
    def _stream(self, keys: Sequence[Key]) -> Iterator[Pixels]:
        return self._processes.stream(keys)
