"""Images with a label map each: the index of a split, in canonical order.

`segmentation` finds the files of each set. Nothing is decoded before `image` and `label_map`;
`picture_sizes` reads the headers of all files. Resizing and cropping are said in `joint_cuts`.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Self, TypeVar

import numpy as np
from PIL import Image

from fastkd.data.batch import NO_LABEL
from fastkd.data.sources.decode import open_file, read_image
from fastkd.data.sources.folder import digest_of
from fastkd.data.sources.label_ids import NO_CLASS, LabelIds
from fastkd.data.sources.pixels import DEFAULTS, Decoding, to_rgb
from fastkd.data.sources.progress import RUN, Progress, in_threads
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["LabelMaps", "Palette", "index_pairs"]

Palette = tuple[tuple[int, int, int], ...]
"""Red, green and blue, 0 to 255, of each class."""

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class LabelMaps:
    """The files of one split.

    name        `data set/split`
    folder      the images lie below it
    files_N     their names relative to it, as bytes
    map_folder  the label maps lie below it
    maps_N      their names, in the order of the images
    ids         what the numbers in them stand for
    classes     names by class id
    palette     a colour for each class; None: the set has none
    listing     SHA-256 over names, sizes and modification times of all files, and what their labels
                mean: changes when one of them does
    sizes       the same without modification times
    """

    name: str
    folder: Path
    files_N: np.ndarray
    map_folder: Path
    maps_N: np.ndarray
    ids: LabelIds
    classes: tuple[str, ...]
    palette: Palette | None
    listing: str
    sizes: str
    decoding: Decoding = DEFAULTS
    remarks: tuple[str, ...] = ()
    """What a user should know of the files, a sentence each."""

    def __len__(self) -> int:
        return len(self.files_N)

    @property
    def labels_N(self) -> np.ndarray:
        """No image has a class as a whole: NO_LABEL, int64 [N]."""
        return np.full(len(self), NO_LABEL, np.int64)

    def file(self, sample: int) -> str:
        """The image of a sample id, below its folder."""
        return os.fsdecode(bytes(self.files_N[sample]))

    def map_file(self, sample: int) -> str:
        """The label map of a sample id, below its folder."""
        return os.fsdecode(bytes(self.maps_N[sample]))

    def path(self, sample: int) -> str:
        """Where the image of a sample id is."""
        return os.path.join(self.folder, self.file(sample))

    def map_path(self, sample: int) -> str:
        """Where the label map of a sample id is."""
        return os.path.join(self.map_folder, self.map_file(sample))

    def open(self, sample: int) -> IO[bytes]:
        """The image's file. UserError: it cannot be opened."""
        return open_file(self.path(sample))

    def open_map(self, sample: int) -> IO[bytes]:
        """The label map's file. UserError: it cannot be opened."""
        return open_file(self.map_path(sample))

    def read(self, sample: int, use: Callable[[Image.Image], _Found]) -> _Found:
        """What `use` makes of the opened, not yet decoded image; UserError as `decode`."""
        with self.open(sample) as stream:
            return read_image(self.path(sample), stream, self.decoding, use)

    def read_map(self, sample: int, use: Callable[[Image.Image], _Found]) -> _Found:
        """What `use` makes of the opened label map; UserError as `decode`."""
        with self.open_map(sample) as stream:
            return read_image(self.map_path(sample), stream, self.decoding, use)

    def image(self, sample: int) -> Image.Image:
        """The RGB picture of a sample id."""
        return self.read(sample, lambda image: to_rgb(image, self.decoding))

    def label_map(self, sample: int) -> np.ndarray:
        """The class ids of its pixels, uint8 [H, W]; NO_CLASS where there is none."""
        return self.read_map(sample, self.ids.map_of)

    def pair(self, sample: int) -> tuple[Image.Image, np.ndarray]:
        """Picture and label map of one size. UserError: they differ, or one cannot be read."""
        image, labels_HW = self.image(sample), self.label_map(sample)
        self._check(sample, image.size, (labels_HW.shape[1], labels_HW.shape[0]))
        return image, labels_HW

    def check_size(self, sample: int) -> tuple[int, int]:
        """Width and height, by the headers of both files. UserError: as `pair`."""
        size = self.read(sample, lambda image: image.size)
        self._check(sample, size, self.read_map(sample, lambda image: image.size))
        return size

    @cached_property
    def picture_sizes(self) -> list[tuple[int, int]]:
        """Width and height of every picture, by the headers of all files. UserError: as `pair`."""
        chunks = in_threads("", self.check_size, len(self), 64 * RUN, lambda done, total: None)
        return list(chain.from_iterable(chunks))

    def count_pixels(self, progress: Progress | None = None) -> np.ndarray:
        """Pixels of each class, int64 [C], and behind them those without one: [C + 1].

        All label maps are read for it, as they are stored.
        """
        what = f"Counting the pixels of {self.name} ({len(self)} label maps)"
        counts = np.zeros(len(self.classes) + 1, np.int64)
        for chunk in in_threads(what, self.pixels_of, len(self), 64 * RUN, progress):
            counts += np.sum(chunk, axis=0)
        return counts

    def pixels_of(self, sample: int) -> np.ndarray:
        """`count_pixels` of one label map. UserError: it cannot be read."""
        counts = np.bincount(self.label_map(sample).ravel(), minlength=256)
        return np.append(counts[: len(self.classes)], counts[NO_CLASS])

    def take(self, positions: np.ndarray) -> Self:
        """A new split of the samples at these positions; ids count from 0 again."""
        taken = replace(self, files_N=self.files_N[positions], maps_N=self.maps_N[positions])
        facts = positions.astype(np.int64).tobytes()
        return replace(taken, **_marked(taken.listing, taken.sizes, facts))

    def remarked(self, *remarks: str) -> Self:
        """The same with more remarks."""
        return replace(self, remarks=(*self.remarks, *remarks))

    def _check(self, sample: int, image: tuple[int, int], label_map: tuple[int, int]) -> None:
        if image != label_map:
            raise UserError(
                f"{self.name}: {shown(self.path(sample))} has {image[0]}x{image[1]} pixels and its "
                f"label map {shown(self.map_path(sample))} {label_map[0]}x{label_map[1]}: they "
                "must have one size, so make one of them again"
            )


def index_pairs(
    name: str,
    images: tuple[Path, Sequence[str]],
    maps: tuple[Path, Sequence[str]],
    ids: LabelIds,
    classes: tuple[str, ...],
    palette: Palette | None,
    decoding: Decoding,
    broken_links: bool = False,
) -> LabelMaps:
    """The index of these files, given by a folder and names below it; those of a pair correspond.

    broken_links: list links that lead nowhere, too, of which reading says so.

    OSError: one of them is not there.
    """
    digest = hashlib.sha256()
    sizes: list[tuple[bytes, int]] = []
    for folder, files in (images, maps):
        for file in files:
            place, relative = folder / file, os.fsencode(file)
            status = os.lstat(place) if broken_links and not place.exists() else os.stat(place)
            digest.update(b"%s\0%d\0%d\n" % (relative, status.st_size, status.st_mtime_ns))
            sizes.append((relative, status.st_size))
    (folder, files), (map_folder, map_files) = images, maps
    facts = "\0".join(classes).encode() + ids.facts
    marked = _marked(digest.hexdigest(), digest_of(sizes), facts)
    return LabelMaps(
        name,
        folder,
        np.array([os.fsencode(file) for file in files], dtype=np.bytes_),
        map_folder,
        np.array([os.fsencode(file) for file in map_files], dtype=np.bytes_),
        ids,
        classes,
        palette,
        marked["listing"],
        marked["sizes"],
        decoding,
    )


def _marked(listing: str, sizes: str, facts: bytes) -> dict[str, str]:
    """Both digests, depending on further facts."""
    both = {"listing": listing, "sizes": sizes}
    return {k: hashlib.sha256(one.encode() + facts).hexdigest() for k, one in both.items()}
