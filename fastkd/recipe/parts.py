"""The trainings that a recipe is made of, as the names of their recipes say.

Flow: `schema` names the recipe of every part so; run folders, messages and trackers read it.
"""

from typing import Literal

__all__ = ["ALONE", "ENCODER", "TEACHES", "Part", "part_of"]

Part = Literal["teacher", "encoder", "alone", "student"]

TEACHES = "teacher/"
"""How the name of a recipe begins that trains another one's teacher."""
ALONE = "alone-lr"
"""How the last part of a name begins that trains a student alone."""
ENCODER = "encoder"
"""The last part of a name that trains an encoder."""


def part_of(name: str) -> Part:
    """Which part the recipe of this name trains."""
    last = name.rpartition("/")[2]
    if last == ENCODER:
        return "encoder"
    if last.startswith(ALONE):
        return "alone"
    return "teacher" if name.startswith(TEACHES) else "student"
