"""A split of labelled images in memory, and the stratified subset that `limit` takes.

Sources build an ImageSet, the loaders read it. The canonical order of a split is the order of its
arrays; a sample id is a position in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from fastkd.data.sources.cuts import framing_cut
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

__all__ = [
    "ImageSet",
    "ImageSource",
    "check_limit",
    "first_labels",
    "first_readable",
    "images_per_class",
    "stratified_positions",
]


class ImageSource(Protocol):
    """What the torch-workers loader needs from a split: its labels and one picture at a time."""

    @property
    def name(self) -> str:
        """`data set/split`, for messages."""
        ...

    @property
    def labels_N(self) -> np.ndarray:
        """Labels in canonical order, in the form of `fastkd.data.batch.Batch`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by label."""
        ...

    def image(self, sample: int) -> Image.Image:
        """The RGB picture of a sample id; a UserError names the file that cannot be decoded."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Decoded images of one size.

    name         `data set/split`, e.g. "cifar10/train"
    images_NHWC  uint8 RGB; possibly a private copy-on-write mapping of the cache file
    labels_N     int64 in 0..len(classes)-1; of images with several labels float32 [N, C], see
                 `fastkd.data.batch.Batch`
    classes      names by label
    unread       sample id -> why its image could not be read; its pixels are black
    """

    name: str
    images_NHWC: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]
    unread: Mapping[int, str] = field(default_factory=dict[int, str])

    def __post_init__(self) -> None:
        images, labels = self.images_NHWC, self.labels_N
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: images are {images.dtype} {images.shape}, "
                "expected uint8 [N, H, W, 3]"
            )
        several = (len(images), len(self.classes))
        if labels.shape == several and labels.dtype == np.float32:
            return
        if labels.shape != (len(images),) or labels.dtype != np.int64:
            raise ValueError(
                f"{self.name}: labels are {labels.dtype} {labels.shape}, expected int64 "
                f"[{len(images)}], or of several labels float32 {list(several)}"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(
                f"{self.name}: labels run from {labels.min()} to {labels.max()}, "
                f"but there are {len(self.classes)} classes (0 to {len(self.classes) - 1})"
            )

    def __len__(self) -> int:
        return len(self.labels_N)

    def image(self, sample: int) -> Image.Image:
        """The picture of a sample id."""
        return Image.fromarray(np.ascontiguousarray(self.images_NHWC[sample]))

    def take(self, positions: np.ndarray) -> "ImageSet":
        """A new set of the samples at these positions; ids count from 0 again."""
        unread = {
            place: self.unread[sample]
            for place, sample in enumerate(positions.tolist())
            if sample in self.unread
        }
        images_NHWC, labels_N = self.images_NHWC[positions], self.labels_N[positions]
        return ImageSet(self.name, images_NHWC, labels_N, self.classes, unread)

    def framed(self, framing: Framing) -> "ImageSet":
        """What a framing shows of each picture, as of a folder's."""
        size = framing.crop
        if framing.resize == size and self.images_NHWC.shape[1:3] == (size, size):
            return self
        pictures = (self.image(sample) for sample in range(len(self)))
        shown = [np.asarray(framing_cut(one.size, framing).of(one)) for one in pictures]
        return ImageSet(self.name, np.stack(shown), self.labels_N, self.classes, self.unread)


def first_readable(source: ImageSource, *, skips: bool) -> tuple[int, tuple[int, int]]:
    """Id, and width and height, of the first picture; with `skips` of the first that can be read.

    Raises:
        UserError: it cannot be read, or none can.
    """
    num = len(source.labels_N) if skips else 1
    for sample in range(num):
        try:
            return sample, source.image(sample).size
        except UserError as error:
            if sample == num - 1:
                raise UserError(str(error)) from None
    raise UserError(f"{source.name} has no image")


def images_per_class(labels_N: np.ndarray, classes: int) -> list[int]:
    """Images of each class; of several labels [N, C] those that surely show it."""
    if labels_N.ndim == 2:
        return (labels_N > 0).sum(0).tolist()
    return np.bincount(labels_N, minlength=classes).tolist()


def first_labels(labels_N: np.ndarray) -> np.ndarray:
    """Class ids; of several labels [N, C] the first one, C where there is none."""
    if labels_N.ndim == 1:
        return labels_N
    shown_NC = labels_N > 0
    return np.where(shown_NC.any(1), shown_NC.argmax(1), labels_N.shape[1])


def stratified_positions(labels_N: np.ndarray, limit: int) -> np.ndarray:
    """Ascending positions of `limit` samples, the classes as equal as the data allow.

    Round robin: the first sample of every class, then the second of every class, and so on.
    """
    by_class = np.argsort(labels_N, kind="stable")
    sorted_labels = labels_N[by_class]
    first_of_class = np.searchsorted(sorted_labels, sorted_labels)
    nth_of_class = np.arange(len(labels_N)) - first_of_class
    rounds = np.lexsort((sorted_labels, nth_of_class))
    return np.sort(by_class[rounds[:limit]])


def check_limit(name: str, limit: int, num_samples: int) -> None:
    """Refuse a subset that is empty or larger than the split."""
    if not 1 <= limit <= num_samples:
        raise UserError(
            f"{name}: a subset of {limit} images was requested, the split has {num_samples}; "
            f"choose 1 to {num_samples}"
        )
