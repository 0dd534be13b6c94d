"""ImageFolder data sets: ROOT/train/CLASS/*.jpg and ROOT/val/ or ROOT/test/.

Scanning gives a FolderIndex (names, sizes, labels); decoding happens in `cache` (small sets, once)
or in the workers of `torch_loader` (large sets, every epoch). Canonical order: classes sorted by
name, then folder by folder in sorted order within a class, as in torchvision's ImageFolder.
What counts as an image of a class is decided in `tree`, what a class is called in `class_names`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self, TypeVar

import numpy as np
from PIL import Image

from fastkd.data.sources.class_names import check_classes, class_folders, lookalikes
from fastkd.data.sources.decode import broken_link, open_file, read_image
from fastkd.data.sources.formats import FORMATS
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.image_set import first_labels, images_per_class
from fastkd.data.sources.pixels import DEFAULTS, Decoding, to_rgb
from fastkd.data.sources.tree import Found, find_images
from fastkd.errors import UserError
from fastkd.printable import few, shown

__all__ = [
    "VAL_FOLDERS",
    "FolderIndex",
    "digest_of",
    "find_split_folders",
    "index_files",
    "label_facts",
    "lacking_classes",
    "scan_folder",
    "scan_whole",
    "split_whole",
]

VAL_FOLDERS = ("val", "test")

_Found = TypeVar("_Found")
_Index = TypeVar("_Index", bound="FolderIndex")


@dataclass(frozen=True)
class FolderIndex:
    """The files of one split.

    name      `data set/split`
    folder    the split's folder
    files_N   file names relative to it, as bytes (one numpy array: a million Python strings would
              be copied into every worker process by their reference counts)
    labels_N  int64; of images with several labels float32 [N, C], see `fastkd.data.batch.Batch`
    classes   names by label
    listing   SHA-256 over names, sizes and modification times: changes when a file does
    sizes     SHA-256 over names and sizes: the same for a copy. Of a released set both digests also
              depend on the labels, which the names do not say
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

    def file(self, sample: int) -> str:
        """The file of a sample id, below the folder."""
        return os.fsdecode(bytes(self.files_N[sample]))

    def path(self, sample: int) -> str:
        """Where the file of a sample id is, for messages."""
        return os.path.join(self.folder, self.file(sample))

    def open(self, sample: int) -> IO[bytes]:
        """The file of a sample id. UserError: it cannot be opened."""
        return open_file(self.path(sample))

    def size(self, sample: int) -> int:
        """Bytes of the file of a sample id. OSError: there is none."""
        return os.stat(self.path(sample)).st_size

    def read(self, sample: int, use: Callable[[Image.Image], _Found]) -> _Found:
        """What `use` makes of the opened, not yet decoded image; UserError as `decode`."""
        with self.open(sample) as stream:
            return read_image(self.path(sample), stream, self.decoding, use)

    def image(self, sample: int) -> Image.Image:
        """The decoded RGB picture of a sample id."""
        return self.read(sample, lambda image: to_rgb(image, self.decoding))

    def take(self, positions: np.ndarray) -> Self:
        """A new split of the samples at these positions; ids count from 0 again."""
        taken = replace(self, files_N=self.files_N[positions], labels_N=self.labels_N[positions])
        return taken.marked(positions.astype(np.int64).tobytes())

    def remarked(self, remark: str) -> Self:
        """The same with one more remark."""
        return replace(self, remarks=(*self.remarks, remark))

    def marked(self, facts: bytes) -> Self:
        """The same with digests that depend on further facts."""
        listing, sizes = (
            hashlib.sha256(digest.encode() + facts).hexdigest()
            for digest in (self.listing, self.sizes)
        )
        return replace(self, listing=listing, sizes=sizes)


def label_facts(labels_N: np.ndarray, classes: Sequence[str]) -> bytes:
    """What `FolderIndex.marked` takes where names of files say nothing of their labels."""
    return "\0".join(classes).encode() + labels_N.tobytes()


def digest_of(files: Iterable[tuple[bytes, int]]) -> str:
    """SHA-256 over names and sizes, as `FolderIndex.sizes`."""
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(b"%s\0%d\n" % (name, size))
    return digest.hexdigest()


def find_split_folders(root: Path) -> dict[str, Path] | None:
    """{"train": ..., "val": ...} when `root` has both, else None; val/ wins over test/."""
    for val in VAL_FOLDERS:
        if (root / "train").is_dir() and (root / val).is_dir():
            return {"train": root / "train", "val": root / val}
    return None


def scan_folder(
    name: str,
    folders: dict[str, Path],
    split: str,
    decoding: Decoding = DEFAULTS,
    *,
    broken_links: bool = False,
) -> FolderIndex:
    """List the images of a split.

    broken_links: list links that lead nowhere, too, of which reading says so.

    Raises:
        UserError: no class folders, an empty class folder, a class of val that train lacks, or
            something that cannot be read; the message names it.
    """
    try:
        check_classes(folders["train"], folders["val"])
        classes = list(class_folders(folders["train"]))
        return _scan(name, split, folders[split], classes, decoding, broken_links=broken_links)
    except OSError as error:
        raise _unreadable(name, error) from error


def scan_whole(
    name: str,
    folder: Path,
    split: str,
    holdout: Holdout,
    decoding: Decoding = DEFAULTS,
    *,
    broken_links: bool = False,
) -> FolderIndex:
    """List the images of a split that is drawn from the one folder that there is.

    broken_links: as for `scan_folder`.

    Raises:
        UserError: as `scan_folder`, or nothing can be held back.
    """
    try:
        classes = list(class_folders(folder))
        whole = _scan(name, "train", folder, classes, decoding, broken_links=broken_links)
    except OSError as error:
        raise _unreadable(name, error) from error
    return split_whole(whole, name, folder, split, holdout)


def split_whole(whole: _Index, name: str, folder: Path, split: str, holdout: Holdout) -> _Index:
    """The part of an index that is "train" or "val"; UserError if nothing can be held back."""
    files = [bytes(file) for file in whole.files_N]
    labels_N = first_labels(whole.labels_N)
    positions = holdout.positions(files, labels_N, split)
    sizes = np.bincount(labels_N)
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
    # Of several labels only the first one counts here.
    alone = int((sizes == 1).sum()) if whole.labels_N.ndim == 1 else 0
    if alone:
        what = "class of one image has" if alone == 1 else "classes of one image have"
        remarks.append(f"{alone} {what} none in the validation images")
    return replace(whole.take(positions), remarks=(*whole.remarks, *remarks))


def _unreadable(name: str, error: OSError) -> UserError:
    file = error.filename or ""
    said = broken_link(file) or f"{shown(file)} cannot be read: {error.strerror}"
    return UserError(f"{name}: {said}")


def _scan(
    name: str,
    split: str,
    folder: Path,
    classes: list[str],
    decoding: Decoding,
    *,
    broken_links: bool,
) -> FolderIndex:
    places = class_folders(folder)
    here = [label for label, class_name in enumerate(classes) if class_name in places]
    own = [places[classes[label]] for label in here]
    found = find_images(folder, own, broken_links=broken_links)
    entries: list[tuple[bytes, os.stat_result]] = []
    labels: list[int] = []
    for label, images in zip(here, found.images, strict=True):
        class_name = classes[label]
        if not images:
            raise _no_image(name, folder / places[class_name], found)
        entries += [(os.fsencode(os.path.relpath(path, folder)), state) for path, state in images]
        labels += [label] * len(images)
    remarks = [remark] if (remark := found.remark()) else []
    if split == "train" and (alike := lookalikes(tuple(classes))):
        remarks.append(alike)
    labels_N = np.array(labels, dtype=np.int64)
    remarks += lacking_classes(labels_N, classes)
    return index_files(name, split, folder, entries, labels_N, tuple(classes), decoding, remarks)


def lacking_classes(labels_N: np.ndarray, classes: Sequence[str]) -> list[str]:
    """A remark on classes without an image, without its subject; none if every class has one."""
    counts = images_per_class(labels_N, len(classes))
    lacking = [one for one, count in zip(classes, counts, strict=True) if not count]
    return [f"has no image of {len(lacking)} of the classes ({few(lacking)})"] if lacking else []


def index_files(
    name: str,
    split: str,
    folder: Path,
    entries: Sequence[tuple[bytes, os.stat_result]],
    labels_N: np.ndarray,
    classes: tuple[str, ...],
    decoding: Decoding,
    remarks: Sequence[str],
) -> FolderIndex:
    """The index of these files, given by their names below `folder`; remarks begin with a verb."""
    digest = hashlib.sha256()
    for relative, status in entries:
        digest.update(b"%s\0%d\0%d\n" % (relative, status.st_size, status.st_mtime_ns))
    return FolderIndex(
        f"{name}/{split}",
        folder,
        np.array([relative for relative, _ in entries], dtype=np.bytes_),
        labels_N,
        classes,
        digest.hexdigest(),
        digest_of((relative, status.st_size) for relative, status in entries),
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
