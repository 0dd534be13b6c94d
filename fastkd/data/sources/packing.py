"""Writes a split of image files into tar shards, see `shards` for their layout.

Pictures go in as they are, or smaller ones once and for all. Within the shards they lie in random
order, so that programs which read a shard from front to back see all classes; the index keeps the
canonical order. The same split gives the same bytes.
"""

import json
import math
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastkd.data.batch import IGNORED
from fastkd.data.draws import epoch_order
from fastkd.data.sources.folder import FolderIndex, digest_of
from fastkd.data.sources.progress import RUN, Progress, in_threads
from fastkd.data.sources.shards import CLASSES, Packed, index_path, write_index
from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.storage.atomic import writing

__all__ = ["Shrink", "pack", "pack_split"]

_SHARD_BYTES = 256 << 20
_CHUNK = 16 * RUN


@dataclass(frozen=True)
class Shrink:
    """Pictures whose short side is longer are resized to it, and written as JPEG."""

    side: int
    """Pixels."""
    quality: int = 90
    """Of the JPEG, 1 to 95."""

    def __post_init__(self) -> None:
        if self.side < 1 or not 1 <= self.quality <= 95:
            raise UserError(
                f"pictures cannot be shrunk to {self.side} pixels as JPEG of quality "
                f"{self.quality}; expected a side from 1 up and a quality from 1 to 95"
            )

    def of(self, index: FolderIndex, sample: int) -> bytes | None:
        """The file of the smaller picture; None: it is small enough."""
        picture = index.image(sample)
        scale = self.side / min(picture.size)
        if scale >= 1:
            return None
        width, height = (max(1, round(scale * one)) for one in picture.size)
        small, stream = picture.resize((width, height), Image.Resampling.LANCZOS), BytesIO()
        small.save(stream, "JPEG", quality=self.quality)
        return stream.getvalue()


def pack(
    splits: Mapping[str, FolderIndex], target: Path, shrink: Shrink | None = None
) -> dict[str, int]:
    """Write both splits into a new folder, which appears when all is written; bytes of each.

    Raises:
        UserError: the folder holds something, the disk is too small, or a picture that has to be
            resized cannot be read.
        RunFailed: the disk refuses.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{shown(target)} exists and is not an empty folder; choose another --out")
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UserError(f"--out {shown(target)} cannot be a folder of shards; name a new one")
    staged = target.with_name(f".{target.name}.packing")
    shutil.rmtree(staged, ignore_errors=True)
    with writing(target):
        staged.mkdir(parents=True)
    try:
        if shrink is None:
            _check_room(splits.values(), target, shutil.disk_usage(staged).free)
        classes = next(iter(splits.values())).classes
        with writing(target):
            (staged / CLASSES).write_text("".join(f"{one}\n" for one in classes), encoding="utf-8")
        sizes = {split: pack_split(index, staged, split, shrink) for split, index in splits.items()}
        with writing(target):
            if target.exists():  # empty, and perhaps where the user is
                for one in sorted(staged.iterdir(), key=lambda one: one.suffix != ".tar"):
                    os.replace(one, target / one.name)
            else:
                os.rename(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return sizes


def _check_room(splits: Iterable[FolderIndex], target: Path, free: int) -> None:
    needed = sum(index.size(sample) for index in splits for sample in range(len(index)))
    if needed > free:
        raise UserError(
            f"the images have {needed / 2**30:.2f} GiB, and {shown(target)} has room for "
            f"{free / 2**30:.2f}"
        )


def pack_split(
    index: FolderIndex,
    target: Path,
    split: str,
    shrink: Shrink | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Write the shards of a split and its index; how many bytes they have.

    shard_bytes: a shard is closed when it has as many.

    Raises:
        UserError: a picture that has to be resized cannot be read.
        RunFailed: the disk refuses.
    """
    num = len(index)
    order_N = epoch_order(0, 0, num)
    digits = max(6, math.ceil(math.log10(num + 1)))
    names: list[bytes] = [b""] * num
    spans_N3 = np.zeros((num, 3), np.int64)
    shards: list[tuple[str, int]] = []
    shards_of = _Shards(target, split, shard_bytes, shards)
    what = f"Packing {index.name} ({num} images)"

    def content(place: int) -> tuple[bytes, str]:
        sample = int(order_N[place])
        name = index.file(sample)
        small = None if shrink is None else shrink.of(index, sample)
        if small is not None:
            return small, f"{os.path.splitext(name)[0]}.jpg"
        with index.open(sample) as stream:
            return stream.read(), name

    with closing(shards_of):
        contents = in_threads(what, content, num, _CHUNK, progress)
        for place, (data, name) in enumerate(chain.from_iterable(contents)):
            sample = int(order_N[place])
            key = f"{sample:0{digits}d}"
            suffix = os.path.splitext(name)[1].lower()
            number, first = shards_of.add(
                {f"{key}{suffix}": data, **_label_file(index, sample, key)}
            )
            names[sample] = os.fsencode(name)
            spans_N3[sample] = number, first, len(data)
    packed = Packed(names, spans_N3, index.labels_N, index.classes, "")
    files = zip(names, spans_N3[:, 2].tolist(), strict=True)
    sizes = index.sizes if shrink is None else digest_of(files)
    write_index(index_path(target, split), packed._replace(sizes=sizes), shards)
    return sum(size for _, size in shards)


class _Shards:
    """The tar files of a split, one after the other."""

    def __init__(self, target: Path, split: str, most: int, done: list[tuple[str, int]]) -> None:
        self._target, self._split, self._most = target, split, most
        self._done = done
        self._archive: tarfile.TarFile | None = None

    def add(self, files: dict[str, bytes]) -> tuple[int, int]:
        """Append files; the number of the shard, and where the first one's content begins."""
        with writing(self._target):
            if self._archive is None:
                path = self._target / f"{self._split}-{len(self._done):06d}.tar"
                self._archive = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)
            archive: Any = self._archive
            number = len(self._done)
            start = archive.offset + tarfile.BLOCKSIZE
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
            archive.members.clear()  # it would remember every file
            if archive.offset >= self._most:
                self.close()
        return number, start

    def close(self) -> None:
        """Finish the shard that is open."""
        archive, self._archive = self._archive, None
        if archive is not None:
            with writing(self._target):
                archive.close()
            name = f"{self._split}-{len(self._done):06d}.tar"
            self._done.append((name, os.path.getsize(self._target / name)))


def _label_file(index: FolderIndex, sample: int, key: str) -> dict[str, bytes]:
    label = index.labels_N[sample]
    if index.labels_N.ndim == 1:
        return {f"{key}.cls": b"%d" % label}
    ids = {"present": np.flatnonzero(label == 1), "unknown": np.flatnonzero(label == IGNORED)}
    said = {what: found.tolist() for what, found in ids.items()}
    return {f"{key}.json": json.dumps(said).encode()}
