"""Data sets by name: find them under a root folder, read them, report what is missing.

`open_source` returns images in memory or the listing of a folder, `open_split` always images.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from fastkd.data.normalization import normalization
from fastkd.data.sources.cache import decoded_images
from fastkd.data.sources.cifar import LAYOUTS, download_cifar, find_archive, load_cifar
from fastkd.data.sources.digits import IMAGE_SIZE as DIGITS_SIZE
from fastkd.data.sources.digits import load_digits
from fastkd.data.sources.folder import (
    VAL_FOLDERS,
    FolderIndex,
    find_split_folders,
    scan_folder,
    scan_whole,
)
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.image_set import ImageSet, check_limit, stratified_positions
from fastkd.data.sources.pixels import DEFAULTS, Decoding
from fastkd.data.sources.progress import Progress
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.errors import UserError
from fastkd.printable import few, shown
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
    decoding: Decoding = DEFAULTS,
    holdout: Holdout | None = None,
) -> ImageSet | FolderIndex:
    """As `open_split`, but a folder of images comes as its listing, not decoded.

    decoding  how the files of a folder are read
    holdout   what becomes the "val" split of a folder that has none
    """
    normalization(name)  # refuses an unknown name
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if name == "digits":
        if image_size not in (None, DIGITS_SIZE):
            raise UserError(
                f"data.image_size={image_size}, but digits comes as {DIGITS_SIZE}x{DIGITS_SIZE}; "
                f"leave it out or set {DIGITS_SIZE}"
            )
        source = load_digits(split)
    elif name == "synthetic":
        source = make_synthetic(split, image_size or 32)
    elif root is None or not fspath(root):
        raise UserError(f"data.name={name} needs data.root, the folder that holds it")
    else:
        place = Path(os.path.expanduser(root))
        try:
            if name == "folder":
                source = _find_folder(place, split, decoding, holdout)
            else:
                source = _find_cifar(name, place, split, download, decoding)
        except OSError as error:
            unread = shown(error.filename or place)
            raise UserError(
                f"data.root={shown(place)}: {unread} cannot be read: {error.strerror}"
            ) from error
    if limit is None:
        return source
    check_limit(source.name, limit, len(source))
    if limit == len(source):
        return source
    return source.take(stratified_positions(np.asarray(source.labels_N), limit))


def _find_folder(
    root: Path, split: str, decoding: Decoding, holdout: Holdout | None
) -> FolderIndex:
    if not root.is_dir():
        raise UserError(
            f"data.root={shown(root)} is not a folder; expected train/ and val/ or test/ in it"
        )
    folders = find_split_folders(root)
    if folders is not None:
        index = scan_folder("folder", folders, split, decoding)
        if holdout is None or split == "val":
            return index
        idle = f"data.val_share is not used, {shown(folders['val'])} has the validation images"
        return replace(index, remarks=(*index.remarks, idle))
    present = [part for part in ("train", *VAL_FOLDERS) if (root / part).is_dir()]
    if holdout is None or (present and "train" not in present):
        raise UserError(f"data.root={shown(root)} has {_lacking(root, present)}")
    return scan_whole("folder", root / "train" if present else root, split, holdout, decoding)


def _lacking(root: Path, present: Sequence[str]) -> str:
    """What a folder without both splits has, and what to do."""
    held_back = "set data.val_share=0.1 to hold back a tenth of the"
    if "train" in present:
        return f"train/ but no val/ or test/. Add one, or {held_back} training images"
    if present:
        return f"{present[0]}/ but no train/. Add it: train/CLASS/IMAGE"
    inside = few(sorted(place.name for place in root.iterdir() if place.is_dir()))
    return (
        f"neither train/ nor val/ or test/; it has {inside}. Expected train/CLASS/IMAGE and "
        f"val/CLASS/IMAGE below it; if these folders are the classes, {held_back} images"
    )


def _find_cifar(
    name: str, root: Path, split: str, download: bool, decoding: Decoding
) -> ImageSet | FolderIndex:
    places = [root, root / name]
    archive = find_archive(name, places)
    if archive is None:
        for place in places:
            folders = find_split_folders(place)
            if folders is not None:
                index = scan_folder(name, folders, split, decoding)
                expected = LAYOUTS[name].classes
                if len(index.classes) != expected:
                    raise UserError(
                        f"{shown(place)} holds {len(index.classes)} classes, {name} has "
                        f"{expected}; use data.name=folder for another data set"
                    )
                return index
        if download:
            download_cifar(name, root)
            archive = find_archive(name, places)
    if archive is None:
        layout = LAYOUTS[name]
        raise UserError(
            f"{name} was not found: looked in {shown(root)} and {shown(root / name)} for "
            f"{layout.python_dir}/, {layout.binary_dir}/ and train/ with val/ or test/ (images by "
            "class); set data.root, or data.download=true to fetch it"
        )
    return load_cifar(name, *archive, split)
