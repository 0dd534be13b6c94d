"""Any images with a label map each: two folders whose files have the same names.

    ROOT/images/[SPLIT/]..NAME.jpg    ROOT/labels/[SPLIT/]..NAME.png    ROOT/classes.txt
or wherever data.image_dir, data.label_dir and data.classes_file are. Folders called train and val
or test below both are the splits; without them data.val_share draws the validation images.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastkd.data.sources.class_names import name_problem
from fastkd.data.sources.folder import VAL_FOLDERS
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.label_ids import MOST_CLASSES, NO_CLASS, LabelIds
from fastkd.data.sources.label_maps import LabelMaps, Palette, index_pairs
from fastkd.data.sources.pixels import Decoding
from fastkd.data.sources.segmentation import by_stem
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["PairFolders", "find_pairs", "places", "read_classes"]

_IGNORE = "ignore"
_LINE = "NAME or NAME,RED,GREEN,BLUE on each line"


class PairFolders(NamedTuple):
    """Where the parts of a set are."""

    images: Path
    maps: Path
    classes: Path


class Classes(NamedTuple):
    """What a file of classes says."""

    names: tuple[str, ...]
    palette: Palette | None
    ids: LabelIds


def find_pairs(
    folders: PairFolders,
    split: str,
    holdout: Holdout | None,
    decoding: Decoding,
    *,
    broken_links: bool = False,
) -> LabelMaps:
    """The images and label maps of a split.

    broken_links: as for `index_pairs`.

    Raises:
        OSError: something cannot be read.
        UserError: a folder or file is not there, or an image lacks its label map or the reverse.
    """
    for key, place in (("image_dir", folders.images), ("label_dir", folders.maps)):
        if not place.is_dir():
            raise UserError(
                f"data.name=pairs: {shown(place)} is not a folder; set data.{key} to that of the "
                f"{'images' if key == 'image_dir' else 'label maps'}"
            )
    classes = read_classes(folders.classes)

    def index(images: Path, maps: Path) -> LabelMaps:
        name = f"pairs/{split}"
        files, map_files = by_stem(name, images, maps)
        return index_pairs(
            name,
            files,
            map_files,
            classes.ids,
            classes.names,
            classes.palette,
            decoding,
            broken_links,
        )

    below = _split_folder(folders, split)
    if below is not None:
        found = index(folders.images / below, folders.maps / below)
        if holdout is None or split == "val":
            return found
        return found.remarked("data.val_share is not used, there are folders of validation images")
    if holdout is None:
        raise UserError(
            f"data.name=pairs: {shown(folders.images)} and {shown(folders.maps)} do not both have "
            "train/ and val/ or test/: add them, or set data.val_share=0.1 to hold back a tenth of "
            "the images"
        )
    whole = index(folders.images, folders.maps)
    files = [bytes(file) for file in whole.files_N]
    if len(files) < 2:
        raise UserError(f"data.val_share={holdout.share:g}: one image cannot be divided; add some")
    positions = holdout.positions(files, np.zeros(len(files), np.int64), split)
    taken = whole.take(positions)
    if split == "val":
        return taken
    return taken.remarked(
        f"{len(whole) - len(positions)} of the {len(whole)} images in {shown(folders.images)} are "
        f"held back for validation (data.val_share={holdout.share:g} "
        f"data.val_seed={holdout.seed})"
    )


def _split_folder(folders: PairFolders, split: str) -> str | None:
    """The folder of a split, if both splits have one on both sides."""
    both = (folders.images, folders.maps)
    for val in VAL_FOLDERS:
        if all((place / part).is_dir() for place in both for part in ("train", val)):
            return val if split == "val" else "train"
    return None


def read_classes(file: Path) -> Classes:
    """Names, and colours if every line has one.

    UserError: it is not there, or a line is something else.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(
            f"data.name=pairs needs a text file of its classes, {_LINE}, in the order of their "
            f"numbers: {shown(file)} is not there; write it, or set data.classes_file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(file)} is not UTF-8 text; expected {_LINE}") from error
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    rows = [_row(file, number, line) for number, line in enumerate(lines, 1)]
    used = [(number, *row) for number, row in enumerate(rows) if row[0] != _IGNORE]
    names = tuple(name for _, name, _ in used)
    if len(used) < 2 or len(rows) > MOST_CLASSES or len(set(names)) < len(names):
        raise UserError(
            f"{shown(file)} has {len(names)} classes of {len(set(names))} names: expected 2 to "
            f"{MOST_CLASSES} of different names, {_LINE}"
        )
    given = [colour for _, colour in rows if colour is not None]
    if given and (len(given) < len(rows) or len(set(given)) < len(given)):
        raise UserError(
            f"{shown(file)}: expected a colour of its own for every class, or none at all, {_LINE}"
        )
    ignored = [number for number, (name, _) in enumerate(rows) if name == _IGNORE]
    ids = LabelIds.of([number for number, _, _ in used], [*ignored, NO_CLASS], given)
    palette = tuple(colour for _, _, colour in used if colour is not None)
    return Classes(names, palette or None, ids)


def _row(file: Path, number: int, line: str) -> tuple[str, tuple[int, int, int] | None]:
    name, *numbers = (cell.strip() for cell in line.split(","))
    values = [int(cell) if cell.isdecimal() and len(cell) < 4 else 256 for cell in numbers]
    if not name or len(values) not in (0, 3) or any(value > 255 for value in values):
        raise UserError(f"{shown(file)}, line {number}: {shown(line[:80])}: expected {_LINE}")
    if problem := name_problem(name):
        raise UserError(f"{shown(file)}, line {number}: the name {name!a} {problem}; change it")
    if not values:
        return name, None
    red, green, blue = values
    return name, (red, green, blue)


def places(
    root: str | None, image_dir: str | None, label_dir: str | None, classes_file: str | None
) -> PairFolders:
    """The folders that the keys of the recipe name; UserError if they name too few.

    Also if data.root is no folder, where a part is looked for in it.
    """
    keys = {"images": image_dir, "labels": label_dir, "classes.txt": classes_file}
    found: list[Path] = []
    for name, given in keys.items():
        if given is None and not root:
            raise UserError(
                "data.name=pairs needs data.root with images/, labels/ and classes.txt in it, or "
                "data.image_dir, data.label_dir and data.classes_file"
            )
        if given is None and not Path(os.path.expanduser(str(root))).is_dir():
            raise UserError(
                f"data.name=pairs: data.root={shown(str(root))} is not a folder; expected images/, "
                f"labels/ and classes.txt in it"
            )
        place = given if given is not None else os.path.join(str(root), name)
        found.append(Path(os.path.expanduser(place)))
    return PairFolders(*found)
