"""Every file of a data set, read once: what a run would stumble over, and what is odd.

Bad files are those that `decode` refuses, with its reasons. Equal files are equal byte by byte.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import chain

import numpy as np

from fastkd.data.sources.decode import read_image
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import images_per_class
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.data.sources.pixels import to_rgb
from fastkd.data.sources.progress import RUN, Progress, in_threads
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["IMBALANCE", "BadFile", "Equal", "SplitCheck", "check_split", "equal_files"]

IMBALANCE = 10
"""A class with so many times the images of another is worth a remark."""


@dataclass(frozen=True)
class BadFile:
    """A file that a run could not read."""

    file: str
    """Below the folder of its split."""
    reason: str


@dataclass(frozen=True)
class SplitCheck:
    """What was found in a split."""

    index: FolderIndex | LabelMaps
    bad: tuple[BadFile, ...]
    sizes_N2: np.ndarray
    """Width and height of every image that can be read, int64."""
    digests: tuple[bytes, ...] = field(repr=False)
    """SHA-256 of every image's file by sample id; b"" where it could not be read."""
    pixels_C: np.ndarray | None = None
    """Of label maps the pixels of each class, and behind them those without one, int64 [C + 1]."""

    @property
    def counts(self) -> list[int]:
        """Images of each class; of several labels those that show it; of label maps pixels."""
        if self.pixels_C is not None:
            return self.pixels_C[:-1].tolist()
        return images_per_class(self.index.labels_N, len(self.index.classes))

    @property
    def median_size(self) -> tuple[int, int] | None:
        """Width and height; None if no image can be read."""
        if not len(self.sizes_N2):
            return None
        width, height = np.median(self.sizes_N2, axis=0).astype(int).tolist()
        return width, height

    @property
    def imbalance(self) -> str | None:
        """A sentence on classes of very different sizes."""
        if self.pixels_C is not None:
            return None
        counts = self.counts
        least, most = min(counts), max(counts)
        if most < IMBALANCE * max(least, 1):
            return None
        small, large = (shown(self.index.classes[counts.index(n)]) for n in (least, most))
        return (
            f"{large} has {most} images and {small} {least}: a network sees the rare class seldom, "
            "and the accuracy hardly counts it"
        )


@dataclass(frozen=True)
class Equal:
    """Files of the same bytes."""

    kind: str
    """`leak`: in training and validation; `labels`: under different labels; `copies`."""
    files: tuple[str, ...]
    """Split and file below its folder, of each."""


def check_split(index: FolderIndex | LabelMaps, progress: Progress | None = None) -> SplitCheck:
    """Decode all files of a split, with a bar on stderr."""
    total, what = len(index), f"Reading {index.name} ({len(index)} images)"
    chunks = in_threads(what, partial(_look, index), total, 64 * RUN, progress)
    found = list(chain.from_iterable(chunks))
    bad, sizes = [one for one, _, _ in found], [size for _, size, _ in found]
    pixels_C = None
    if isinstance(index, LabelMaps):
        chunks = in_threads("", partial(_look_at_map, index, sizes), total, 64 * RUN, _no_bar)
        maps = list(chain.from_iterable(chunks))
        bad += [one for one, _ in maps]
        pixels_C = np.sum([counts for _, counts in maps], axis=0)
    return SplitCheck(
        index,
        tuple(one for one in bad if one is not None),
        np.array([one for one in sizes if one is not None], dtype=np.int64).reshape(-1, 2),
        tuple(digest for _, _, digest in found),
        pixels_C,
    )


def _no_bar(_done: int, _total: int) -> None:
    """One bar is enough."""


def _look_at_map(
    index: LabelMaps, sizes: Sequence[tuple[int, int] | None], sample: int
) -> tuple[BadFile | None, np.ndarray]:
    """What is wrong with a label map, and its pixels by class, [C + 1]. sizes: of the images."""
    try:
        if sizes[sample] is not None:
            index.check_size(sample)
        return None, index.pixels_of(sample)
    except (UserError, OSError) as error:
        none = np.zeros(len(index.classes) + 1, np.int64)
        return BadFile(index.map_file(sample), str(error)), none


def _look(
    index: FolderIndex | LabelMaps, sample: int
) -> tuple[BadFile | None, tuple[int, int] | None, bytes]:
    try:
        with index.open(sample) as stream:
            content = stream.read()
        size = read_image(
            index.path(sample),
            BytesIO(content),
            index.decoding,
            lambda image: to_rgb(image, index.decoding).size,
        )
    except (UserError, OSError) as error:
        return BadFile(index.file(sample), str(error)), None, b""
    return None, size, hashlib.sha256(content).digest()


def equal_files(splits: Sequence[SplitCheck]) -> list[Equal]:
    """Groups of equal files, worst first: those that training and validation share, those with
    different labels, mere copies. Files that cannot be read do not count."""
    groups: defaultdict[bytes, list[tuple[str, str, str]]] = defaultdict(list)
    for split in splits:
        part = split.index.name.rpartition("/")[2]
        for sample, digest in enumerate(split.digests):
            if digest:
                label = split.index.labels_N[sample].tobytes().hex()
                groups[digest].append((part, label, f"{part}/{split.index.file(sample)}"))
    return sorted(_kinds(groups), key=lambda one: ("leak", "labels", "copies").index(one.kind))


def _kinds(groups: dict[bytes, list[tuple[str, str, str]]]) -> Iterator[Equal]:
    for members in groups.values():
        if len(members) < 2:
            continue
        parts, labels = ({one[place] for one in members} for place in (0, 1))
        kind = "leak" if len(parts) > 1 else "labels" if len(labels) > 1 else "copies"
        yield Equal(kind, tuple(file for _, _, file in members))
