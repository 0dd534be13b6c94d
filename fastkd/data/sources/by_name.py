"""Data sets by name: find them under a root folder, read them, report what is missing.

`open_source` returns images in memory or the listing of a folder, `open_split` always images,
`open_label_maps` the listing of images with a label map each.
"""

import os
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from fastkd.data.normalization import LABEL_MAPS, normalization
from fastkd.data.sources.cache import decoded_images
from fastkd.data.sources.cifar import LAYOUTS, download_cifar, find_archive, load_cifar
from fastkd.data.sources.csv_labels import open_csv
from fastkd.data.sources.decode import broken_link
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
from fastkd.data.sources.image_set import (
    ImageSet,
    check_limit,
    first_labels,
    stratified_positions,
)
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.data.sources.pairs import PairFolders, find_pairs
from fastkd.data.sources.pixels import DEFAULTS, Decoding
from fastkd.data.sources.progress import Progress
from fastkd.data.sources.released import LAYOUTS as RELEASES
from fastkd.data.sources.released import find_release
from fastkd.data.sources.segmentation import find_segmentation
from fastkd.data.sources.shards import find_shards, open_shards
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.data.sources.tree import is_image, is_system
from fastkd.errors import UserError
from fastkd.printable import few, shown
from fastkd.storage.facts import Framing

__all__ = ["decode_source", "open_label_maps", "open_source", "open_split"]

_CIFAR_SIZE = 32

_OF_MAPS = ("labels", "masks", "annotations")
"""Folders of label maps beside one of images."""


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

    name        one of `fastkd.data.DATASETS`
    root        the folder that holds it; digits and synthetic need none
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
    *,
    skips: bool = False,
) -> ImageSet:
    """What `open_source` found, in memory; a folder comes from the cache, see `cache`.

    framing: what is shown of each picture; None: all of it, as it is stored.
    skips: images that cannot be read are noted in `unread` and black, not an error.
    """
    if isinstance(source, ImageSet):
        return source.framed(framing) if framing else source
    if framing is None and source.name.split("/")[0] in LAYOUTS:
        framing = Framing.whole(_CIFAR_SIZE)
    unread: dict[int, str] = {}
    images = decoded_images(source, framing, cache_dir, progress, unread if skips else None)
    if len(unread) == len(source):
        raise UserError(f"{source.name}: none of its images can be read, {unread[0]}")
    return ImageSet(source.name, images, source.labels_N, source.classes, unread)


def open_source(  # noqa: PLR0913 - a frozen public signature
    name: str,
    root: str | PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    download: bool = False,
    limit: int | None = None,
    decoding: Decoding = DEFAULTS,
    holdout: Holdout | None = None,
    labels: str | None = None,
    broken_links: bool = False,
) -> ImageSet | FolderIndex:
    """As `open_split`, but a folder of images comes as its listing, not decoded.

    decoding      how the files of a folder are read
    holdout       what becomes the "val" split of a folder that has none
    labels        CSV file with the labels of a folder
    broken_links  list links that lead nowhere in class folders; they are refused otherwise
    """
    _check_request(name, split)
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
                source = _find_folder(
                    place, split, decoding, holdout, labels, broken_links=broken_links
                )
            elif name in RELEASES:
                source = _find_released(name, place, split, decoding)
            else:
                source = _find_cifar(name, place, split, download, decoding)
        except OSError as error:
            raise _unreadable(place, error) from error
    if limit is None:
        return source
    check_limit(source.name, limit, len(source))
    if limit == len(source):
        return source
    labels_N = np.asarray(source.labels_N)
    return source.take(stratified_positions(first_labels(labels_N), limit))


def _check_request(name: str, split: str) -> None:
    normalization(name)  # refuses an unknown name
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if name in LABEL_MAPS:
        raise UserError(
            f"data.name={name} labels every pixel, so its images come with label maps: use "
            "`fastkd.data.open_data`"
        )


def open_label_maps(
    name: str,
    root: str | PathLike[str] | None,
    split: str,
    *,
    pairs: PairFolders | None = None,
    limit: int | None = None,
    decoding: Decoding = DEFAULTS,
    holdout: Holdout | None = None,
    broken_links: bool = False,
) -> LabelMaps:
    """The listing of a split of a set that labels pixels; nothing is decoded.

    pairs    where the parts of the set `pairs` are
    limit    a subset of this many images, evenly spread; ids count within it
    others   as for `open_source`
    """
    place = Path(os.path.expanduser(root or ""))
    try:
        if pairs is not None:
            found = find_pairs(pairs, split, holdout, decoding, broken_links=broken_links)
        elif root is None or not fspath(root):
            raise UserError(f"data.name={name} needs data.root, the folder that holds it")
        else:
            found = find_segmentation(name, place, split, decoding, broken_links=broken_links)
    except OSError as error:
        raise _unreadable(place, error) from error
    if limit is None:
        return found
    check_limit(found.name, limit, len(found))
    if limit == len(found):
        return found
    return found.take(np.arange(limit) * len(found) // limit)


def _unreadable(root: Path, error: OSError) -> UserError:
    unread = error.filename or root
    said = broken_link(unread) or f"{shown(unread)} cannot be read: {error.strerror}"
    return UserError(f"data.root={shown(root)}: {said}")


def _find_folder(
    root: Path,
    split: str,
    decoding: Decoding,
    holdout: Holdout | None,
    labels: str | None,
    *,
    broken_links: bool,
) -> FolderIndex:
    if not root.is_dir():
        raise UserError(
            f"data.root={shown(root)} is not a folder; expected train/ and val/ or test/ in it"
        )
    if labels is not None:
        return open_csv(Path(os.path.expanduser(labels)), root, split, decoding, holdout)
    folders = find_split_folders(root)
    if folders is not None:
        index = scan_folder("folder", folders, split, decoding, broken_links=broken_links)
        _refuse_label_maps(index)
        if holdout is None or split == "val":
            return index
        idle = f"data.val_share is not used, {shown(folders['val'])} has the validation images"
        return index.remarked(idle)
    present = [part for part in ("train", *VAL_FOLDERS) if (root / part).is_dir()]
    # Folders win: an archive may lie beside what was unpacked from it.
    if not present and not _has_class_folder(root):
        if find_shards(root):
            return open_shards("folder", root, split, decoding, holdout)
        if tars := sorted(one.name for one in root.glob("*.tar")):
            raise UserError(
                f"data.root={shown(root)} holds tar files ({few(tars)}) whose names do not say "
                "train, val or test; rename them to train-000000.tar and so on"
            )
    if holdout is None or (present and "train" not in present):
        raise UserError(f"data.root={shown(root)} has {_lacking(root, present)}")
    whole = root / "train" if present else root
    index = scan_whole("folder", whole, split, holdout, decoding, broken_links=broken_links)
    _refuse_label_maps(index)
    return index


def _refuse_label_maps(index: FolderIndex) -> None:
    """UserError if what looks like two classes are images and their label maps."""
    names = {name.casefold(): name for name in index.classes}
    maps = [names[name] for name in _OF_MAPS if name in names]
    if len(names) == 2 and "images" in names and maps:
        place = index.folder
        raise UserError(
            f"{shown(place)} has no classes but {names['images']}/ and {maps[0]}/, images with a "
            f"label map each: set data.name=pairs data.image_dir={shown(place / names['images'])} "
            f"data.label_dir={shown(place / maps[0])} data.classes_file=FILE, or the name of the "
            f"set, such as data.name=camvid"
        )


def _has_class_folder(root: Path) -> bool:
    folders = (one for one in root.iterdir() if one.is_dir() and not is_system(one.name))
    return any(is_image(file.name) for folder in folders for file in folder.iterdir())


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


def _find_released(name: str, root: Path, split: str, decoding: Decoding) -> FolderIndex:
    found = find_release(name, root, split, decoding)
    if found is not None:
        return found
    layout, folders = RELEASES[name], find_split_folders(root)
    if folders is not None and not layout.several_labels:
        return _sorted_copy(name, root, folders, split, layout.classes, decoding)
    if find_shards(root):
        return _of_size(open_shards(name, root, split, decoding), root, layout.classes)
    sorted_copy = "" if layout.several_labels else ", or for train/ with val/ or test/"
    raise UserError(
        f"{name} was not found: looked in {shown(root)} and {shown(root / layout.folder)} for "
        f"{' and '.join(layout.lists)}{sorted_copy}; set data.root to where it was unpacked"
    )


def _sorted_copy(
    name: str, root: Path, folders: dict[str, Path], split: str, classes: int, decoding: Decoding
) -> FolderIndex:
    """A published set as class folders; UserError for another number of classes."""
    return _of_size(scan_folder(name, folders, split, decoding), root, classes)


def _of_size(index: FolderIndex, root: Path, classes: int) -> FolderIndex:
    if len(index.classes) != classes:
        name = index.name.partition("/")[0]
        raise UserError(
            f"{shown(root)} holds {len(index.classes)} classes, {name} has {classes}; use "
            "data.name=folder for another data set"
        )
    return index


def _find_cifar(
    name: str, root: Path, split: str, download: bool, decoding: Decoding
) -> ImageSet | FolderIndex:
    places = [root, root / name]
    archive = find_archive(name, places)
    if archive is None:
        for place in places:
            folders = find_split_folders(place)
            if folders is not None:
                return _sorted_copy(name, place, folders, split, LAYOUTS[name].classes, decoding)
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
