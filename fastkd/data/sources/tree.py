"""Which files of a folder tree are images, and of which class: each file once, under its own class.

    left out, unsaid        names that begin with a dot, and what systems leave behind (`Thumbs.db`,
                            `@eaDir/`, `__MACOSX/`, ..), at every depth
    left out and counted    other extensions than those in `formats`; pipes, sockets and devices;
                            links to what is listed anyway
Folders inside a class belong to the class, and links are followed. A file that lies in a class
folder belongs to that class, whoever links to it. A link to a folder that contains the split is a
loop. Two hard links are two files, as two copies would be.
"""

import os
import stat
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastkd.data.sources.formats import EXTENSIONS, suffix
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["Found", "find_images", "is_system"]

_SYSTEM = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    }
)

_Id = tuple[int, int]
"""Device and inode of a file or folder."""
# Left out for another reason than the name's extension; no extension looks like these.
_REPEATED, _SPECIAL, _OUTSIDE = "links", "special", "outside"


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or was left behind by a system or a viewer."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return suffix(name) in EXTENSIONS


@dataclass
class Found:
    """The images of a split, by class, and what was left out."""

    images: list[list[tuple[str, os.stat_result]]]
    """(path, stat) by class, folder by folder in sorted order."""
    left_out: Counter[str] = field(default_factory=Counter[str])
    """How many files, by their extension or by the reason."""

    def remark(self) -> str | None:
        """What was left out, as the end of a sentence that begins with the split's name."""
        said: list[str] = []
        by_name = sorted((-n, name) for name, n in self.left_out.items() if name not in _REASONS)
        if by_name:
            listed = [f"{shown(name) or 'no extension'} {-n}" for n, name in by_name]
            number = -sum(n for n, _ in by_name)
            what = "files without an image extension"
            if number == 1:
                what = "file without an image extension"
            said.append(f"{number} {what} ({', '.join(listed[:5] + ['..'] * (len(listed) > 5))})")
        for reason, (one, several) in _REASONS.items():
            if number := self.left_out[reason]:
                said.append(f"{number} {one if number == 1 else several}")
        return f"leaves out {', '.join(said)}" if said else None


_REASONS = {
    _REPEATED: ("link to what is listed anyway", "links to what is listed anyway"),
    _SPECIAL: ("pipe, socket or device", "pipes, sockets or devices"),
    _OUTSIDE: ("image beside the class folders", "images beside the class folders"),
}


def find_images(folder: Path, classes: Sequence[str], *, broken_links: bool = False) -> Found:
    """List the images of the class folders `classes` in the folder of a split.

    broken_links: list links that lead nowhere, with what stat says of the link itself.

    Raises:
        OSError: something cannot be read.
        UserError: links show the same file as two classes.
    """
    walk = _Walk(folder, len(classes), broken_links=broken_links)
    places = [(label, os.path.join(folder, name)) for label, name in enumerate(classes)]
    for label, place in places:
        if not os.path.islink(place):
            walk.enter(label, place, own=True)
    for label, place in places:
        if os.path.islink(place):
            walk.enter(label, place, own=True)
    walk.follow()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image(entry.name) and not is_system(entry.name) and not entry.is_dir():
                walk.found.left_out[_OUTSIDE] += 1
    for images in walk.found.images:
        images.sort(key=lambda found: os.path.split(found[0]))
    return walk.found


class _Walk:
    """What was seen so far. Links are kept for later: what lies in a class folder comes first."""

    def __init__(self, folder: Path, classes: int, *, broken_links: bool) -> None:
        self.found = Found([[] for _ in range(classes)])
        self._broken_links = broken_links
        real = Path(os.path.realpath(folder))
        self._around = {_id(os.stat(place)) for place in (real, *real.parents)}
        # Folder -> its class, its path, and whether it lies in its class or is only linked to.
        self._folders: dict[_Id, tuple[int, str, bool]] = {}
        self._folder_links: deque[tuple[int, str]] = deque()
        self._file_links: list[tuple[int, str]] = []

    def enter(self, label: int, top: str, *, own: bool) -> None:
        """Take what lies below a folder; links inside are only written down."""
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            if not self._is_new(label, folder, own=own):
                self.found.left_out[_REPEATED] += 1
                continue
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not is_system(entry.name):
                        waiting += self._sort_in(label, entry)

    def follow(self) -> None:
        """Take what the links lead to, as far as it is not listed."""
        while self._folder_links:
            label, link = self._folder_links.popleft()
            self.enter(label, link, own=False)
        listed: dict[_Id, tuple[int, str, bool]] = {}
        if self._file_links:
            for label, images in enumerate(self.found.images):
                listed |= {_id(status): (label, path, True) for path, status in images}
        for label, link in self._file_links:
            if self._broken_links and not os.path.exists(link):
                self.found.images[label].append((link, os.lstat(link)))
                continue
            status = os.stat(link)
            if not stat.S_ISREG(status.st_mode):
                self.found.left_out[_SPECIAL] += 1
            elif _is_first(listed, status, (label, link, False)):
                self.found.images[label].append((link, status))
            else:
                self.found.left_out[_REPEATED] += 1

    def _is_new(self, label: int, folder: str, *, own: bool) -> bool:
        status = os.stat(folder)
        loops = _id(status) in self._around
        return not loops and _is_first(self._folders, status, (label, folder, own))

    def _sort_in(self, label: int, entry: os.DirEntry[str]) -> list[str]:
        """Put an entry of a class into its list; a folder is returned."""
        linked = entry.is_symlink()
        if os.path.isdir(entry.path) if linked else entry.is_dir():
            if not linked:
                return [entry.path]
            self._folder_links.append((label, entry.path))
        elif not is_image(entry.name):
            self.found.left_out[suffix(entry.name)] += 1
        elif linked:
            self._file_links.append((label, entry.path))
        elif stat.S_ISREG((status := entry.stat()).st_mode):
            self.found.images[label].append((entry.path, status))
        else:
            self.found.left_out[_SPECIAL] += 1
        return []


def _id(status: os.stat_result) -> _Id:
    return status.st_dev, status.st_ino


def _is_first(
    seen: dict[_Id, tuple[int, str, bool]],
    status: os.stat_result,
    here: tuple[int, str, bool],
) -> bool:
    """Note what was reached as (class, path, lies there); False if it is known already."""
    before = seen.setdefault(_id(status), here)
    if before is here:
        return True
    if before[0] != here[0] and not before[2]:
        raise UserError(
            f"{shown(before[1])} and {shown(here[1])} lead to the same images, which would "
            "have two classes; remove one of the two links"
        )
    return False
