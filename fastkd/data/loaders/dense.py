"""Images with label maps in batches: one cut for both (`fastkd.data.sources.joint_cuts`).

    torch     pictures and label maps are read, resized and cut in worker processes
    resident  all are read and resized once and stay on the device as uint8, where windows are cut
Both give the same bytes. Policies and normalisation run on the device, on the images alone; on the
device NO_CLASS becomes NO_LABEL, the int64 of `fastkd.data.batch.Batch`.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.data.batch import NO_LABEL, Batch
from fastkd.data.geometry import gather_crops
from fastkd.data.loaders.plan import BatchPlan
from fastkd.data.loaders.planned import Loading, PlannedLoader
from fastkd.data.loaders.processes import Key, Processes
from fastkd.data.loaders.sized_plan import SizedPlan, starts_of
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.joint_cuts import JointCut, JointView, at_stride
from fastkd.data.sources.label_ids import NO_CLASS
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.data.sources.progress import RUN, in_threads
from fastkd.data.tables import to_device
from fastkd.errors import UserError

__all__ = ["DenseLoader", "Pair", "ResidentDense", "TorchDense"]


class Pair(NamedTuple):
    """A batch of images and label maps."""

    images_BHWC: Tensor
    """uint8"""
    labels_BHW: Tensor
    """uint8 class ids, NO_CLASS where there is none."""


@dataclass(frozen=True)
class _Read:
    """Whole batches by (epoch, ids); ids of repeated images as in `plan`."""

    source: LabelMaps
    view: JointView
    stride: int

    def __call__(self, key: Key) -> Pair:
        epoch, ids_B = key
        pairs = [self.source.pair(sample) for sample in (ids_B % len(self.source)).tolist()]
        cuts = self.view.cuts([picture.size for picture, _ in pairs], ids_B, epoch)
        shown = [
            (cut.of_image(picture), at_stride(cut.of_labels(labels_HW), self.stride))
            for cut, (picture, labels_HW) in zip(cuts, pairs, strict=True)
        ]
        images, labels = zip(*shown, strict=True)
        return Pair(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)))


class DenseLoader(PlannedLoader):
    """Batches of a split, see `fastkd.data.batch.Loader` for the protocol.

    view     how pictures are cut; seed and number of ids are those of the loading
    stride   labels at 1/stride of the size
    workers  how many processes read
    In training every outcome has one size. In evaluation images are shown whole, and consecutive
    ones of one size share a batch.

    Raises:
        UserError: an empty epoch, or more ranks than samples; while iterating: a file that cannot
            be read, or whose labels are out of range, named.
    """

    def __init__(
        self,
        source: LabelMaps,
        loading: Loading,
        view: JointView,
        *,
        stride: int = 1,
        workers: int = 0,
    ) -> None:
        view = replace(view, train=loading.train, seed=loading.seed)
        plan = None if loading.train else _plan(source, loading, view)
        super().__init__(source, loading, plan=plan)
        self._source = source
        self._view = replace(view, num_ids=self.plan.num_ids)
        self._stride = stride
        self._workers = workers
        self._start()

    def at_stride(self, stride: int) -> Self:
        """The same batches with labels at 1/stride of the size; what was read is shared."""
        other = copy(self)
        other._stride = stride
        return other

    @abstractmethod
    def _start(self) -> None:
        """Prepare whatever reads."""

    @abstractmethod
    def _pairs(self, keys: Sequence[Key]) -> Iterator[Pair]:
        """The images and labels of each key, in order."""

    @override
    def with_views(self, views: PictureView) -> Self:
        raise UserError(
            f"{self._source.name} has a label for every pixel, and second views of its pictures "
            f"(augment.xprime={views.kind}) would have others: leave augment.xprime out"
        )

    @override
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        order_N = self.plan.order(epoch)
        keys = [(epoch, order_N[part]) for part in parts]
        for (_, ids_B), pair in zip(keys, self._pairs(keys), strict=True):
            images_BHWC = pair.images_BHWC.to(self._device, non_blocking=True)
            labels_BHW = pair.labels_BHW.to(self._device, non_blocking=True).long()
            images_NCHW, _ = self._finish.images(lambda _, of=images_BHWC: of, ids_B, epoch, None)
            yield Batch(
                images_NCHW,
                labels_BHW.masked_fill_(labels_BHW == NO_CLASS, NO_LABEL),
                self.plan.samples_of(to_device(ids_B, self._device)),
            )


def _plan(source: LabelMaps, loading: Loading, view: JointView) -> BatchPlan:
    """Of an evaluation."""
    sizes = [view.out_size(size) for size in source.picture_sizes]
    world = loading.placement.world
    return SizedPlan(
        source.name,
        len(source),
        loading.batch_size,
        loading.seed,
        train=False,
        rank=world.rank,
        world_size=world.size,
        starts=starts_of(np.array(sizes), loading.batch_size),
    )


class TorchDense(DenseLoader):
    """Read in worker processes; workers=0: in this one."""

    @override
    def _start(self) -> None:
        read = _Read(self._source, self._view, self._stride)
        self._processes = Processes[Pair](read, self._workers, self._device)

    @override
    def at_stride(self, stride: int) -> Self:
        other = super().at_stride(stride)
        other._start()
        return other

    @override
    def _pairs(self, keys: Sequence[Key]) -> Iterator[Pair]:
        return self._processes.stream(keys)


class ResidentDense(DenseLoader):
    """All on the device, which takes N * H * W * 4 bytes and the padding; of one size, not scaled.

    The pictures lie in canvases that hold every window.
    """

    @override
    def _start(self) -> None:
        width, height = self._view.shown(self._source.picture_sizes[0])
        windows = self._view.window if self._loading.train else None
        across, down = windows or (width, height)
        reaches = [(0, 0), (0, 0)]
        if self._loading.train:
            reaches = [self._view.reach(width, across), self._view.reach(height, down)]
        (left, right), (top, bottom) = (
            (max(0, -low), max(0, high + window - side))
            for (low, high), window, side in zip(
                reaches, (across, down), (width, height), strict=True
            )
        )
        self._corner = left, top
        self._images_NHWC, self._labels_NHW1 = (
            F.pad(tensor.to(self._device), (0, 0, left, right, top, bottom), value=beyond)
            for tensor, beyond in zip(self._read(), (0, NO_CLASS), strict=True)
        )

    def _read(self) -> tuple[Tensor, Tensor]:
        """All pictures and label maps at their size, uint8 [N, H, W, 3] and [N, H, W, 1]."""
        num = len(self._source)

        def pair(sample: int) -> tuple[np.ndarray, np.ndarray]:
            picture, labels_HW = self._source.pair(sample)
            shown = self._view.shown(picture.size)
            cut = JointCut(shown, (0, 0), shown, shown)
            return cut.of_image(picture), cut.of_labels(labels_HW)

        what = f"Decoding {self._source.name} ({num} images)"
        chunks = in_threads(what, pair, num, 64 * RUN)
        images, labels = zip(*chain.from_iterable(chunks), strict=True)
        return (
            torch.from_numpy(np.stack(images)),
            torch.from_numpy(np.stack(labels)).unsqueeze(-1),
        )

    @override
    def _pairs(self, keys: Sequence[Key]) -> Iterator[Pair]:
        size = self._source.picture_sizes[0]
        for epoch, ids_B in keys:
            cuts = self._view.cuts([size] * len(ids_B), ids_B, epoch)
            drawn = self._drawn(cuts)
            index_B = to_device(ids_B % len(self._source), self._device)
            window = cuts[0].window[1], cuts[0].window[0]
            more = [out - own for out, own in zip(cuts[0].size, cuts[0].window, strict=True)]
            below = (0, 0, 0, more[0], 0, more[1])
            images_BHWC = gather_crops(self._images_NHWC, index_B, *drawn, window)
            labels_BHW1 = gather_crops(self._labels_NHW1, index_B, *drawn, window)
            labels_BHW = F.pad(labels_BHW1, below, value=NO_CLASS).squeeze(-1)
            yield Pair(F.pad(images_BHWC, below), at_stride(labels_BHW, self._stride))

    def _drawn(self, cuts: Sequence[JointCut]) -> tuple[Tensor, Tensor, Tensor | None]:
        """top, left and flip of the cuts in the canvases, on the device."""
        left, top = self._corner
        corners_B2 = np.array([(cut.corner[1] + top, cut.corner[0] + left) for cut in cuts])
        tops, lefts = (to_device(one, self._device) for one in corners_B2.T.copy())
        if not self._view.flip:
            return tops, lefts, None
        return tops, lefts, to_device(np.array([cut.flip for cut in cuts]), self._device)
