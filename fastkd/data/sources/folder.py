"""ImageFolder data sets: ROOT/train/CLASS/*.jpg and ROOT/val/ or ROOT/test/.

Scanning gives a FolderIndex (names, sizes, labels); decoding happens in `cache` (small sets, once)
or in the workers of `torch_loader` (large sets, every epoch). Canonical order: classes sorted by
name, then folder by folder in sorted order within a class, as in torchvision's ImageFolder.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.data.sources.decode import open_rgb
from fastkd.errors import UserError

__all__ = ["FolderIndex", "find_split_folders", "scan_folder"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
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
    """

    name: str
    folder: Path
    files_N: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]
    listing: str
    sizes: str = ""

    def __len__(self) -> int:
        return len(self.labels_N)

    def path(self, sample: int) -> str:
        """The file of a sample id."""
        return os.path.join(self.folder, os.fsdecode(bytes(self.files_N[sample])))

    def image(self, sample: int) -> Image.Image:
        """The decoded RGB picture of a sample id."""
        return open_rgb(self.path(sample))

    def take(self, positions: np.ndarray) -> "FolderIndex":
        """A new split of the samples at these positions; ids count from 0 again."""
        chosen = positions.astype(np.int64).tobytes()
        listing, sizes = (
            hashlib.sha256(digest.encode() + chosen).hexdigest()
            for digest in (self.listing, self.sizes)
        )
        return FolderIndex(
            self.name,
            self.folder,
            self.files_N[positions],
            self.labels_N[positions],
            self.classes,
            listing,
            sizes,
        )


def find_split_folders(root: Path) -> dict[str, Path] | None:
    """{"train": ..., "val": ...} when `root` has both, else None; val/ wins over test/."""
    for val in VAL_FOLDERS:
        if (root / "train").is_dir() and (root / val).is_dir():
            return {"train": root / "train", "val": root / val}
    return None


def scan_folder(name: str, folders: dict[str, Path], split: str) -> FolderIndex:
    """List the images of a split.

    Raises:
        UserError: no class folders, an empty class folder, or class folders that differ between
            train and val, or something that cannot be read; the message names it.
    """
    try:
        return _scan(name, folders, split)
    except OSError as error:
        raise UserError(f"{name}: {error.filename} cannot be read: {error.strerror}") from error


def _scan(name: str, folders: dict[str, Path], split: str) -> FolderIndex:
    classes = _class_names(folders["train"])
    val_classes = _class_names(folders["val"])
    if classes != val_classes:
        only_train = sorted(set(classes) - set(val_classes))
        only_val = sorted(set(val_classes) - set(classes))
        raise UserError(
            f"{name}: {folders['train']} and {folders['val']} do not hold the same classes: "
            f"only in train: {_few(only_train)}; only in {folders['val'].name}: {_few(only_val)}"
        )
    folder = folders[split]
    digest, sizes = hashlib.sha256(), hashlib.sha256()
    files: list[bytes] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        entries = _images_below(folder / class_name)
        if not entries:
            raise UserError(
                f"{name}: the class folder {folder / class_name} holds no image "
                f"({', '.join(EXTENSIONS)}); add some, or remove the class from train and val"
            )
        for path, stat in entries:
            relative = os.fsencode(os.path.relpath(path, folder))
            digest.update(b"%s\0%d\0%d\n" % (relative, stat.st_size, stat.st_mtime_ns))
            sizes.update(b"%s\0%d\n" % (relative, stat.st_size))
            files.append(relative)
        labels.extend([label] * len(entries))
    return FolderIndex(
        f"{name}/{split}",
        folder,
        np.array(files, dtype=np.bytes_),
        np.array(labels, dtype=np.int64),
        classes,
        digest.hexdigest(),
        sizes.hexdigest(),
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(
            f"{folder} has no class folders; expected {folder}/CLASS/IMAGE, one folder per class"
        )
    return tuple(names)


def _images_below(folder: Path) -> list[tuple[str, os.stat_result]]:
    """(path, stat) of the images in a class folder and its subfolders, a folder at a time."""
    found = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                path = os.path.join(parent, name)
                found.append((path, os.stat(path)))
    return found


def _few(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
