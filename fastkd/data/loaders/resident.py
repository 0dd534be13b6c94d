"""Small data sets resident on the device as uint8, augmented there in whole batches.

Per epoch the host makes a few tables (order, corners, flips) and sends them to the device once. A
batch is then gathered, cropped, flipped and normalised there, without a host synchronisation; a
policy sends a few numbers for each batch.
Memory on the device: N * (H + 2 * padding) * (W + 2 * padding) * 3 bytes; an unpadded set on the
CPU stays in the memory-mapped cache file, whose pages all ranks of a host share.
"""

from collections.abc import Iterator
from functools import partial
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from fastkd.data.batch import Batch
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
        views: PictureView | None = None,
        padded_NPPC: Tensor | None = None,
    ) -> None:
        super().__init__(images, loading, views)
        self._images = images
        self._learn(images.unread)
        self._crop_size = images.images_NHWC.shape[1:3]
        geometry = loading.applied
        self._tables = GeometryTables(geometry, loading.seed, self.plan.num_ids, self._device)
        if padded_NPPC is None:
            try:
                stored_NHWC = torch.from_numpy(images.images_NHWC).to(self._device)
                padded_NPPC = pad_images(stored_NHWC, geometry)
            except ValueError as error:
                raise UserError(f"{images.name}: {error}") from error
        self._padded_NPPC = padded_NPPC

    @override
    def with_views(self, views: PictureView) -> Self:
        return type(self)(self._images, self._loading, views=views, padded_NPPC=self._padded_NPPC)

    def _crops(self, ids_N: Tensor, epoch: int, appearance: int) -> Tensor:
        """uint8 [N, H, W, 3] on the device."""
        drawn = self._tables.of(epoch, ids_N, appearance)
        samples_N = self.plan.samples_of(ids_N)
        return gather_crops(self._padded_NPPC, samples_N, *drawn, self._crop_size)

    @override
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        planned = self.plan.order(epoch)
        order = self._shown_ids(planned)
        order_N = to_device(order, self._device)
        for part in parts:
            ids_N = order_N[part]
            crops = partial(self._crops, ids_N, epoch)
            images_NCHW, second_NCHW = self._finish.images(crops, order[part], epoch, self._second)
            index_N = self.plan.samples_of(ids_N)
            labels_N = self._device_labels_N.index_select(0, index_N)
            unread = self._stand_ins.said_of(planned[part])
            yield Batch(images_NCHW, labels_N, index_N, second_NCHW=second_NCHW, unread=unread)
