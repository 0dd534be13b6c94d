"""What the resident and the torch loader share: plan, labels, images of other ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fastkd.compute.placement import Placement
from fastkd.config.section import Normalization
from fastkd.data.batch import Batch, SecondViews
from fastkd.data.geometry import NO_GEOMETRY, Geometry, Normalizer
from fastkd.data.loaders.plan import BatchPlan
from fastkd.data.partners import Partners
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.image_set import ImageSource
from fastkd.data.tables import to_device

__all__ = ["Loading", "PlannedLoader"]


@dataclass(frozen=True)
class Loading:
    """How a split is served: in which batches, with which augmentation, on which device."""

    batch_size: int
    """Global, over all ranks."""
    seed: int
    """Together with the epoch's number it decides order, corners and flips."""
    train: bool
    """False: every sample once, unshuffled, unaugmented, nothing dropped; the ranks' counts differ,
    and a rank may yield one batch less than another."""
    normalization: Normalization
    placement: Placement
    """Ranks, device, and the type and memory layout of the output images."""
    geometry: Geometry = NO_GEOMETRY
    """Shift and flip in training."""
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


class PlannedLoader(ABC):
    """The part of the protocol `fastkd.data.batch.Loader` that follows from a BatchPlan."""

    def __init__(
        self, source: ImageSource, loading: Loading, views: SecondViews | None = None
    ) -> None:
        self._loading = loading
        self.plan = loading.plan(source)
        self._device = loading.placement.device
        self._normalize = loading.normalizer
        self._labels_N = torch.from_numpy(source.labels_N)
        self._device_labels_N = to_device(source.labels_N, self._device)
        self._second = views if isinstance(views, PictureView) else None
        self._partners = views if isinstance(views, Partners) else None

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
        """int64 labels by sample id, on the CPU."""
        return self._labels_N

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of global batches start_step, start_step + 1, ... of an epoch.

        Raises:
            ValueError: start_step is outside the epoch (its end is allowed and yields nothing).
        """
        parts = self.plan.parts(start_step)
        return self._completed(epoch, parts)

    @abstractmethod
    def with_views(self, views: SecondViews) -> Self:
        """A loader of the same batches that also yields what x' is made from; self is unchanged."""

    @abstractmethod
    def fetch(self, index_N: Tensor, epoch: int) -> Tensor:
        """Images [N, C, H, W] of any sample ids, the same bytes as in this epoch's batches."""

    @abstractmethod
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        """A batch for each part of the epoch's order, with its second views of pictures."""

    def _completed(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        for part, batch in zip(parts, self._batches(epoch, parts), strict=True):
            step = part.start // self.plan.batch_size
            batch = batch._replace(global_size=self.plan.global_size(step))
            if self._partners is not None:
                batch = batch._replace(second_NCHW=self._shown(self._partners, epoch, step))
            yield batch

    def _shown(self, partners: Partners, epoch: int, step: int) -> Tensor:
        """The images that this rank's part of the global batch is mixed with."""
        index_N, mine = self.plan.global_index(epoch, step), self.plan.rank_part(step)
        shown = [
            self.fetch(torch.from_numpy(index_N[partner_N][mine]), epoch)
            for partner_N in partners.draw(epoch, step, len(index_N))
        ]
        return shown[0] if len(shown) == 1 else torch.cat(shown)
