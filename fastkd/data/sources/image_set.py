"""A split of labelled images in memory, and the stratified subset that `limit` takes.

Sources build an ImageSet, the loaders read it. The canonical order of a split is the order of its
arrays; a sample id is a position in it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from fastkd.data.sources.decode import framed
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

__all__ = ["ImageSet", "ImageSource", "check_limit", "stratified_positions"]


class ImageSource(Protocol):
    """What the torch-workers loader needs from a split: its labels and one picture at a time."""

    @property
    def name(self) -> str:
        """`data set/split`, for messages."""
        ...

    @property
    def labels_N(self) -> np.ndarray:
        """int64 labels in canonical order."""
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
    labels_N     int64 in 0..len(classes)-1
    classes      names by label
    """

    name: str
    images_NHWC: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images_NHWC, self.labels_N
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: images are {images.dtype} {images.shape}, "
                "expected uint8 [N, H, W, 3]"
            )
        if labels.shape != (len(images),) or labels.dtype != np.int64:
            raise ValueError(
                f"{self.name}: labels are {labels.dtype} {labels.shape}, "
                f"expected int64 [{len(images)}]"
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
        return ImageSet(
            self.name, self.images_NHWC[positions], self.labels_N[positions], self.classes
        )

    def framed(self, framing: Framing) -> "ImageSet":
        """What a framing shows of each picture, as of a folder's."""
        size = framing.crop
        if framing.resize == size and self.images_NHWC.shape[1:3] == (size, size):
            return self
        pictures = (self.image(sample) for sample in range(len(self)))
        shown = [np.asarray(framed(picture, framing)) for picture in pictures]
        return ImageSet(self.name, np.stack(shown), self.labels_N, self.classes)


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
