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
        except RuntimeError as error:
            # Python does not let a StopIteration of the work itself, such as a callback's, out.
            if isinstance(error.__cause__, StopIteration):
                raise error.__cause__ from None
            raise
