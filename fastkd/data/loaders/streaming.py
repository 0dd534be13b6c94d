"""What loaders that decode batch by batch share: keys out, pixels in, the rest on the device."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

from torch import Tensor
from typing_extensions import override

from fastkd.data.batch import Batch
from fastkd.data.geometry import NO_GEOMETRY, Crop
from fastkd.data.loaders.decoding import Pixels, Reader, View
from fastkd.data.loaders.planned import Loading, PlannedLoader
from fastkd.data.loaders.processes import Key
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.image_set import ImageSource
from fastkd.data.tables import GeometryTables
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

__all__ = ["StreamingLoader"]


class StreamingLoader(PlannedLoader):
    """Batches of a split that is too large to keep decoded; protocol `fastkd.data.batch.Loader`.

    source        labels and pictures by sample id: a FolderIndex or an ImageSet
    loading       as for ResidentLoader; of its geometry "resized" uses flip only
    image_size    side of the square output images, in pixels
    crop          "resized": random area and aspect in training (see `cuts.random_cut`); "pad" and
                  "none": `framing`, then the geometry, the same bytes as ResidentLoader gives
    framing       what is shown of a picture in evaluation, and in training unless the crop is
                  "resized"; its crop is image_size. None: all of it
    workers       how many decode at a time
    skips         data.on_bad=skip: another image is shown for one that cannot be read
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
        skips: bool = False,
        views: PictureView | None = None,
    ) -> None:
        super().__init__(source, loading, views)
        geometry = loading.applied
        if geometry.pad_mode == "reflect" and geometry.padding >= image_size:
            raise UserError(
                f"{source.name}: reflect padding of {geometry.padding} pixels needs images larger "
                f"than that, got {image_size}; use less padding or zero padding"
            )
        self._workers = workers
        framing = framing or Framing.whole(image_size)
        view = View(
            size=image_size,
            framing=framing,
            crop=crop,
            train=loading.train,
            flip=geometry.flip,
            seed=loading.seed,
            interpolation=loading.interpolation,
        )
        self._reader = Reader(source, view, skips)
        shift = NO_GEOMETRY if crop == "resized" else geometry
        self._tables = GeometryTables(shift, loading.seed, self.plan.num_ids, self._device)
        second = self._second
        self._appearances = [0]
        if second is not None and second.is_crop and view.is_random:
            self._appearances += second.appearances
        self._start()

    @abstractmethod
    def _start(self) -> None:
        """Prepare whatever decodes."""

    @abstractmethod
    def _stream(self, keys: Sequence[Key]) -> Iterator[Pixels]:
        """The pixels of each key, in order."""

    @override
    def with_views(self, views: PictureView) -> Self:
        view = self._reader.view
        return type(self)(
            self._reader.source,
            self._loading,
            image_size=view.size,
            crop=view.crop,
            workers=self._workers,
            framing=view.framing,
            skips=self._reader.skips,
            views=views,
        )

    @override
    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[Batch]:
        order_N = self.plan.order(epoch)
        keys = [(epoch, self._shown_ids(order_N[part])) for part in parts]
        for part, pixels in zip(parts, self._stream(keys), strict=True):
            self._learn(pixels.unread)
            ids_N = pixels.ids_B.to(self._device, non_blocking=True)
            images_NCHW, second_NCHW = self._images(pixels, ids_N, epoch)
            index_N = self.plan.samples_of(ids_N)
            yield Batch(
                images_NCHW,
                self._device_labels_N.index_select(0, index_N),
                index_N,
                second_NCHW=second_NCHW,
                unread=self._stand_ins.said_of(order_N[part]),
            )

    def _images(self, pixels: Pixels, ids_N: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
        """x and its second views. ids_N: those of the pixels, on the device."""
        pictures_NHWC = pixels.pictures_BHWC.to(self._device, non_blocking=True)

        def crops(appearance: int) -> Tensor:
            if appearance and pixels.more_BHWC is not None:
                cut_NHWC = pixels.more_BHWC.split(len(ids_N))[appearance - 1]
                return cut_NHWC.to(self._device, non_blocking=True)
            return self._tables.crop(pictures_NHWC, ids_N, epoch, appearance)

        return self._finish.images(crops, pixels.ids_B.numpy(), epoch, self._second)
