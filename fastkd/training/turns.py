"""Work that stops between its steps, so that several runs of one process can take turns."""

from collections.abc import Generator
from typing import TypeVar

__all__ = ["to_its_end"]

T = TypeVar("T")


def to_its_end(turns: Generator[object, None, T]) -> T:
    """Do all steps at once; what the work returns."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value
