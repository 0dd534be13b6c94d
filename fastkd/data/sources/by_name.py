"""Data sets by name: find them under a root folder, read them, report what is missing.

`open_source` returns images in memory or the listing of a folder, `open_split` always images.
"""

from os import PathLike, fspath
from pathlib import Path

import numpy as np

from fastkd.data.normalization import normalization
from fastkd.data.sources.cache import decoded_images
from fastkd.data.sources.cifar import LAYOUTS, download_cifar, find_archive, load_cifar
from fastkd.data.sources.digits import IMAGE_SIZE as DIGITS_SIZE
from fastkd.data.sources.digits import load_digits
from fastkd.data.sources.folder import FolderIndex, find_split_folders, scan_folder
from fastkd.data.sources.image_set import ImageSet, check_limit, stratified_positions
from fastkd.data.sources.progress import Progress
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

__all__ = ["decode_source", "open_source", "open_split"]

_CIFAR_SIZE = 32


def open_split(
    name: str,
    root: str | PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    download: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> ImageSet:
    """One split of a data set, decoded: uint8 images of one square size.

    name        digits, cifar10, cifar100, folder or synthetic
    root        folder of cifar10, cifar100 and folder; the others need none
    split       "train" or "val" (a folder called test/ serves as val)
    image_size  pixels; short side resized to it, centre cropped (digits: 16 only). None: as stored
                (CIFAR 32, synthetic 32, folders: all images must agree)
    download    fetch a CIFAR set that is not below root; nothing is downloaded otherwise
    limit       a stratified subset of this many images, same everywhere; ids count within it
    progress    called with (done, total) while a folder is decoded; None: a bar on stderr
    cache_dir   where decoded folders are kept; None: $FASTKD_CACHE or the user's cache folder

    Raises:
        UserError: unknown name, data not found (with the places searched), damaged or
            inconsistent files (named).
    """
    source = open_source(name, root, split, image_size=image_size, download=download, limit=limit)
    framing = Framing.whole(image_size) if image_size else None
    return decode_source(source, framing, cache_dir, progress)


def decode_source(
    source: ImageSet | FolderIndex,
    framing: Framing | None,
    cache_dir: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """What `open_source` found, in memory; a folder comes from the cache, see `cache`.

    framing: what is shown of each picture; None: all of it, as it is stored.
    """
    if isinstance(source, ImageSet):
        return source.framed(framing) if framing else source
    if framing is None and source.name.split("/")[0] in LAYOUTS:
        framing = Framing.whole(_CIFAR_SIZE)
    images = decoded_images(source, framing, cache_dir, progress)
    return ImageSet(source.name, images, source.labels_N, source.classes)


def open_source(
    name: str,
    root: str | PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    download: bool = False,
    limit: int | None = None,
) -> ImageSet | FolderIndex:
    """As `open_split`, but a folder of images comes as its listing, not decoded."""
    normalization(name)  # refuses an unknown name
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    source = _find(name, root, split, image_size, download)
    if limit is None:
        return source
    check_limit(source.name, limit, len(source))
    if limit == len(source):
        return source
    return source.take(stratified_positions(np.asarray(source.labels_N), limit))


def _find(
    name: str,
    root: str | PathLike[str] | None,
    split: str,
    image_size: int | None,
    download: bool,
) -> ImageSet | FolderIndex:
    if name == "digits":
        if image_size not in (None, DIGITS_SIZE):
            raise UserError(
                f"data.image_size={image_size}, but digits comes as {DIGITS_SIZE}x{DIGITS_SIZE}; "
                f"leave it out or set {DIGITS_SIZE}"
            )
        return load_digits(split)
    if name == "synthetic":
        return make_synthetic(split, image_size or 32)
    if root is None or not fspath(root):
        raise UserError(f"data.name={name} needs data.root, the folder that holds it")
    folder = Path(root).expanduser()
    if name == "folder":
        return _find_folder(folder, split)
    return _find_cifar(name, folder, split, download)


def _find_folder(root: Path, split: str) -> FolderIndex:
    if not root.is_dir():
        raise UserError(
            f"data.root={root} is not a folder; expected train/ and val/ or test/ in it"
        )
    folders = find_split_folders(root)
    if folders is None:
        raise UserError(
            f"data.root={root} lacks train/ or val/ (test/ will do): expected "
            "train/CLASS/IMAGE and val/CLASS/IMAGE below it"
        )
    return scan_folder("folder", folders, split)


def _find_cifar(name: str, root: Path, split: str, download: bool) -> ImageSet | FolderIndex:
    places = [root, root / name]
    archive = find_archive(name, places)
    if archive is None:
        for place in places:
            folders = find_split_folders(place)
            if folders is not None:
                index = scan_folder(name, folders, split)
                expected = LAYOUTS[name].classes
                if len(index.classes) != expected:
                    raise UserError(
                        f"{place} holds {len(index.classes)} classes, {name} has {expected}; "
                        "use data.name=folder for another data set"
                    )
                return index
        if download:
            download_cifar(name, root)
            archive = find_archive(name, places)
    if archive is None:
        layout = LAYOUTS[name]
        raise UserError(
            f"{name} was not found: looked in {root} and {root / name} for {layout.python_dir}/, "
            f"{layout.binary_dir}/ and train/ with val/ or test/ (images by class); "
            "set data.root, or data.download=true to fetch it"
        )
    return load_cifar(name, *archive, split)
