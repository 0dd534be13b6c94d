"""Class folders and the names of the classes: equal names may be spelled in different bytes.

macOS stores accents as characters of their own (NFD), other systems do not (NFC). Names are
compared and kept as NFC, so a split that was packed elsewhere has the same classes.
"""

import os
import unicodedata
from collections import defaultdict
from pathlib import Path

from fastkd.data.sources.tree import is_system
from fastkd.errors import UserError
from fastkd.printable import few, shown

__all__ = ["check_classes", "class_folders", "lookalikes", "name_problem"]

_CONTROL = "Cc"
# Zero-width characters and spaces of all kinds.
_UNSEEN = ("Cf", "Zs")
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)


def class_folders(folder: Path) -> dict[str, str]:
    """Class names -> names of their folders, in the order of the folders' names.

    Raises:
        OSError: the folder cannot be read.
        UserError: there is none, or one has a name that no file of a run could hold.
    """
    real = Path(os.path.realpath(folder))
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if not is_system(entry.name)
            and entry.is_dir()
            # A link to a folder around this one is a loop, not a class.
            and not (entry.is_symlink() and real.is_relative_to(os.path.realpath(entry.path)))
        )
    if not names:
        raise UserError(
            f"{shown(folder)} has no class folders; expected {shown(folder)}/CLASS/IMAGE, one "
            "folder per class"
        )
    found: dict[str, str] = {}
    for name in names:
        _check_name(folder, name)
        spelled = unicodedata.normalize("NFC", name)
        if spelled in found:
            raise UserError(
                f"{shown(folder)} has two class folders of one name, {shown(spelled)}, spelled in "
                f"different bytes ({found[spelled]!a} and {name!a}); merge or rename them"
            )
        found[spelled] = name
    return found


def check_classes(train: Path, val: Path) -> None:
    """Refuse a validation split with classes that are not in training; it may lack some.

    Raises:
        OSError, UserError: as `class_folders`; the message lists what only one of them has.
    """
    of_train, of_val = set(class_folders(train)), set(class_folders(val))
    only_train, only_val = sorted(of_train - of_val), sorted(of_val - of_train)
    if not only_val:
        return
    message = (
        f"{shown(train)} and {shown(val)} do not hold the same classes: only in {train.name}: "
        f"{few(only_train)}; only in {val.name}: {few(only_val)}"
    )
    pairs = [(a, b) for a in only_train for b in only_val if _seen(a) == _seen(b)]
    if pairs:
        first, second = map(ascii, pairs[0])
        message += f". {first} and {second} differ only in case or in characters one cannot see"
    raise UserError(message)


def lookalikes(names: tuple[str, ...]) -> str | None:
    """A sentence on classes whose names a reader would take for the same."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_seen(name)].append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return None
    listed = ", ".join(" and ".join(map(ascii, group)) for group in alike[:5])
    more = f" and {len(alike) - 5} more" if len(alike) > 5 else ""
    return f"has classes that differ only in case or unseen characters: {listed}{more}"


def _check_name(folder: Path, name: str) -> None:
    if problem := name_problem(name):
        raise UserError(
            f"the name of the class folder {name!a} in {shown(folder)} {problem}; rename it"
        )


def name_problem(name: str) -> str | None:
    """Why no file of a run could hold this name of a class, or None."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if any(unicodedata.category(letter) == _CONTROL for letter in name):
        return "has control characters"
    return None


def _seen(name: str) -> str:
    """What is left of a name for a reader who overlooks case and spaces."""
    return "".join(
        letter
        for letter in unicodedata.normalize("NFC", name).casefold()
        if unicodedata.category(letter) not in _UNSEEN and ord(letter) not in _VARIATION_SELECTORS
    )
