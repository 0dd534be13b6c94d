"""What all loaders of fastkd share: plan, labels, known bad files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastkd.compute.placement import Placement
from fastkd.config.section import Normalization
from fastkd.data.batch import IGNORED, NO_LABEL, Batch
from fastkd.data.finish import PLAIN, Finish, Look
from fastkd.data.geometry import NO_GEOMETRY, Geometry, Normalizer
from fastkd.data.loaders.decoding import StandIns
from fastkd.data.loaders.plan import BatchPlan
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.image_set import ImageSource
from fastkd.data.tables import to_device
from fastkd.storage.facts import Interpolation

__all__ = ["Loading", "PlannedLoader"]


@dataclass(frozen=True)
class Loading:
    """How a split is served: in which batches, with which augmentation, on which device."""

    batch_size: int
    """Global, over all ranks."""
    seed: int
    """Together with the epoch's number it decides all draws."""
    train: bool
    """False: every sample once, unshuffled, unaugmented, nothing dropped; the ranks' counts differ,
    and a rank may yield one batch less than another."""
    normalization: Normalization
    placement: Placement
    """Ranks, device, and the type and memory layout of the output images."""
    geometry: Geometry = NO_GEOMETRY
    """Shift and flip in training."""
    interpolation: Interpolation = "bilinear"
    """How random areas of pictures are brought to size in training."""
    look: Look = PLAIN
    """Policy and erasing in training."""
    repeats: int = 1
    """How often a training image is shown in an epoch, each time changed in another way."""
    shuffle: bool = True
    """In training only."""
    drop_last: bool = True
    """In training only: leave out the smaller batch at the end of an epoch."""

    def plan(self, source: ImageSource) -> BatchPlan:
        """This rank's steps over the samples of `source`."""
        world = self.placement.world
        return BatchPlan(
            source.name,
            len(source.labels_N),
            self.batch_size,
            self.seed,
            self.train,
            repeats=self.repeats,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            rank=world.rank,
            world_size=world.size,
        )

    @property
    def applied(self) -> Geometry:
        """The geometry in training, none in evaluation."""
        return self.geometry if self.train else NO_GEOMETRY

    @property
    def normalizer(self) -> Normalizer:
        """uint8 pixels -> images as the networks get them."""
        mean, std = self.normalization
        return Normalizer(mean, std, self.placement.dtype, self.placement.channels_last)

    def finish(self, num_ids: int) -> Finish:
        """What happens to the crops of ids below num_ids."""
        look = self.look if self.train else PLAIN
        return Finish(look, self.normalizer, self.seed, num_ids)


class PlannedLoader(ABC):
    """The part of the protocol `fastkd.data.batch.Loader` that follows from a BatchPlan."""

    def __init__(
        self,
        source: ImageSource,
        loading: Loading,
        views: PictureView | None = None,
        plan: BatchPlan | None = None,
    ) -> None:
        self._loading = loading
        self.plan = plan or loading.plan(source)
        self._device = loading.placement.device
        self._finish = loading.finish(self.plan.num_ids)
        self._labels_N = torch.from_numpy(source.labels_N)
        self._device_labels_N = to_device(source.labels_N, self._device)
        self._second = views
        self._stand_ins = StandIns(self.plan.num_samples)

    @property
    def num_samples(self) -> int:
        """Samples in the split, over all ranks."""
        return self.plan.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.plan.steps_per_epoch

    @property
    def batch_rows(self) -> tuple[int, ...]:
        """Of the plan."""
        return self.plan.batch_rows

    @property
    def labels_N(self) -> Tensor:
        """Labels by sample id, on the CPU, in the form of `Batch.labels_N`."""
        return self._labels_N

    def part(self, step: int) -> slice:
        """This rank's places of a step in the order of every epoch; possibly none."""
        return self.plan.part(step)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of global batches start_step, start_step + 1, ... of an epoch.

        Raises:
            ValueError: start_step is outside the epoch (its end is allowed and yields nothing).
        """
        parts = self.plan.parts(start_step)
        return self._completed(epoch, parts)

    @property
    def is_planned(self) -> bool:
        """Every batch is this rank's part of one."""
        return True

    @abstractmethod
    def with_views(self, views: PictureView) -> Self:
        """A loader of the same batches that also yields second views; self is unchanged."""

    def _shown_ids(self, ids_N: np.ndarray) -> np.ndarray:
        """The ids that are shown for these, as far as bad files are known."""
        return self._stand_ins.of(ids_N) if self._loading.train else ids_N

    def _learn(self, unread: Mapping[int, str]) -> None:
        """Note images that cannot be read. In evaluation they have no label from now on."""
        new = [sample for sample in unread if sample not in self._stand_ins.reasons]
        self._stand_ins.reasons.update(unread)
        if new and not self._loading.train:
            labels_N = self._device_labels_N
            none = IGNORED if labels_N.is_floating_point() else NO_LABEL
            ids = torch.tensor(new, device=labels_N.device)
            self._device_labels_N = labels_N.index_fill(0, ids, none)

    @abstractmethod
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        """A batch for each part of the epoch's order, with its second views of pictures."""

    def _completed(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        for part, batch in zip(parts, self._batches(epoch, parts), strict=True):
            step = self.plan.step_of(part.start)
            yield batch._replace(global_size=self.plan.global_size(step))
