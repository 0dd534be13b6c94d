"""The classes of a finished network against those of the data: alike, mapped by name, or refused.

`fastkd.teachers.loading` and `fastkd eval` ask here before any image is shown.
"""

import re

from fastkd.errors import UserError
from fastkd.printable import few
from fastkd.storage.facts import DataFacts

__all__ = ["map_by_name", "other_order_in_timm"]


def map_by_name(
    theirs: DataFacts | None, ours: tuple[str, ...] | None, *, network: str, cure: str
) -> tuple[int, ...] | None:
    """The network's output for every class of the data; None if the orders agree.

    None also where either has no names, such as a weight file of another program: nothing can be
    compared then. network, cure: for the message.

    Raises:
        UserError: the network does not know all classes of the data by their names.
    """
    if theirs is None or theirs.classes is None or ours is None or theirs.classes == ours:
        return None
    known = {name: output for output, name in enumerate(theirs.classes)}
    if all(name in known for name in ours):
        return tuple(known[name] for name in ours)
    if theirs.named is None or DataFacts(classes=ours).named is None:
        return None
    unknown = [name for name in ours if name not in known]
    others = [name for name in theirs.classes if name not in ours]
    raise UserError(
        f"{network} learned other classes: it does not know {few(unknown)} of the data's "
        f"{len(ours)}, and of its own {len(theirs.classes)} the data lack {few(others)}. "
        f"{cure}"
    )


def other_order_in_timm(classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """A class's place in timm's order, for each class; None if it is the same order.

    timm sorts class folders by the numbers in them and without regard to case (1, 2, 10, as in its
    natural_key), fastkd and torchvision letter by letter (1, 10, 2).
    """
    places = {name: place for place, name in enumerate(sorted(classes, key=_natural))}
    found = tuple(places[name] for name in classes)
    return None if found == tuple(range(len(classes))) else found


def _natural(name: str) -> list[tuple[int, str]]:
    # Every second piece is a number.
    pieces = re.split(r"(\d+)", name.lower())
    return [
        (int(piece[:4000]), "") if place % 2 else (0, piece) for place, piece in enumerate(pieces)
    ]
