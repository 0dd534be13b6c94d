"""Which image belongs to which label map: files of two folders, matched by a key."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastkd.data.sources.tree import is_system
from fastkd.errors import UserError
from fastkd.printable import few, shown

__all__ = ["Files", "files_below", "paired"]

Files = tuple[Path, Sequence[str]]
"""A folder, and names of files below it."""


def files_below(folder: Path, ending: str = "") -> list[str]:
    """Names below a folder, folder by folder in sorted order; hidden ones are left out.

    OSError: it is not there or cannot be read.
    """
    found: list[str] = []
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(place)
        if real in seen:  # a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_system(name))
        below = os.path.relpath(place, folder)
        found += [
            os.path.normpath(os.path.join(below, name))
            for name in sorted(names)
            if name.endswith(ending) and not is_system(name)
        ]
    return found


def paired(
    name: str,
    folder: Path,
    images: Mapping[str, str],
    map_folder: Path,
    maps: Mapping[str, str],
    expected: Sequence[str] = (),
) -> tuple[Files, Files]:
    """Images and label maps of the same keys, in the order of the images.

    images, maps: key -> name below the folder. expected: keys that both must have.

    Raises:
        UserError: there is none, or one lacks its partner.
    """
    without_map = [images[key] for key in images if key not in maps]
    without_image = [maps[key] for key in maps if key not in images]
    lost = [key for key in expected if key not in images and key not in maps]
    said = [
        f"{len(files)} {_plural(what, files)} in {shown(place)} without {lacking} in "
        f"{shown(other)} ({few(files)})"
        for files, what, place, lacking, other in (
            (without_map, "image", folder, "a label map", map_folder),
            (without_image, "label map", map_folder, "an image", folder),
        )
        if files
    ]
    if lost:
        said.append(f"neither image nor label map for {len(lost)} listed names ({few(lost)})")
    if said:
        raise UserError(
            f"{name}: found {' and '.join(said)}; add what is missing, or remove these files"
        )
    if not images:
        raise UserError(
            f"{name}: {shown(folder)} has no images with label maps in {shown(map_folder)}"
        )
    return (folder, list(images.values())), (map_folder, [maps[key] for key in images])


def _plural(what: str, files: Sequence[str]) -> str:
    return what if len(files) == 1 else f"{what}s"
