"""Decoded image folders on disk: one .npy of uint8 pixels and one .json with its checksums.

Built once per host: the first process takes a file lock, the others wait for it and then read.
The JSON holds the checksum of the listing (names, sizes, modification times) and of the pixels;
anything that does not match is rebuilt. Both files appear by atomic rename, pixels first, so a
process killed at any point leaves either a valid pair or one that is rebuilt.

Read back with np.memmap mode "c": pages are shared between the ranks of a host, and a stray write
changes a private copy instead of the file (or crashing the process, as it would in mode "r").
"""

import errno
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.sources.cuts import framing_cut
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import first_readable
from fastkd.data.sources.lock import locked
from fastkd.data.sources.progress import RUN, Progress, in_threads
from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.storage.cache_folder import cache_folder
from fastkd.storage.facts import Framing

__all__ = ["decoded_images", "native_size"]

# 2: grey images of more than 8 bits are scaled, before they were clipped.
_FORMAT = 2
_CHUNK_BYTES = 32 << 20


def native_size(index: FolderIndex, *, skips: bool = False) -> int:
    """Side of the first image, for `image_size=None`; all others must then be the same.

    skips: of the first one that can be read.

    Raises:
        UserError: it is not square.
    """
    sample, (width, height) = first_readable(index, skips=skips)
    if width != height:
        raise UserError(
            f"{index.name}: {shown(index.path(sample))} is {width}x{height} pixels; set "
            "data.image_size to have the images resized and cropped to a square"
        )
    return width


def decoded_images(
    index: FolderIndex,
    framing: Framing | None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    unread: dict[int, str] | None = None,
) -> np.ndarray:
    """All images of a split, uint8 [N, S, S, 3], from the cache, which is built if need be.

    framing  what is shown of each; None: all images must have one square size already
    unread   gets the reason for each image that cannot be read, by sample id; it is black. None:
             such an image is an error

    Raises:
        UserError: a corrupt image (named), unequal sizes without a framing, no space left, or a
            cache folder that cannot be written.
    """
    size = framing.crop if framing else native_size(index, skips=unread is not None)
    folder = cache_folder(cache_dir)
    source = os.path.realpath(index.folder)
    decoding = list(index.decoding.pixels)
    place = f"{source}|{framing}|{len(index)}|{decoding}"
    stem = f"{index.name.replace('/', '-')}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}"
    record = {
        "format": _FORMAT,
        "source": source,
        "shape": [len(index), size, size, 3],
        "listing_sha256": index.listing,
        "decoding": decoding,
    }
    bad: dict[int, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        images = _read_valid(folder / stem, record, bad)
        if images is None or _can_be_read_now(index, bad):
            bad.clear()
            with locked(folder / f"{stem}.lock"):
                images = _read_valid(folder / stem, record, bad)
                if images is None or _can_be_read_now(index, bad):
                    bad.clear()
                    _build(index, folder, stem, record, framing, progress, skips=unread is not None)
                    images = _read_valid(folder / stem, record, bad)
    except OSError as error:
        raise _explain(error, folder, record) from error
    if images is None:
        raise UserError(
            f"the cache {folder / stem}.npy does not read back as it was written; is the disk "
            "failing? Set FASTKD_CACHE to another folder"
        )
    if unread is not None:
        unread.update(bad)
    elif bad:
        raise UserError(bad[min(bad)])
    return images


def _can_be_read_now(index: FolderIndex, bad: Mapping[int, str]) -> bool:
    """Whether an image can be read that could not when the cache was built."""
    for sample in bad:
        try:
            index.image(sample)
        except UserError:
            continue
        return True
    return False


def _read_valid(stem: Path, record: dict[str, Any], bad: dict[int, str]) -> np.ndarray | None:
    """The mapped pixels when the pair of files is complete and matches `record`, else None.

    bad: gets the images that could not be read when it was built.
    """
    try:
        stored = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        images = np.load(f"{stem}.npy", mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(stored, dict) or any(stored.get(key) != record[key] for key in record):
        return None
    if images.dtype != np.uint8 or list(images.shape) != record["shape"]:
        return None
    crc = 0
    size = _chunk(record["shape"])
    for start in range(0, len(images), size):
        crc = zlib.crc32(images[start : start + size].data, crc)
    unread = stored.get("unread", {})
    if stored.get("pixels_crc32") != crc or not _are_reasons(unread, len(images)):
        return None
    bad.update({int(sample): reason for sample, reason in unread.items()})
    return images


def _are_reasons(unread: Any, num: int) -> bool:
    return isinstance(unread, dict) and all(
        key.isdecimal() and int(key) < num and isinstance(reason, str)
        for key, reason in unread.items()
    )


def _build(
    index: FolderIndex,
    folder: Path,
    stem: str,
    record: dict[str, Any],
    framing: Framing | None,
    progress: Progress | None,
    *,
    skips: bool,
) -> None:
    """Decode everything and write the pair of files.

    skips: images that cannot be read are black.
    """
    for leftover in folder.glob(f".{stem}.*"):
        leftover.unlink(missing_ok=True)
    size = record["shape"][1]

    bad: dict[int, str] = {}

    def pixels(sample: int) -> np.ndarray:
        try:
            image = index.image(sample)
        except UserError as error:
            if not skips:
                raise
            bad[sample] = str(error)
            return np.zeros((size, size, 3), np.uint8)
        if framing is not None:
            image = framing_cut(image.size, framing).of(image)
        elif image.size != (size, size):
            raise UserError(
                f"{index.name}: {shown(index.path(sample))} is {image.width}x{image.height} "
                f"pixels, the first image is {size}x{size}; set data.image_size to have all resized"
            )
        return np.asarray(image)

    total = len(index)
    pixels_file, record_file = folder / f".{stem}.npy", folder / f".{stem}.json"
    crc = 0
    what = f"Decoding {index.name} ({total} images, once)"
    try:
        # Plain writes: on a full disk they raise, while a store into a mapped file is a SIGBUS.
        with open(pixels_file, "wb") as stream:
            np.lib.format.write_array_header_1_0(
                stream,
                {"descr": "|u1", "fortran_order": False, "shape": tuple(record["shape"])},
            )
            # A full disk is noticed here, before minutes of decoding.
            os.posix_fallocate(stream.fileno(), 0, stream.tell() + math.prod(record["shape"]))
            chunks = in_threads(what, pixels, total, _chunk(record["shape"]), progress)
            with closing(chunks):
                for pictures in chunks:
                    chunk = np.stack(pictures)
                    stream.write(chunk.data)
                    crc = zlib.crc32(chunk.data, crc)
            stream.flush()
            os.fsync(stream.fileno())
        found = {"pixels_crc32": crc, "unread": bad} if bad else {"pixels_crc32": crc}
        record_file.write_text(json.dumps({**record, **found}, indent=1))
        os.replace(pixels_file, folder / f"{stem}.npy")
        os.replace(record_file, folder / f"{stem}.json")
    finally:
        pixels_file.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)


def _chunk(shape: list[int]) -> int:
    """Images of about 32 MiB together, at least 16 and at most 1,024 of them."""
    per_chunk = _CHUNK_BYTES // (shape[1] * shape[2] * shape[3])
    return min(1024, max(1, per_chunk // RUN) * RUN)


def _explain(error: OSError, folder: Path, record: dict[str, Any]) -> UserError:
    needed_mib = math.prod(record["shape"]) / 2**20
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left in {folder} for the {needed_mib:.0f} MiB cache of "
            f"{shown(record['source'])}; free some or set FASTKD_CACHE to a folder on another disk"
        )
    return UserError(
        f"the cache folder {folder} cannot be used: {error}; set FASTKD_CACHE to a writable folder"
    )
