"""Small sets with label maps, in the layouts of their releases."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# cityscapesscripts/helpers/labels.py: id -> trainId of all 34, and the colours of the classes.
CITYSCAPES_TRAIN_IDS = (
    (0, 255),
    (1, 255),
    (2, 255),
    (3, 255),
    (4, 255),
    (5, 255),
    (6, 255),
    (7, 0),
    (8, 1),
    (9, 255),
    (10, 255),
    (11, 2),
    (12, 3),
    (13, 4),
    (14, 255),
    (15, 255),
    (16, 255),
    (17, 5),
    (18, 255),
    (19, 6),
    (20, 7),
    (21, 8),
    (22, 9),
    (23, 10),
    (24, 11),
    (25, 12),
    (26, 13),
    (27, 14),
    (28, 15),
    (29, 255),
    (30, 255),
    (31, 16),
    (32, 17),
    (33, 18),
)


def picture(file: Path, size: tuple[int, int], number: int = 0) -> None:
    """Noise of a width and height."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def label_map(
    file: Path,
    size: tuple[int, int],
    numbers: Sequence[int],
    seed: int = 0,
    *,
    palette: bool = False,
) -> np.ndarray:
    """Random numbers of these, uint8 [H, W], as grey or with a palette."""
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(seed).integers(0, len(numbers), (size[1], size[0]))
    labels_HW = np.array(numbers, np.uint8)[chosen]
    image = Image.fromarray(labels_HW)
    if palette:
        image.putpalette([(7 * n) % 256 for n in range(768)])
    image.save(file)
    return labels_HW


def make_camvid(
    root: Path,
    sizes: Sequence[tuple[int, int]] = ((40, 30),) * 6,
    val_sizes: Sequence[tuple[int, int]] = ((40, 30),) * 3,
) -> Path:
    """The 11 classes and 11 for none, split by split."""
    for split, each in (("train", sizes), ("val", val_sizes)):
        for number, size in enumerate(each):
            place, seed = root / split, number + 100 * (split == "val")
            picture(place / "images" / f"{number:03d}.png", size, seed)
            label_map(place / "labels" / f"{number:03d}.png", size, range(12), seed)
    return root


def make_cityscapes(root: Path, size: tuple[int, int] = (32, 16), per_city: int = 2) -> Path:
    """Two cities a split; all 34 numbers occur in each label map."""
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau", "munster"))):
        for city in cities:
            for number in range(per_city):
                stem = f"{city}/{city}_{number:06d}_000019"
                seed = number + len(city)
                picture(root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", size, seed)
                of_maps = root / "gtFine" / split
                rows = np.resize(np.arange(34, dtype=np.uint8), (size[1], size[0]))
                Image.fromarray(rows).save(_made(of_maps / f"{stem}_gtFine_labelIds.png"))
                # What else the release has.
                Image.fromarray(rows).save(of_maps / f"{stem}_gtFine_instanceIds.png")
                (of_maps / f"{stem}_gtFine_polygons.json").write_text("{}")
    return root


def make_voc(root: Path, train: int = 3, val: int = 2) -> Path:
    """Palette PNGs, pictures of several sizes, images without a label map beside them."""
    place = root / "VOCdevkit" / "VOC2012"
    lists = place / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    number = 0
    for split, count in (("train", train), ("val", val)):
        names = [f"2007_{number + n:06d}" for n in range(count)]
        for name in names:
            number += 1
            size = (30 + 2 * number, 24)
            picture(place / "JPEGImages" / f"{name}.jpg", size, number)
            numbers = [*range(21), 255]
            label_map(
                place / "SegmentationClass" / f"{name}.png", size, numbers, number, palette=True
            )
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    picture(place / "JPEGImages" / "2008_000001.jpg", (20, 20))
    return root


def make_pairs(
    root: Path,
    *,
    splits: Sequence[str] = ("train", "val"),
    classes: str = "sky\nroad\ncar\n",
    numbers: Sequence[int] = (0, 1, 2, 255),
    each: int = 4,
    size: tuple[int, int] = (24, 20),
) -> Path:
    """images/, labels/ and classes.txt; splits=(): no folders of splits."""
    for split in splits or ("",):
        for number in range(each):
            seed = number + 50 * (split == "val")
            picture(root / "images" / split / f"{number}.jpg", size, seed)
            label_map(root / "labels" / split / f"{number}.png", size, numbers, seed)
    (root / "classes.txt").write_text(classes)
    return root


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
