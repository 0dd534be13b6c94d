"""ImageFolder data sets: ROOT/train/CLASS/*.jpg and ROOT/val/ or ROOT/test/.

Scanning gives a FolderIndex (names, sizes, labels); decoding happens in `cache` (small sets, once)
or in the workers of `torch_loader` (large sets, every epoch). Canonical order: classes sorted by
name, then folder by folder in sorted order within a class, as in torchvision's ImageFolder.
What counts as an image of a class is decided in `tree`, what a class is called in `class_names`.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.data.sources.class_names import class_folders, lookalikes, same_classes
from fastkd.data.sources.decode import open_rgb
from fastkd.data.sources.formats import FORMATS
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.pixels import DEFAULTS, Decoding
from fastkd.data.sources.tree import Found, find_images
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["VAL_FOLDERS", "FolderIndex", "find_split_folders", "scan_folder", "scan_whole"]

VAL_FOLDERS = ("val", "test")


@dataclass(frozen=True)
class FolderIndex:
    """The files of one split.

    name      `data set/split`
    folder    the split's folder
    files_N   file names relative to it, as bytes (one numpy array: a million Python strings would
              be copied into every worker process by their reference counts)
    labels_N  int64
    classes   names by label
    listing   SHA-256 over names, sizes and modification times: changes when a file does
    sizes     SHA-256 over names and sizes: the same for a copy
    decoding  how the files are read
    remarks   what a user should know of the files, a sentence each
    """

    name: str
    folder: Path
    files_N: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]
    listing: str
    sizes: str = ""
    decoding: Decoding = DEFAULTS
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_N)

    def path(self, sample: int) -> str:
        """The file of a sample id."""
        return os.path.join(self.folder, os.fsdecode(bytes(self.files_N[sample])))

    def image(self, sample: int) -> Image.Image:
        """The decoded RGB picture of a sample id."""
        return open_rgb(self.path(sample), self.decoding)

    def take(self, positions: np.ndarray) -> "FolderIndex":
        """A new split of the samples at these positions; ids count from 0 again."""
        chosen = positions.astype(np.int64).tobytes()
        listing, sizes = (
            hashlib.sha256(digest.encode() + chosen).hexdigest()
            for digest in (self.listing, self.sizes)
        )
        return replace(
            self,
            files_N=self.files_N[positions],
            labels_N=self.labels_N[positions],
            listing=listing,
            sizes=sizes,
        )


def find_split_folders(root: Path) -> dict[str, Path] | None:
    """{"train": ..., "val": ...} when `root` has both, else None; val/ wins over test/."""
    for val in VAL_FOLDERS:
        if (root / "train").is_dir() and (root / val).is_dir():
            return {"train": root / "train", "val": root / val}
    return None


def scan_folder(
    name: str, folders: dict[str, Path], split: str, decoding: Decoding = DEFAULTS
) -> FolderIndex:
    """List the images of a split.

    Raises:
        UserError: no class folders, an empty class folder, or class folders that differ between
            train and val, or something that cannot be read; the message names it.
    """
    try:
        same_classes(folders["train"], folders["val"])
        return _scan(name, split, folders[split], list(class_folders(folders["train"])), decoding)
    except OSError as error:
        raise _unreadable(name, error) from error


def scan_whole(
    name: str, folder: Path, split: str, holdout: Holdout, decoding: Decoding = DEFAULTS
) -> FolderIndex:
    """List the images of a split that is drawn from the one folder that there is.

    Raises:
        UserError: as `scan_folder`, or nothing can be held back.
    """
    try:
        whole = _scan(name, "train", folder, list(class_folders(folder)), decoding)
    except OSError as error:
        raise _unreadable(name, error) from error
    files = [bytes(file) for file in whole.files_N]
    positions = holdout.positions(files, whole.labels_N, split)
    sizes = np.bincount(whole.labels_N)
    if (sizes < 2).all():
        raise UserError(
            f"data.val_share={holdout.share:g}: every class of {shown(folder)} has one image, so "
            "none can be held back; add images, or make a val/ folder"
        )
    if split == "val":
        return replace(whole.take(positions), name=f"{name}/val", remarks=())
    remarks = [
        f"{len(whole) - len(positions)} of the {len(whole)} images in {shown(folder)} are held "
        f"back for validation (data.val_share={holdout.share:g} data.val_seed={holdout.seed})"
    ]
    if alone := int((sizes < 2).sum()):
        what = "class of one image has" if alone == 1 else "classes of one image have"
        remarks.append(f"{alone} {what} none in the validation images")
    return replace(whole.take(positions), remarks=(*whole.remarks, *remarks))


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(f"{name}: {shown(error.filename or '')} cannot be read: {error.strerror}")


def _scan(
    name: str, split: str, folder: Path, classes: list[str], decoding: Decoding
) -> FolderIndex:
    places = class_folders(folder)
    found = find_images(folder, [places[one] for one in classes])
    digest, sizes = hashlib.sha256(), hashlib.sha256()
    files: list[bytes] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        entries = found.images[label]
        if not entries:
            raise _no_image(name, folder / places[class_name], found)
        for path, status in entries:
            relative = os.fsencode(os.path.relpath(path, folder))
            digest.update(b"%s\0%d\0%d\n" % (relative, status.st_size, status.st_mtime_ns))
            sizes.update(b"%s\0%d\n" % (relative, status.st_size))
            files.append(relative)
        labels.extend([label] * len(entries))
    remarks = [remark] if (remark := found.remark()) else []
    if split == "train" and (alike := lookalikes(tuple(classes))):
        remarks.append(alike)
    return FolderIndex(
        f"{name}/{split}",
        folder,
        np.array(files, dtype=np.bytes_),
        np.array(labels, dtype=np.int64),
        tuple(classes),
        digest.hexdigest(),
        sizes.hexdigest(),
        decoding,
        tuple(f"{name}/{split} {remark}" for remark in remarks),
    )


def _no_image(name: str, folder: Path, found: Found) -> UserError:
    extensions = ", ".join(extension for each in FORMATS.values() for extension in each[:1])
    message = f"{name}: the class folder {shown(folder)} holds no image ({extensions}, ..)"
    if folder.is_symlink():
        target = shown(os.readlink(folder))
        message += f", or only what another class holds: it is a link to {target}"
    if remark := found.remark():
        message += f"; the split {remark}"
    return UserError(f"{message}; add some, or remove the class from train and val")
