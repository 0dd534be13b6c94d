"""Folders of images: the files of each class and what their pixels become, or a refusal."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from generated_case import Case, refused
from PIL import Image

from fastkd.data import FolderIndex, open_source

__all__ = ["make"]

SIDE = 6
CLASSES = ("cat", "dog", "10", "2", "Zebra", "ärger", "漢字", "with space", "a#b", "x=y,z", "-dash")
NAMES = ("0", "1", "b", "ünder", "with space", "a,b", "c#d", "{e}", "a.b.c", "-f", "漢")
SYSTEM = (".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-0", "lost+found")
LEFT_OUT = ("notes.txt", "labels.csv", "README", "drawing.svg", "page.html", "plot.eps", "a.pdf")
HIDDEN = (".DS_Store", "._0.png", "Thumbs.db", ".hidden.jpg", "desktop.ini")
# What is written in an image file's place, and a word of the refusal.
BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "html": b"<!DOCTYPE html><html></html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "head of a png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
}


def make(rng: random.Random, folder: Path) -> Case:
    """A data set of two to four classes with what may lie in it."""
    classes = sorted(rng.sample(CLASSES, rng.randint(2, 4)))
    split_names = ("train", rng.choice(("val", "test")))
    listings = {}
    for split in split_names:
        listings[split] = {name: _fill(rng, folder / split / name) for name in classes}
        _scatter(rng, folder / split, classes)
    about = f"open_source('folder', {str(folder)!r}, ..) of {sorted(_files(folder))}"
    broken = rng.choice(list(BROKEN)) if rng.random() < 0.15 else None
    split = rng.choice(("train", "val"))
    wanted = listings[split_names[split == "val"]]
    if broken is not None:
        return _with_a_broken_file(rng, folder, split, wanted, broken, about)
    if rng.random() < 0.1:
        return _with_an_empty_class(rng, folder, split_names, split, about)
    return Case(about, lambda: _read(folder, split), (tuple(classes), wanted))


def _read(folder: Path, split: str) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    index = open_source("folder", folder, split)
    assert isinstance(index, FolderIndex)
    found: dict[str, dict[str, Any]] = {name: {} for name in index.classes}
    for sample, label in enumerate(index.labels_N):
        name = index.classes[label]
        place = os.path.relpath(index.path(sample), index.folder)
        assert place not in found[name], f"{place} is listed twice"
        found[name][place.partition(os.sep)[2]] = np.asarray(index.image(sample))[0, 0]
    return index.classes, found


def _fill(rng: random.Random, place: Path) -> dict[str, Any]:
    """Write images into a class folder; name -> the RGB of its first pixel."""
    wanted: dict[str, Any] = {}
    for name in rng.sample(NAMES, rng.randint(1, 3)):
        inside = rng.choice(("", "", "", "deep", "deep/er", "folder.png"))
        extension, pixel = _write(rng, place / inside, name)
        wanted[os.path.join(inside, name + extension)] = pixel
    return wanted


def _write(rng: random.Random, place: Path, name: str) -> tuple[str, Any]:
    """One image of one colour; its extension and the 8-bit RGB that it is read as."""
    place.mkdir(parents=True, exist_ok=True)
    level, colour = rng.randrange(256), tuple(rng.randrange(256) for _ in range(3))
    deep = rng.randrange(1 << 16)
    size = (SIDE, SIDE)
    kinds: dict[str, tuple[str, Image.Image, Any]] = {
        "grey": (".png", Image.new("L", size, level), (level,) * 3),
        "colour": (".bmp", Image.new("RGB", size, colour), colour),
        "alpha": (".png", Image.new("RGBA", size, (*colour, level)), colour),
        "grey and alpha": (".png", Image.new("LA", size, (level, 7)), (level,) * 3),
        "one bit": (".png", Image.new("1", size, level & 1), (255 * (level & 1),) * 3),
        "sixteen bits": (
            ".png",
            Image.fromarray(np.full(size, deep, np.uint16)),
            (deep >> 8,) * 3,
        ),
        "sixteen bits, TIFF": (
            ".tif",
            Image.fromarray(np.full(size, deep, np.uint16)),
            (deep >> 8,) * 3,
        ),
        "palette": (".gif", Image.new("RGB", size, colour).quantize(4), None),
        "lossless": (".webp", Image.new("RGB", size, colour), colour),
        "upper case": (".PNG", Image.new("RGB", size, colour), colour),
        "netpbm": (".ppm", Image.new("RGB", size, colour), colour),
        "CMYK": (".tiff", Image.new("CMYK", size, (*colour, 0)), tuple(255 - c for c in colour)),
    }
    extension, image, pixel = kinds[rng.choice(list(kinds))]
    options = {"lossless": True} if extension == ".webp" else {}
    path = place / (name + extension)
    image.save(path, **options)
    if pixel is None:
        pixel = image.convert("RGB").getpixel((0, 0))
    return extension, np.array(pixel, dtype=np.uint8)


def _scatter(rng: random.Random, split: Path, classes: list[str]) -> None:
    """Things that are not images of a class, anywhere."""
    places = [split, *(split / name for name in classes)]
    for _ in range(rng.randint(0, 4)):
        place = rng.choice(places)
        what = rng.randrange(6)
        if what == 0:
            hidden = place / rng.choice(SYSTEM)
            hidden.mkdir(exist_ok=True)
            Image.new("L", (SIDE, SIDE)).save(hidden / "a.png")
        elif what == 1:
            (place / rng.choice(HIDDEN)).write_bytes(b"x")
        elif what == 2:
            (place / rng.choice(LEFT_OUT)).write_bytes(b"x")
        elif what == 3 and place != split:
            _link(place / "loop", split)
        elif what == 4 and place != split:
            images = [path for path in place.rglob("*.*") if path.is_file() and _shown(path)]
            if images:
                target = rng.choice(images)
                _link(place / f"again{target.suffix}", target)
        elif what == 5 and place != split and not (place / "pipe.png").exists():
            os.mkfifo(place / "pipe.png")


def _shown(path: Path) -> bool:
    hidden = (*SYSTEM, *HIDDEN)
    return path.suffix.lower() in (".png", ".bmp") and not any(p in hidden for p in path.parts)


def _link(link: Path, target: Path) -> None:
    if not link.exists() and not link.is_symlink():
        link.symlink_to(target)


def _with_a_broken_file(
    rng: random.Random, folder: Path, split: str, wanted: dict[str, Any], kind: str, about: str
) -> Case:
    name = rng.choice(sorted(wanted))
    path = folder / split / name / "broken.png"
    if not path.parent.exists():
        path = folder / "test" / name / "broken.png"
    path.write_bytes(BROKEN[kind])
    what = f"{about} and {path} ({kind})"
    return Case(what, lambda: _read(folder, split), refused("broken.png"))


def _with_an_empty_class(
    rng: random.Random, folder: Path, split_names: tuple[str, ...], split: str, about: str
) -> Case:
    for part in split_names:
        (folder / part / "nothing here").mkdir()
    what = f"{about} and an empty class"
    return Case(what, lambda: _read(folder, split), refused("nothing here"))


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]
