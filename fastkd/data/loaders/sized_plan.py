"""Batches of an evaluation whose images differ in size: consecutive ones of one size share one.

An image is never padded to the size of another one, so what a network answers for it, and every
count of its pixels, is the same for every batch size and number of ranks.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from typing_extensions import override

from fastkd.data.loaders.plan import BatchPlan

__all__ = ["SizedPlan", "starts_of"]


@dataclass(frozen=True)
class SizedPlan(BatchPlan):
    """An evaluation's plan; `starts` is the first place of each global batch, and the end."""

    starts: tuple[int, ...] = ()

    @property
    @override
    def steps_per_epoch(self) -> int:
        return len(self.starts) - 1

    @override
    def start(self, step: int) -> int:
        return self.starts[step]

    @override
    def step_of(self, place: int) -> int:
        return bisect_right(self.starts, place) - 1

    @override
    def global_size(self, step: int) -> int:
        return self.starts[step + 1] - self.starts[step]


def starts_of(sizes_N2: np.ndarray, batch_size: int) -> tuple[int, ...]:
    """`SizedPlan.starts` of images of these sizes, in their order."""
    changes = np.flatnonzero((sizes_N2[1:] != sizes_N2[:-1]).any(1)) + 1
    runs = [0, *changes.tolist(), len(sizes_N2)]
    firsts = (range(a, b, batch_size) for a, b in pairwise(runs))
    return (*(first for each in firsts for first in each), len(sizes_N2))
