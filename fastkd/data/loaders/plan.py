"""Which samples make up each global batch, and which part of it belongs to a rank.

Shared by all loaders, so that the composition of a batch depends on (seed, epoch, step) only:
    order         = permutation from (seed, epoch), or 0, 1, 2, ... without shuffling
    global batch  = order[step * batch_size : (step + 1) * batch_size]
    rank's part   = the rank-th of world_size contiguous parts, sized as by numpy.array_split

With `repeats` R an epoch has as many images as ever, but only the first N / R samples of the
permutation, each R times in a row (repeated augmentation, Hoffer et al. 2019, arXiv:1901.09335).
The r-th time it has the id  sample + r * N , so that it draws anew; `samples_of` gives the sample.
timm has the same samples in an epoch, but hands its copies to different processes.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastkd.data.draws import epoch_order
from fastkd.errors import UserError

__all__ = ["BatchPlan"]


@dataclass(frozen=True)
class BatchPlan:
    """The steps of an epoch over one split.

    batch_size  global, over all ranks
    repeats     how often a sample is shown in an epoch, if it is; in training only
    train       False: evaluation, which takes every sample exactly once, in canonical order, with
                no batch dropped; a rank whose part of a batch is empty has nothing to do there
    shuffle, drop_last  in training only. Without drop_last the last, smaller batch is kept, unless
                it has fewer samples than there are ranks

    Raises:
        UserError: training would have no step, or a rank no sample; the message has both numbers.
    """

    name: str
    num_samples: int
    batch_size: int
    seed: int
    train: bool
    repeats: int = 1
    shuffle: bool = True
    drop_last: bool = True
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}, expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}, expected 0 <= rank < ranks")
        if not self.train:
            return
        if self.repeats > min(self.batch_size, self.num_samples):
            raise UserError(
                f"augment.repeats={self.repeats} would fill a batch of {self.batch_size} with one "
                f"of {self.name}'s {self.num_samples} images; repeat it less often"
            )
        if self.world_size > self.num_samples:
            raise UserError(
                f"{self.world_size} processes, but {self.name} has {self.num_samples} images; "
                "start at most one process per image"
            )
        if self.world_size > self.batch_size:
            raise UserError(
                f"batch_size={self.batch_size} is for all {self.world_size} processes together; "
                "set at least one image per process"
            )
        if self.steps_per_epoch == 0:
            raise UserError(
                f"batch_size={self.batch_size}, but {self.name} has {self.num_samples} images: "
                "not one full batch; set a smaller batch_size or data.drop_last=false"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        full, rest = divmod(self.num_samples, self.batch_size)
        if rest == 0:
            return full
        if self.train and (self.drop_last or rest < self.world_size):
            return full
        return full + 1

    @property
    def batch_rows(self) -> tuple[int, ...]:
        """Samples of a batch on the rank that has fewest, for the first and the last step."""
        sizes = [self.global_size(step) for step in (0, self.steps_per_epoch - 1)]
        return tuple(dict.fromkeys(size // self.world_size for size in sizes))

    @property
    def num_ids(self) -> int:
        """All ids are below it: the samples, times their repeats."""
        return self.num_samples * (self.repeats if self.train else 1)

    def samples_of(self, ids: Tensor) -> Tensor:
        """The samples of some ids, on the same device."""
        return ids if self.num_ids == self.num_samples else ids % self.num_samples

    def order(self, epoch: int) -> np.ndarray:
        """Ids in the order of this epoch, int64 [N]; sample ids, except for repeats."""
        places = np.arange(self.num_samples)
        if not self.train:
            return places
        places, again = np.divmod(places, self.repeats)
        if self.shuffle:
            places = epoch_order(self.seed, epoch, self.num_samples)[places]
        return places + again * self.num_samples

    def start(self, step: int) -> int:
        """Place in the epoch's order at which global batch `step` begins."""
        return step * self.batch_size

    def step_of(self, place: int) -> int:
        """The global batch of a place in the epoch's order."""
        return place // self.batch_size

    def global_size(self, step: int) -> int:
        """Samples in a whole global batch, all ranks together."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def part(self, step: int) -> slice:
        """Slice of `order` for this rank's part of global batch `step`; possibly empty."""
        start = self.start(step)
        each, larger = divmod(self.global_size(step), self.world_size)
        first = start + self.rank * each + min(self.rank, larger)
        return slice(first, first + each + (self.rank < larger))

    def parts(self, start_step: int) -> list[slice]:
        """The non-empty parts of steps start_step, start_step + 1, ... of an epoch."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"start_step is {start_step}, an epoch of {self.name} has {self.steps_per_epoch}"
            )
        parts = [self.part(step) for step in range(start_step, self.steps_per_epoch)]
        return [part for part in parts if part.start < part.stop]
