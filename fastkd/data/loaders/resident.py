"""Small data sets resident on the device as uint8, augmented there in whole batches.

An epoch costs the host a few tables (order, corners, flips), sent to the device once; a batch is
then gathered, cropped, flipped and normalised where it lies, without a host synchronisation.
Memory on the device: N * (H + 2 * padding) * (W + 2 * padding) * 3 bytes; an unpadded set on the
CPU stays in the memory-mapped cache file, whose pages all ranks of a host share.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastkd.config.section import Channels
from fastkd.data.batch import Batch
from fastkd.data.geometry import Geometry, Normalizer, gather_crops, pad_images
from fastkd.data.loaders.plan import BatchPlan
from fastkd.data.loaders.planned import PlannedLoader
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.image_set import ImageSet
from fastkd.data.tables import GeometryTables, to_device
from fastkd.errors import UserError

__all__ = ["ResidentLoader"]


class ResidentLoader(PlannedLoader):
    """Batches of a decoded split, see `fastkd.data.batch.Loader` for the protocol.

    batch_size     global, over all ranks
    seed           with the epoch's number it decides order, corners and flips
    train          False: every sample once, unshuffled, unaugmented, nothing dropped; the ranks'
                   counts differ, and a rank may yield one batch less than another
    geometry       shift and flip in training; None for none
    mean, std      per channel, in units of 0..1
    device, dtype  of the images that come out; channels_last is their memory layout
    shuffle, drop_last   in training only

    Raises:
        UserError: an empty epoch, more ranks than samples, or padding that the images are too
            small for.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        geometry: Geometry | None = None,
        mean: Channels,
        std: Channels,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        shuffle: bool = True,
    ) -> None:
        device = torch.device(device)
        plan = BatchPlan(
            images.name,
            len(images),
            batch_size,
            seed,
            train,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(plan, images.labels_N, device)
        geometry = geometry if train and geometry is not None else Geometry()
        self._tables = GeometryTables(geometry, seed, len(images), device)
        self._crop_size = images.images_NHWC.shape[1:3]
        resident = torch.from_numpy(images.images_NHWC).to(device)
        try:
            self._padded_NPPC = pad_images(resident, geometry)
        except ValueError as error:
            raise UserError(f"{images.name}: {error}") from error
        self._normalize = Normalizer(mean, std, dtype, channels_last)
        # A policy works on the host, on which the pictures are anyway.
        self._host_images_NHWC = torch.from_numpy(images.images_NHWC)
        self._host_tables = GeometryTables(geometry, seed, len(images), torch.device("cpu"))

    def fetch(self, index_N: Tensor, epoch: int) -> Tensor:
        """Images [N, C, H, W] of any sample ids, the same bytes as in this epoch's batches."""
        return self._normalize(self._crops(index_N.to(self._device, non_blocking=True), epoch))

    def _crops(self, index_N: Tensor, epoch: int, appearance: int = 0) -> Tensor:
        """uint8 [N, H, W, 3] on the device."""
        drawn = self._tables.of(epoch, index_N, appearance)
        return gather_crops(self._padded_NPPC, index_N, *drawn, self._crop_size)

    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        order = self._plan.order(epoch)
        order_N = to_device(order, self._device)
        for part in parts:
            index_N = order_N[part]
            images_NCHW = self.fetch(index_N, epoch)
            if self._second:
                more_NHWC = self._second_views(self._second, order[part], index_N, epoch)
                images_NCHW = torch.cat([images_NCHW, self._normalize(more_NHWC)])
            labels_N = self._device_labels_N.index_select(0, index_N)
            yield Batch(images_NCHW, labels_N, index_N)

    def _second_views(
        self, second: PictureView, ids_N: np.ndarray, index_N: Tensor, epoch: int
    ) -> Tensor:
        """uint8 on the device; the sample ids come from the host too, where a policy draws."""
        if second.is_crop:
            return torch.cat([self._crops(index_N, epoch, k) for k in second.appearances])
        host_N = torch.from_numpy(ids_N)
        pictures_NHWC = self._host_images_NHWC.index_select(0, host_N)
        crops_NHWC = self._host_tables.crop(pictures_NHWC, host_N, epoch)
        return to_device(second.of(crops_NHWC, ids_N, epoch).numpy(), self._device)
