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
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.sources.decode import framed
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.lock import locked
from fastkd.data.sources.progress import Progress, show_progress
from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.storage.facts import Framing

__all__ = ["cache_folder", "decoded_images", "native_size"]

# 2: grey images of more than 8 bits are scaled, before they were clipped.
_FORMAT = 2
_CHUNK_BYTES = 32 << 20
# Images per task of the thread pool: for 32x32 files one task per image costs as much as decoding.
_RUN = 16


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else $FASTKD_CACHE, else $XDG_CACHE_HOME/fastkd, else ~/.cache/fastkd.

    A user without a home, as in many containers, has it in the folder for temporary files.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    if chosen := os.environ.get("FASTKD_CACHE"):
        return Path(chosen)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "fastkd"
    try:
        return Path.home() / ".cache" / "fastkd"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fastkd-{os.getuid()}"


def native_size(index: FolderIndex) -> int:
    """Side of the first image, for `image_size=None`; all others must then be the same.

    Raises:
        UserError: it is not square.
    """
    width, height = index.image(0).size
    if width != height:
        raise UserError(
            f"{index.name}: {shown(index.path(0))} is {width}x{height} pixels; set data.image_size "
            "to have the images resized and cropped to a square"
        )
    return width


def decoded_images(
    index: FolderIndex,
    framing: Framing | None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """All images of a split, uint8 [N, S, S, 3], from the cache, which is built if need be.

    framing  what is shown of each; None: all images must have one square size already

    Raises:
        UserError: a corrupt image (named), unequal sizes without a framing, no space left, or a
            cache folder that cannot be written.
    """
    size = framing.crop if framing else native_size(index)
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        images = _read_valid(folder / stem, record)
        if images is not None:
            return images
        with locked(folder / f"{stem}.lock"):
            images = _read_valid(folder / stem, record)
            if images is None:
                _build(index, folder, stem, record, framing, progress)
                images = _read_valid(folder / stem, record)
    except OSError as error:
        raise _explain(error, folder, record) from error
    if images is None:
        raise UserError(
            f"the cache {folder / stem}.npy does not read back as it was written; is the disk "
            "failing? Set FASTKD_CACHE to another folder"
        )
    return images


def _read_valid(stem: Path, record: dict[str, Any]) -> np.ndarray | None:
    """The mapped pixels when the pair of files is complete and matches `record`, else None."""
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
    for start, stop in _chunks(record["shape"]):
        crc = zlib.crc32(images[start:stop].data, crc)
    return images if stored.get("pixels_crc32") == crc else None


def _build(
    index: FolderIndex,
    folder: Path,
    stem: str,
    record: dict[str, Any],
    framing: Framing | None,
    progress: Progress | None,
) -> None:
    """Decode everything in threads (Pillow releases the GIL) and write the pair of files."""
    for leftover in folder.glob(f".{stem}.*"):
        leftover.unlink(missing_ok=True)
    size = record["shape"][1]

    def pixels(sample: int) -> np.ndarray:
        image = index.image(sample)
        if framing is not None:
            image = framed(image, framing)
        elif image.size != (size, size):
            raise UserError(
                f"{index.name}: {shown(index.path(sample))} is {image.width}x{image.height} "
                f"pixels, the first image is {size}x{size}; set data.image_size to have all resized"
            )
        return np.asarray(image)

    def run(first: int) -> list[np.ndarray]:
        return [pixels(sample) for sample in range(first, min(first + _RUN, total))]

    total = len(index)
    pixels_file, record_file = folder / f".{stem}.npy", folder / f".{stem}.json"
    crc = 0
    what = f"Decoding {index.name} ({total} images, once)"
    try:
        with (
            show_progress(what, progress) as report,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
            # Plain writes: on a full disk they raise, while a store into a mapped file is a SIGBUS.
            open(pixels_file, "wb") as stream,
        ):
            np.lib.format.write_array_header_1_0(
                stream,
                {"descr": "|u1", "fortran_order": False, "shape": tuple(record["shape"])},
            )
            # A full disk is noticed here, before minutes of decoding.
            os.posix_fallocate(stream.fileno(), 0, stream.tell() + math.prod(record["shape"]))
            for start, stop in _chunks(record["shape"]):
                chunk = np.stack(
                    list(chain.from_iterable(threads.map(run, range(start, stop, _RUN))))
                )
                stream.write(chunk.data)
                crc = zlib.crc32(chunk.data, crc)
                report(stop, total)
            stream.flush()
            os.fsync(stream.fileno())
        record_file.write_text(json.dumps({**record, "pixels_crc32": crc}, indent=1))
        os.replace(pixels_file, folder / f"{stem}.npy")
        os.replace(record_file, folder / f"{stem}.json")
    finally:
        pixels_file.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)


def _chunks(shape: list[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of about 32 MiB of images, at least 16 and at most 1,024 of them."""
    per_chunk = _CHUNK_BYTES // (shape[1] * shape[2] * shape[3])
    step = min(1024, max(1, per_chunk // _RUN) * _RUN)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


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
