"""Labels in a CSV file beside the images: `data.labels=FILE` with data.name=folder.

    path,label,split            a picture below data.root, its class, and train, val or test
    path,labels                 several classes, separated by |; none at all is allowed
The first line names the columns, in any order and case; others are left out. Without `split`
data.val_share holds images back. Canonical order: that of the file. Classes are sorted by name, or
by value where all are whole numbers.
"""

import csv
import os
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastkd.data.sources.class_names import lookalikes, name_problem
from fastkd.data.sources.folder import (
    FolderIndex,
    index_files,
    label_facts,
    lacking_classes,
    split_whole,
)
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.pixels import DEFAULTS, Decoding
from fastkd.errors import UserError
from fastkd.printable import few, shown

__all__ = ["open_csv"]

_PATH = ("path", "file", "filename", "filepath", "image", "image_path")
_LABEL, _LABELS = ("label", "class", "target"), ("labels", "classes", "targets", "tags")
_SPLIT = ("split", "subset", "set")
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SEPARATOR = "|"


@dataclass(frozen=True)
class _Row:
    path: str
    labels: tuple[str, ...]
    split: str | None


def open_csv(
    file: Path,
    root: Path,
    split: str,
    decoding: Decoding = DEFAULTS,
    holdout: Holdout | None = None,
) -> FolderIndex:
    """The images of a split.

    Raises:
        OSError: the file cannot be read.
        UserError: it is damaged or contradicts itself, or names what is not below `root`.
    """
    rows, several = _rows(file, root)
    classes = _sorted({label for row in rows for label in row.labels})
    for one in classes:
        if problem := name_problem(one):
            raise UserError(f"{shown(file)}: the name of the class {one!a} {problem}; rename it")
    if any(row.split is None for row in rows):
        if holdout is None:
            raise UserError(
                f"{shown(file)} has no column `split` (train, val, test): add one, or set "
                "data.val_share=0.1 to hold back a tenth of the images"
            )
        whole = _index("train", rows, root, classes, several, decoding)
        return split_whole(whole, "folder", root, split, holdout)
    # As in folders, a test set serves where there is no other.
    of_val = "val" if any(row.split == "val" for row in rows) else "test"
    _check_val(file, rows, of_val)
    wanted = "train" if split == "train" else of_val
    own = [row for row in rows if row.split == wanted]
    if not own:
        raise UserError(f"{shown(file)} lists no image for {split}")
    index = _index(split, own, root, classes, several, decoding)
    idle = sum(row.split not in ("train", of_val) for row in rows)
    if idle and split == "val":
        index = index.remarked(f"{idle} images that {shown(file)} lists for test are not used")
    if holdout is not None and split == "train":
        index = index.remarked(f"data.val_share is not used, {shown(file)} names the splits")
    return index


def _check_val(file: Path, rows: Sequence[_Row], of_val: str) -> None:
    trained = {label for row in rows if row.split == "train" for label in row.labels}
    asked = {label for row in rows if row.split == of_val for label in row.labels}
    if asked - trained:
        raise UserError(
            f"{shown(file)} has classes for {of_val} without an image for training: "
            f"{few(sorted(asked - trained))}"
        )


def _rows(file: Path, root: Path) -> tuple[list[_Row], bool]:
    """All rows, and whether an image may have several labels."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            lines = [
                line
                for line in csv.reader(stream, strict=True, skipinitialspace=True)
                if any(map(str.strip, line))
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{shown(file)} is no CSV file in UTF-8: {error}") from error
    if len(lines) < 2:
        raise UserError(f"{shown(file)} lists no image")
    names = [name.strip().lower() for name in lines[0]]
    path = _column(file, names, _PATH)
    one, many = (_column(file, names, known, optional=True) for known in (_LABEL, _LABELS))
    if (one is None) == (many is None):
        raise UserError(
            f"{shown(file)} has the columns {few(names)}; expected one of `label` (one class) and "
            f"`labels` (several, separated by {_SEPARATOR})"
        )
    split = _column(file, names, _SPLIT, optional=True)
    rows: list[_Row] = []
    for number, cells in enumerate(lines[1:], 2):
        if len(cells) != len(names):
            raise UserError(
                f"{shown(file)}, entry {number}: {len(cells)} cells, expected {len(names)}"
            )
        where = f"{shown(file)}, entry {number}"
        rows.append(
            _Row(
                _below(where, cells[path or 0], root),
                _labels(where, cells[many or 0]) if one is None else _label(where, cells[one]),
                None if split is None else _split(where, cells[split]),
            )
        )
    seen: set[str] = set()
    for row in rows:
        if row.path in seen:
            raise UserError(f"{shown(file)} lists {shown(row.path)} twice")
        seen.add(row.path)
    return rows, one is None


def _column(
    file: Path, names: Sequence[str], known: Sequence[str], *, optional: bool = False
) -> int | None:
    found = [place for place, name in enumerate(names) if name in known]
    if len(found) == 1:
        return found[0]
    if found or not optional:
        what = "more than one" if found else "none"
        raise UserError(
            f"{shown(file)} has the columns {few(names)}; expected one called {known[0]} (or "
            f"{', '.join(known[1:])}), found {what}"
        )
    return None


def _below(where: str, path: str, root: Path) -> str:
    """A path relative to the root, with which an absolute one has to begin."""
    if os.path.isabs(path):
        path = os.path.relpath(path, os.path.abspath(root))
    path = os.path.normpath(path)
    if "\0" in path:
        raise UserError(f"{where}: {shown(path)} has a zero byte, as no name of a file has")
    if path.startswith("../") or path in ("..", "."):
        raise UserError(f"{where}: {shown(path)} is not below data.root={shown(root)}")
    return path


def _label(where: str, cell: str) -> tuple[str, ...]:
    if not cell.strip():
        raise UserError(f"{where}: the label is empty")
    return (_spelled(cell),)


def _labels(where: str, cell: str) -> tuple[str, ...]:
    labels = tuple(_spelled(part) for part in cell.split(_SEPARATOR) if part.strip())
    if len(set(labels)) < len(labels):
        raise UserError(f"{where}: a label appears twice in {shown(cell)}")
    return labels


def _spelled(label: str) -> str:
    """As names of class folders are: an accent is one character."""
    return unicodedata.normalize("NFC", label.strip())


def _split(where: str, cell: str) -> str:
    word = cell.strip().lower()
    for split, words in _SPLITS.items():
        if word in words:
            return split
    raise UserError(f"{where}: the split is {shown(cell)}; expected {', '.join(_SPLITS)}")


def _sorted(names: set[str]) -> tuple[str, ...]:
    if not names:
        raise UserError("no image has a label")
    if all(map(_is_number, names)):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _is_number(name: str) -> bool:
    # Python reads no number of thousands of digits.
    return name.isascii() and name.removeprefix("-").isdecimal() and len(name) < 19


def _index(
    split: str,
    rows: Sequence[_Row],
    root: Path,
    classes: tuple[str, ...],
    several: bool,
    decoding: Decoding,
) -> FolderIndex:
    entries: list[tuple[bytes, os.stat_result]] = []
    gone: list[str] = []
    for row in rows:
        try:
            state = os.stat(root / row.path)
        except (FileNotFoundError, NotADirectoryError):
            gone.append(row.path)
            continue
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{shown(root / row.path)} is listed as an image and is no file")
        entries.append((os.fsencode(row.path), state))
    if gone:
        raise UserError(
            f"{len(gone)} of {len(rows)} listed images are not below {shown(root)} ({few(gone)})"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    if several:
        labels_N = np.zeros((len(rows), len(classes)), np.float32)
        for place, row in enumerate(rows):
            labels_N[place, [numbers[label] for label in row.labels]] = 1
    else:
        labels_N = np.array([numbers[row.labels[0]] for row in rows], dtype=np.int64)
    remarks = lacking_classes(labels_N, classes)
    if split == "train" and (alike := lookalikes(classes)):
        remarks.append(alike)
    index = index_files("folder", split, root, entries, labels_N, classes, decoding, remarks)
    # Names of files say nothing of their labels here.
    return index.marked(label_facts(labels_N, classes))
