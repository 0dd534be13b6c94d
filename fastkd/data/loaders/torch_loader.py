"""Large folders: images decoded by torch DataLoader workers, batch by batch, every epoch.

A worker gets (epoch, sample ids) and returns the uint8 pixels; normalisation, and the padded crop
if the recipe has one, run on the device as in `resident`. A sample's appearance is a function of
(seed, epoch, sample id), so it does not depend on the number of workers or ranks, and starting in
mid-epoch decodes nothing earlier.
"""

import atexit
import signal
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from fastkd.data.batch import Batch, SecondViews
from fastkd.data.geometry import NO_GEOMETRY, Crop
from fastkd.data.loaders.planned import Loading, PlannedLoader
from fastkd.data.loaders.workers import from_workers
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.decode import framed, random_resized_crop
from fastkd.data.sources.image_set import ImageSource
from fastkd.data.tables import GeometryTables
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

__all__ = ["TorchLoader"]

_Key = tuple[int, np.ndarray]
# Pictures, sample ids and, if there are any, second views that are finished on the host.
_Pixels = tuple[Tensor, ...]


@dataclass(frozen=True)
class _View:
    """How one picture becomes size x size pixels on the host."""

    size: int
    framing: Framing
    crop: Crop
    train: bool
    flip: bool
    seed: int

    def pixels(
        self, source: ImageSource, sample: int, epoch: int, appearances: Sequence[int] = (0,)
    ) -> list[np.ndarray]:
        """One picture for each appearance; decoded once."""
        image = source.image(sample)
        return [np.asarray(self._cut(image, sample, epoch, k)) for k in appearances]

    def _cut(self, image: Image.Image, sample: int, epoch: int, appearance: int) -> Image.Image:
        if self.crop == "resized" and self.train:
            return random_resized_crop(
                image, self.size, self.seed, epoch, sample, self.flip, appearance
            )
        return framed(image, self.framing)


class _Pictures(Dataset[_Pixels | str]):
    """Whole batches by (epoch, sample ids)."""

    def __init__(
        self,
        source: ImageSource,
        view: _View,
        second: PictureView | None,
        tables: GeometryTables,
    ) -> None:
        self._source = source
        self._view = view
        self._second = second
        self._tables = tables

    def __getitem__(self, key: _Key) -> _Pixels | str:
        epoch, index_B = key
        appearances = [0]
        if self._second and self._second.is_crop and self._view.crop == "resized":
            appearances += self._second.appearances
        try:
            shown = [self._view.pixels(self._source, int(n), epoch, appearances) for n in index_B]
        except UserError as error:
            # Returned, not raised: the DataLoader would wrap the message in a worker's traceback.
            return str(error)
        ids_B = torch.from_numpy(index_B)
        if self._second is None:
            return torch.from_numpy(np.stack([picture for (picture,) in shown])), ids_B
        # By appearance, then by sample.
        pictures = [picture for each in zip(*shown, strict=True) for picture in each]
        stacked_NHWC = torch.from_numpy(np.stack(pictures))
        pictures_BHWC, more_BHWC = stacked_NHWC[: len(index_B)], stacked_NHWC[len(index_B) :]
        if not self._second.is_crop:
            crops_BHWC = self._tables.crop(pictures_BHWC, ids_B, epoch)
            seed, num = self._view.seed, len(self._source.labels_N)
            more_BHWC = self._second.of(crops_BHWC, index_B, epoch, seed=seed, num_samples=num)
        return pictures_BHWC, ids_B, more_BHWC


class _Keys(Sampler[_Key]):
    """The keys of the epoch that is about to start; iterated in the main process."""

    def __init__(self) -> None:
        self.keys: list[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.keys)


def _start_worker(_worker: int) -> None:
    # Ctrl-C and a closed terminal reach the whole process group, and a forked worker inherits the
    # trainer's handlers: the trainer alone decides how to end, and torch must be able to terminate
    # its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _dismiss(loader: weakref.ref[DataLoader[_Pixels | str]]) -> None:
    # If multiprocessing terminates the workers at exit, torch ends in a traceback; it prevents that
    # itself only when it pins memory.
    iterator = getattr(loader(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


class TorchLoader(PlannedLoader):
    """Batches of a split that is too large to keep decoded; protocol `fastkd.data.batch.Loader`.

    source        labels and pictures by sample id: a FolderIndex or an ImageSet
    loading       as for ResidentLoader; of its geometry "resized" uses flip only
    image_size    side of the square output images, in pixels
    crop          "resized": random area and aspect in training (see `decode.random_resized_crop`);
                  "pad" and "none": `framing`, then the geometry, the same bytes as ResidentLoader
                  gives
    framing       what is shown of a picture in evaluation, and in training unless the crop is
                  "resized"; its crop is image_size. None: all of it
    workers       processes that decode, from the first batch on; 0: in this process
    One epoch can be iterated at a time.

    Raises:
        UserError: as ResidentLoader; while iterating: an image that cannot be decoded, named.
    """

    def __init__(
        self,
        source: ImageSource,
        loading: Loading,
        *,
        image_size: int,
        crop: Crop,
        workers: int = 0,
        framing: Framing | None = None,
        views: SecondViews | None = None,
    ) -> None:
        super().__init__(source, loading, views)
        geometry = loading.applied
        if geometry.pad_mode == "reflect" and geometry.padding >= image_size:
            raise UserError(
                f"{source.name}: reflect padding of {geometry.padding} pixels needs images larger "
                f"than that, got {image_size}; use less padding or zero padding"
            )
        self._source = source
        self._workers = workers
        framing = framing or Framing.whole(image_size)
        self._view = _View(image_size, framing, crop, loading.train, geometry.flip, loading.seed)
        cut = NO_GEOMETRY if crop == "resized" else geometry
        num = self.plan.num_samples
        self._tables = GeometryTables(cut, loading.seed, num, self._device)
        self._threads: ThreadPoolExecutor | None = None
        self._keys = _Keys()
        host = GeometryTables(cut, loading.seed, num, torch.device("cpu"))
        self._loader: DataLoader[_Pixels | str] = DataLoader(
            _Pictures(source, self._view, self._second, host),
            batch_size=None,
            sampler=self._keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        if workers:
            atexit.register(_dismiss, weakref.ref(self._loader))

    @override
    def with_views(self, views: SecondViews) -> Self:
        return type(self)(
            self._source,
            self._loading,
            image_size=self._view.size,
            crop=self._view.crop,
            workers=self._workers,
            framing=self._view.framing,
            views=views,
        )

    @override
    def fetch(self, index_N: Tensor, epoch: int) -> Tensor:
        # Decoded in threads of this process; the workers keep to their batches.
        if self._threads is None:
            self._threads = ThreadPoolExecutor()
        decoded = self._threads.map(
            lambda sample: self._view.pixels(self._source, sample, epoch)[0], index_N.tolist()
        )
        try:
            pictures = list(decoded)
        except UserError as error:
            raise UserError(str(error), shared=False) from None
        pictures_NHWC = torch.from_numpy(np.stack(pictures)).to(self._device)
        crops_NHWC = self._tables.crop(pictures_NHWC, index_N.to(self._device), epoch)
        return self._normalize(crops_NHWC)

    @override
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        order_N = self.plan.order(epoch)
        self._keys.keys = [(epoch, order_N[part]) for part in parts]
        for pixels in from_workers(self._loader, "data.workers"):
            if isinstance(pixels, str):
                raise UserError(pixels, shared=False)
            pictures_NHWC, index_N, *more = (
                part.to(self._device, non_blocking=True) for part in pixels
            )
            if self._second and self._second.is_crop and self._view.crop != "resized":
                more = [
                    self._tables.crop(pictures_NHWC, index_N, epoch, appearance)
                    for appearance in self._second.appearances
                ]
            yield Batch(
                self._normalize(self._tables.crop(pictures_NHWC, index_N, epoch)),
                self._device_labels_N.index_select(0, index_N),
                index_N,
                second_NCHW=self._normalize(torch.cat(more)) if self._second else None,
            )
