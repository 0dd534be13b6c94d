"""What the resident and the torch loader have in common: the plan and the labels."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastkd.data.batch import Batch
from fastkd.data.loaders.plan import BatchPlan
from fastkd.data.picture_views import PictureView
from fastkd.data.tables import to_device

__all__ = ["PlannedLoader"]


class PlannedLoader(ABC):
    """The part of the protocol `fastkd.data.batch.Loader` that follows from a BatchPlan."""

    def __init__(self, plan: BatchPlan, labels_N: np.ndarray, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._labels_N = torch.from_numpy(labels_N)
        self._device_labels_N = to_device(labels_N, device)
        self._second: PictureView | None = None

    @property
    def num_samples(self) -> int:
        """Samples in the split, over all ranks."""
        return self._plan.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self._plan.steps_per_epoch

    @property
    def labels_N(self) -> Tensor:
        """int64 labels by sample id, on the CPU."""
        return self._labels_N

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of global batches start_step, start_step + 1, ... of an epoch.

        Raises:
            ValueError: start_step lies outside the epoch (its end is allowed and yields nothing).
        """
        parts = self._plan.parts(start_step)
        return self._batches(epoch, parts)

    def global_index(self, epoch: int, step: int) -> np.ndarray:
        """Sample ids of the whole global batch, int64, on the CPU."""
        return self._plan.global_index(epoch, step)

    def global_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        return min(self._plan.batch_size, self._plan.num_samples - step * self._plan.batch_size)

    def rank_part(self, step: int) -> slice:
        """Where this rank's part lies within the global batch of a step."""
        part, start = self._plan.part(step), step * self._plan.batch_size
        return slice(part.start - start, part.stop - start)

    def showing(self, kind: str, times: int = 1) -> Self:
        """The same loader, whose batches also have `times` second views of every picture.

        kind: one of `fastkd.data.picture_views.PICTURE_VIEWS`. They stand below the images of
        the batch: all first ones, all second ones, and so on.
        """
        shown = copy.copy(self)
        shown._second = PictureView(kind, times, self._plan.seed, self._plan.num_samples)
        return shown

    @abstractmethod
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        """A batch for each part of the epoch's order."""

    @abstractmethod
    def fetch(self, index_N: Tensor, epoch: int) -> Tensor:
        """Images [N, C, H, W] of any sample ids, the same bytes as in this epoch's batches."""
