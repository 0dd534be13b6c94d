"""Small data sets resident on the device as uint8, augmented there in whole batches.

Per epoch the host makes a few tables (order, corners, flips) and sends them to the device once. A
batch is then gathered, cropped, flipped and normalised in place, without a host synchronisation.
Memory on the device: N * (H + 2 * padding) * (W + 2 * padding) * 3 bytes; an unpadded set on the
CPU stays in the memory-mapped cache file, whose pages all ranks of a host share.
"""

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fastkd.data.batch import Batch, SecondViews
from fastkd.data.geometry import gather_crops, pad_images
from fastkd.data.loaders.planned import Loading, PlannedLoader
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.image_set import ImageSet
from fastkd.data.tables import GeometryTables, to_device
from fastkd.errors import UserError

__all__ = ["ResidentLoader"]


class ResidentLoader(PlannedLoader):
    """Batches of a decoded split, see `fastkd.data.batch.Loader` for the protocol.

    padded_NPPC: the images on the device, shared with another loader of the same set; None moves
    them there.

    Raises:
        UserError: an empty epoch, more ranks than samples, or padding that the images are too
            small for.
    """

    def __init__(
        self,
        images: ImageSet,
        loading: Loading,
        *,
        views: SecondViews | None = None,
        padded_NPPC: Tensor | None = None,
    ) -> None:
        super().__init__(images, loading, views)
        self._images = images
        self._learn(images.unread)
        self._crop_size = images.images_NHWC.shape[1:3]
        # A policy runs on the host, where the pictures already are.
        self._host_images_NHWC = torch.from_numpy(images.images_NHWC)
        geometry, num = loading.applied, len(images)
        self._tables = GeometryTables(geometry, loading.seed, num, self._device)
        self._host_tables = GeometryTables(geometry, loading.seed, num, torch.device("cpu"))
        if padded_NPPC is None:
            try:
                padded_NPPC = pad_images(self._host_images_NHWC.to(self._device), geometry)
            except ValueError as error:
                raise UserError(f"{images.name}: {error}") from error
        self._padded_NPPC = padded_NPPC

    @override
    def with_views(self, views: SecondViews) -> Self:
        return type(self)(self._images, self._loading, views=views, padded_NPPC=self._padded_NPPC)

    @override
    def fetch(self, index_N: Tensor, epoch: int) -> Tensor:
        ids = torch.from_numpy(self._shown_ids(index_N.cpu().numpy()))
        return self._normalize(self._crops(ids.to(self._device, non_blocking=True), epoch))

    def _crops(self, index_N: Tensor, epoch: int, appearance: int = 0) -> Tensor:
        """uint8 [N, H, W, 3] on the device."""
        drawn = self._tables.of(epoch, index_N, appearance)
        return gather_crops(self._padded_NPPC, index_N, *drawn, self._crop_size)

    @override
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        planned = self.plan.order(epoch)
        order = self._shown_ids(planned)
        order_N = to_device(order, self._device)
        for part in parts:
            index_N = order_N[part]
            images_NCHW = self._normalize(self._crops(index_N, epoch))
            second_NCHW = None
            if self._second:
                more_NHWC = self._second_views(self._second, order[part], index_N, epoch)
                second_NCHW = self._normalize(more_NHWC)
            labels_N = self._device_labels_N.index_select(0, index_N)
            unread = self._stand_ins.said_of(planned[part])
            yield Batch(images_NCHW, labels_N, index_N, second_NCHW=second_NCHW, unread=unread)

    def _second_views(
        self, second: PictureView, ids_N: np.ndarray, index_N: Tensor, epoch: int
    ) -> Tensor:
        """uint8 on the device; a policy draws on the host and needs the sample ids there."""
        if second.is_crop:
            return torch.cat([self._crops(index_N, epoch, k) for k in second.appearances])
        host_N = torch.from_numpy(ids_N)
        pictures_NHWC = self._host_images_NHWC.index_select(0, host_N)
        crops_NHWC = self._host_tables.crop(pictures_NHWC, host_N, epoch)
        seed, num = self.plan.seed, self.plan.num_samples
        more_NHWC = second.of(crops_NHWC, ids_N, epoch, seed=seed, num_samples=num)
        return to_device(more_NHWC.numpy(), self._device)
