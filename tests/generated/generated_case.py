"""A generated case: something done to fastkd, and the outcome that is right.

The outcome is a value, `REFUSED` (a UserError, exit code 2 on the command line) or `FAILED` (a
RunFailed, exit code 1: the run was begun and came to nothing). Any other exception is a fault of
fastkd, and so is a value that differs.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from fastkd.errors import FastKDError, RunFailed, UserError

__all__ = ["FAILED", "REFUSED", "Case", "check", "refused", "the_same"]

LONGEST_MESSAGE = 2000


class Ending(Enum):
    """How a case may end without a value."""

    REFUSED = UserError
    FAILED = RunFailed


REFUSED, FAILED = Ending.REFUSED, Ending.FAILED


def refused(*words: str) -> tuple[Ending, tuple[str, ...]]:
    """`REFUSED`, in a message that has these words."""
    return REFUSED, words


@dataclass(frozen=True)
class Case:
    """One generated case."""

    about: str
    """What is done, so that it can be done again by hand."""
    run: Callable[[], Any]
    expected: Any
    """A value (tensors and arrays are compared to 1e-5), an `Ending`, or `refused(words)`."""


def check(case: Case) -> None:
    """AssertionError if the outcome is not the expected one."""
    wanted, words = case.expected, ()
    if isinstance(wanted, tuple) and wanted and isinstance(wanted[0], Ending):
        wanted, words = wanted
    ended = None
    found: Any = None
    try:
        found = case.run()
    except FastKDError as error:
        ended = error
    except Exception as error:
        error.add_note(f"{case.about}\nexpected {wanted!r}")
        raise
    if ended is not None:
        message = str(ended)
        fits = isinstance(wanted, Ending) and isinstance(ended, wanted.value)
        assert fits, f"{case.about}\nexpected {wanted!r}, got {type(ended).__name__}: {message}"
        assert _is_clean(message), f"{case.about}\nnot fit for a terminal: {message!r}"
        missing = [word for word in words if word not in message]
        assert not missing, f"{case.about}\n{missing} is not in the message: {message}"
        return
    assert not isinstance(wanted, Ending), f"{case.about}\nexpected {wanted!r}, got {found!r}"
    assert the_same(found, wanted), f"{case.about}\nexpected {wanted!r}, got {found!r}"


def the_same(found: Any, wanted: Any) -> bool:
    """Equality, through containers; floating point to 1e-5 of the larger value."""
    if isinstance(wanted, torch.Tensor | np.ndarray):
        one, two = torch.tensor(np.asarray(found)), torch.tensor(np.asarray(wanted))
        if one.shape != two.shape:
            return False
        return torch.allclose(one.double(), two.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(the_same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(the_same, found, wanted))
    if isinstance(wanted, float):
        return bool(np.isclose(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True))
    return type(found) is type(wanted) and bool(found == wanted)


def _is_clean(message: str) -> bool:
    """Whether a terminal shows the message as it is: printable, of a bounded length, not empty."""
    printable = all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") for c in message)
    return printable and 0 < len(message) <= LONGEST_MESSAGE
