"""The batch that every loader yields, and what the trainer relies on in a loader.

First station of the flow: sources -> loader -> Batch -> augment -> teacher / student.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

__all__ = ["IGNORED", "NO_LABEL", "Batch", "Loader", "TrainLoader"]

IGNORED = -1.0
"""In labels [N, C]: not known, counts in no loss and no metric."""
NO_LABEL = -100
"""In class ids [N], as in torch: unknown; counts in no accuracy, not in KD on x, not in CE."""


class Batch(NamedTuple):
    """One rank's part of one global batch, on the training device.

    images_NCHW  floating, normalised, channels-last in memory unless the loader was told otherwise.
                 A loader that also shows x' (`PlannedLoader.showing`) has it below, N rows a time
    labels_N     int64 class ids; of images with several labels float32 [N, C]: 1 where a class is
                 there, 0 where not, IGNORED where that is not known
    index_N      int64 stable sample ids: the position in the source's canonical order, the same in
                 every epoch and on every rank (memory banks and teacher caches are keyed by it)
    """

    images_NCHW: Tensor
    labels_N: Tensor
    index_N: Tensor


class TrainLoader(Protocol):
    """What the training loop asks of any loader, also one that a user brings."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; in evaluation a rank may yield one batch less."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... of an epoch; earlier ones are never touched."""
        ...

    def global_size(self, step: int) -> int:
        """Samples in the global batch of a step, all ranks together."""
        ...


@runtime_checkable
class Loader(TrainLoader, Protocol):
    """A loader of fastkd's own data backends, which can show any sample again.

    The global batch `s` of an epoch is a function of (seed, epoch, s) only. Rank r of R yields the
    r-th of R contiguous parts of it, their sizes differing by at most one.
    """

    @property
    def num_samples(self) -> int:
        """Samples in the split, over all ranks."""
        ...

    @property
    def labels_N(self) -> Tensor:
        """The int64 label of every sample id, on the CPU."""
        ...

    def global_index(self, epoch: int, step: int) -> np.ndarray:
        """Sample ids of a global batch, all ranks together, int64, on the CPU."""
        ...

    def rank_part(self, step: int) -> slice:
        """Where this rank's part lies within the global batch of a step."""
        ...

    def fetch(self, index_N: Tensor, epoch: int) -> Tensor:
        """Images [N, C, H, W] of any sample ids, exactly as this epoch shows them."""
        ...
