"""Data sets in the layout of their release, where lists and not folders say what an image shows.

`tiny_imagenet` (Le & Yang 2015), `voc2007` for classification (Everingham et al. 2007), `cub200`
(CUB-200-2011, Wah et al. 2011) and `birdsnap` (Berg et al. 2014). The splits are those of the
release: Tiny ImageNet's val, VOC's trainval and test, CUB's and Birdsnap's test images.

Canonical order: that of the lists.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from fastkd.data.batch import IGNORED
from fastkd.data.sources.class_names import class_folders, name_problem
from fastkd.data.sources.folder import FolderIndex, index_files, label_facts
from fastkd.data.sources.pixels import DEFAULTS, Decoding
from fastkd.data.sources.tree import is_image, is_system
from fastkd.errors import UserError
from fastkd.printable import few, shown

__all__ = ["LAYOUTS", "VOC_CLASSES", "Layout", "find_release"]

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

_VOC_LABELS = {name: place for place, name in enumerate(VOC_CLASSES)}


class Listed(NamedTuple):
    """What the lists of a release say of a split."""

    files: list[str]
    """Below the folder of the release."""
    labels_N: np.ndarray
    """int64; of images with several labels float32 [N, C], as in `fastkd.data.batch.Batch`."""
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How a set is released."""

    folder: str
    """What its archive unpacks to."""
    classes: int
    """Of the whole set; checked where a copy sorted into folders says nothing else of itself."""
    lists: tuple[str, ...]
    """Files and folders by which it is known."""
    read: Callable[[Path, str], Listed]
    """The lists of "train" or "val"; OSError, UserError."""
    several_labels: bool = False
    """An image may show several classes, so that no folders could hold them."""
    has_gaps: bool = False
    """Images were fetched from where they were published, and some are gone."""


def find_release(
    name: str, root: Path, split: str, decoding: Decoding = DEFAULTS
) -> FolderIndex | None:
    """The images of a split, from the release in `root` or below it; None: there is none.

    Raises:
        OSError: something cannot be read.
        UserError: a list that is damaged, or names an image that is not there.
    """
    layout = LAYOUTS[name]
    for folder in (root, root / layout.folder, root / layout.folder.split("/")[-1]):
        if all((folder / part).exists() for part in layout.lists):
            return _index(name, folder, split, layout, decoding)
    return None


def _index(name: str, folder: Path, split: str, layout: Layout, decoding: Decoding) -> FolderIndex:
    files, labels_N, classes = layout.read(folder, split)
    _check(name, folder, split, files, classes)
    states: list[os.stat_result] = []
    here: list[int] = []
    gone: list[str] = []
    for place, file in enumerate(files):
        try:
            state = os.stat(folder / file)
        except FileNotFoundError:
            gone.append(file)
            continue
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{name}: {shown(folder / file)} is listed as an image and is no file")
        states.append(state)
        here.append(place)
    if not here or (gone and not layout.has_gaps):
        advice = "fetch them with its program" if layout.has_gaps else "unpack it again"
        raise UserError(
            f"{name}: {shown(folder)} lists {len(files)} images for {split}, and {len(gone)} of "
            f"them are not there ({few(gone)}); {advice}"
        )
    remarks = [f"lists {len(files)} images, {len(gone)} of which are not there"] if gone else []
    entries = [
        (os.fsencode(files[place]), state) for place, state in zip(here, states, strict=True)
    ]
    labels_N = labels_N[here]
    index = index_files(name, split, folder, entries, labels_N, classes, decoding, remarks)
    # Names of files say nothing of their labels here.
    return index.marked(label_facts(labels_N, classes))


def _check(
    name: str, folder: Path, split: str, files: Sequence[str], classes: Sequence[str]
) -> None:
    """Refuse lists that would give a file two labels, a class two names, or reach outside."""
    if not files:
        raise UserError(f"{name}: the lists in {shown(folder)} have no image for {split}")
    for what, words in (("class", classes), ("image", files)):
        if again := _repeated(words):
            raise UserError(
                f"{name}: the lists in {shown(folder)} name the {what} {shown(again)} twice; "
                "unpack it again"
            )
    for one in classes:
        if problem := name_problem(one):
            raise UserError(f"{name}: the name of the class {one!a} {problem}; unpack it again")
    for file in files:
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise UserError(
                f"{name}: the lists in {shown(folder)} name {shown(file)}, which leads out of the "
                "set; expected files below it"
            )


def _repeated(words: Iterable[str]) -> str | None:
    """The first word that is there a second time."""
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return word
        seen.add(word)
    return None


def _rows(file: Path, fields: int, separator: str | None = None) -> Iterator[list[str]]:
    """The lines of a list in fields, empty ones left out; UserError for one of too few.

    With spaces as separators the last field is the rest of the line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except FileNotFoundError as error:
        raise UserError(f"{shown(file)} is not there; unpack the set again") from error
    if "\0" in text:
        raise UserError(f"{shown(file)} is not UTF-8 text; unpack it again")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        cells = line.strip().split(None, fields - 1) if separator is None else line.split(separator)
        if len(cells) < fields:
            raise UserError(
                f"{shown(file)}, line {number}: {shown(line[:80])} has too few fields "
                f"({len(cells)}), expected {fields}; unpack it again"
            )
        yield [cell.strip() for cell in cells]


def _by_id(file: Path) -> dict[str, str]:
    """A list of ids, each with a value; UserError for an id that is there twice."""
    rows = list(_rows(file, 2))
    if again := _repeated(number for number, _ in rows):
        raise UserError(f"{shown(file)} names {shown(again)} twice; unpack it again")
    return dict(rows)


def _table(file: Path, *columns: str) -> list[list[str]]:
    """These columns of a table with tabs, whose first line names them; UserError for a row that is
    there twice by its first column."""
    head, *rows = [*_rows(file, 1, "\t")] or [[]]
    if missing := [column for column in columns if column not in head]:
        raise UserError(
            f"{shown(file)}: the first line names {few(head)}, expected also {few(missing)}; "
            "unpack it again"
        )
    places = [head.index(column) for column in columns]
    for row in rows:
        if len(row) <= max(places):
            raise UserError(f"{shown(file)}: {shown(row[0][:80])} lacks fields; unpack it again")
    if again := _repeated(row[places[0]] for row in rows):
        raise UserError(f"{shown(file)} names {shown(again)} twice; unpack it again")
    return [[row[place] for place in places] for row in rows]


def _pick(file: Path, key: str, among: Mapping[str, int]) -> int:
    """The label of a key, of a list that must name only known ones."""
    if key not in among:
        raise UserError(
            f"{shown(file)} names {shown(key[:80])}, which is no class; unpack it again"
        )
    return among[key]


def _labels(labels: Sequence[int]) -> np.ndarray:
    return np.array(labels, dtype=np.int64)


def _tiny_imagenet(folder: Path, split: str) -> Listed:
    """train/WNID/images/*.JPEG; val/images/*.JPEG with their classes in val_annotations.txt.

    A widespread script sorts the latter into val/WNID/images/ and leaves the list.
    """
    classes = tuple(sorted(row[0] for row in _rows(folder / "wnids.txt", 1)))
    label = {wnid: place for place, wnid in enumerate(classes)}
    if split == "val":
        annotations = folder / "val" / "val_annotations.txt"
        rows = [row[:2] for row in _rows(annotations, 2, "\t")]
        labels = [_pick(annotations, wnid, label) for _, wnid in rows]
        places = ("val/images/{0}", "val/{1}/images/{0}", "val/{1}/{0}")
        form = next((one for one in places if (folder / one.format(*rows[0])).exists()), places[0])
        return Listed([form.format(*row) for row in rows], _labels(labels), classes)
    strange = sorted(set(class_folders(folder / "train")) - set(classes))
    if strange:
        raise UserError(
            f"{shown(folder / 'train')} has folders that wnids.txt does not name ({few(strange)}); "
            "unpack it again"
        )
    files: list[str] = []
    labels = []
    for wnid in classes:
        inside = f"train/{wnid}/images"
        names = sorted(
            entry.name
            for entry in os.scandir(folder / inside)
            if is_image(entry.name) and not is_system(entry.name)
        )
        if not names:
            raise UserError(f"{shown(folder / inside)} holds no image; unpack it again")
        files += [f"{inside}/{name}" for name in names]
        labels += [label[wnid]] * len(names)
    return Listed(files, _labels(labels), classes)


def _voc2007(folder: Path, split: str) -> Listed:
    """Images and classes of their objects. A class all of whose objects are difficult is unknown,
    as in the released lists of the classification task."""
    images = folder / "ImageSets" / "Main" / ("trainval.txt" if split == "train" else "test.txt")
    names = [row[0] for row in _rows(images, 1)]
    rows = [_objects(folder / "Annotations" / f"{name}.xml", images) for name in names]
    labels_NC = np.array(rows, dtype=np.float32).reshape(-1, len(VOC_CLASSES))
    return Listed([f"JPEGImages/{name}.jpg" for name in names], labels_NC, VOC_CLASSES)


def _objects(file: Path, images: Path) -> list[float]:
    """The labels of an image, which `images` lists: 1 present, 0 absent, IGNORED unknown."""
    if file.parent.name != "Annotations":
        raise UserError(f"{shown(images)} names {shown(file)}; expected an image id such as 000005")
    try:
        root = ElementTree.parse(file).getroot()
    except FileNotFoundError as error:
        raise UserError(
            f"{shown(images)} lists {file.stem}, and {shown(file)} is not there; unpack it again, "
            "trainval and test"
        ) from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{shown(file)} is no XML ({error}); unpack it again") from error
    objects = root.findall("object") if root.tag == "annotation" else []
    if not objects:
        raise UserError(
            f"{shown(file)} is no annotation with objects, which every image of VOC has; unpack it "
            "again"
        )
    labels = [0.0] * len(VOC_CLASSES)
    for one in objects:
        place = _pick(file, (one.findtext("name") or "").strip(), _VOC_LABELS)
        difficult = (one.findtext("difficult") or "").strip()
        if difficult not in ("0", "1"):
            raise UserError(
                f"{shown(file)}: difficult is {shown(difficult)}, expected 0 or 1; unpack it again"
            )
        if difficult == "0":
            labels[place] = 1.0
        elif labels[place] == 0.0:
            labels[place] = IGNORED
    return labels


def _cub200(folder: Path, split: str) -> Listed:
    """images.txt, image_class_labels.txt and train_test_split.txt by image id."""
    class_of = _by_id(folder / "classes.txt")
    place = {number: label for label, number in enumerate(class_of)}
    images = _by_id(folder / "images.txt")
    labelled, trained = (
        folder / f"{one}.txt" for one in ("image_class_labels", "train_test_split")
    )
    class_ids, parts = _by_id(labelled), _by_id(trained)
    for file, ids in ((labelled, class_ids), (trained, parts)):
        if lost := sorted(set(images) ^ set(ids)):
            raise UserError(
                f"{shown(file)} and images.txt do not name the same images: {few(lost)}; unpack "
                "them again"
            )
    if wrong := sorted(set(parts.values()) - {"0", "1"}):
        raise UserError(f"{shown(trained)}: {few(wrong)}, expected 1 (train) or 0; unpack it again")
    chosen = [number for number in images if (parts[number] == "1") == (split == "train")]
    labels = [_pick(labelled, class_ids[number], place) for number in chosen]
    files = [f"images/{images[number]}" for number in chosen]
    return Listed(files, _labels(labels), tuple(class_of.values()))


def _birdsnap(folder: Path, split: str) -> Listed:
    """species.txt, images.txt and test_images.txt; the release's program fetches the images."""
    species = {number: name for number, name in _table(folder / "species.txt", "id", "dir")}
    place = {number: label for label, number in enumerate(species)}
    rows = _table(folder / "images.txt", "path", "species_id")
    tests = folder / "test_images.txt"
    tested = {path for (path,) in _table(tests, "path")}
    lost = sorted(tested - {path for path, _ in rows})
    if lost or not tested:
        what = f"names {few(lost)}, which images.txt does not" if lost else "names no image"
        raise UserError(f"{shown(tests)} {what}; unpack it again")
    chosen = [row for row in rows if (row[0] in tested) == (split == "val")]
    labels = [_pick(folder / "images.txt", number, place) for _, number in chosen]
    files = [f"download/images/{path}" for path, _ in chosen]
    return Listed(files, _labels(labels), tuple(species.values()))


LAYOUTS: dict[str, Layout] = {
    "tiny_imagenet": Layout(
        "tiny-imagenet-200", 200, ("wnids.txt", "val/val_annotations.txt"), _tiny_imagenet
    ),
    "voc2007": Layout(
        "VOCdevkit/VOC2007", 20, ("ImageSets/Main", "Annotations"), _voc2007, several_labels=True
    ),
    "cub200": Layout("CUB_200_2011", 200, ("images.txt", "train_test_split.txt"), _cub200),
    "birdsnap": Layout(
        "birdsnap", 500, ("images.txt", "test_images.txt"), _birdsnap, has_gaps=True
    ),
}
