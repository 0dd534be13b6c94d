"""What a loss declares about its arguments: type, bounds and meaning, each in one place.

A constructor annotates them, `momentum: Annotated[float, Ge(0), Lt(1)] = 0.5`, and the docstring of
its class explains them in an `Args:` list. In Python `checked` refuses other values; for recipes
`losses.base.keys` makes the keys from them.
"""

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from fastkd.config.docstrings import docstring_of
from fastkd.config.mistakes import bounds_in_words
from fastkd.errors import UserError

__all__ = [
    "STATED",
    "Argument",
    "Smoothing",
    "Weight",
    "arguments_of",
    "check_argument",
    "checked",
    "sizes_of",
]

Init = TypeVar("Init", bound=Callable[..., None])


class _Stated:
    """The type of `STATED`."""


STATED = _Stated()
"""Marks an argument that a recipe must state, though it has a default in Python."""

Weight = Annotated[float, Gt(0), STATED]
"""Factor in the total."""
Smoothing = Annotated[float, Ge(0), Lt(1)]
"""Share of the target spread over all classes."""


@dataclass(frozen=True)
class Argument:
    """One argument of a constructor."""

    name: str
    kind: Any
    """Its type without metadata."""
    metadata: tuple[Any, ...]
    """Bounds, and `STATED`."""
    default: object
    """`inspect.Parameter.empty` if there is none."""
    meaning: str
    """Its entry in the `Args:` of the class or a base; empty if there is none."""

    @property
    def is_stated(self) -> bool:
        """Whether a recipe must give a value."""
        return STATED in self.metadata or self.default is inspect.Parameter.empty


def arguments_of(loss: type) -> dict[str, Argument]:
    """All arguments of the constructor, in its order."""
    meanings: dict[str, str] = {}
    for base in reversed(loss.__mro__):
        meanings |= _meanings(docstring_of(base))
    found = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        kind, metadata = _split(parameter.annotation)
        found[name] = Argument(name, kind, metadata, parameter.default, meanings.get(name, ""))
    return found


def sizes_of(argument: Argument) -> tuple[int, float]:
    """Minimum and maximum number of entries."""
    return _sizes(argument.metadata)


def checked(init: Init) -> Init:
    """The constructor, refusing values that its annotations exclude; see `check_argument`."""
    signature = inspect.signature(init)
    declared = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if _declares(parameter.annotation)
    }
    if not declared:
        return init

    @functools.wraps(init)
    def checking(*args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            # Python's own message names the constructor.
            init(*args, **kwargs)
            raise
        bound.apply_defaults()
        owner = bound.arguments.get("name", type(args[0]).__name__)
        for name, annotation in declared.items():
            check_argument(owner, name, annotation, bound.arguments[name])
        init(*args, **kwargs)

    return typing.cast(Init, checking)


def _declares(annotation: Any) -> bool:
    """Whether it restricts its values: by a bound or a `Literal`, also inside a tuple."""
    kinds = (Annotated, Literal)
    return typing.get_origin(annotation) in kinds or any(
        map(_declares, typing.get_args(annotation))
    )


def check_argument(owner: str, name: str, annotation: Any, value: object) -> None:
    """When a loss is built, refuse values with which every step would fail.

    Numbers (finite, in their bounds, whole where they count), words of a `Literal`, and lists of
    these are checked, other kinds pass. TypeError for another kind of value, else UserError.
    """
    error = _mistake(annotation, value)
    if error is not None:
        raise error(f"{owner}: got {name}={value!r}; expected {_words(annotation)}")


def _mistake(annotation: Any, value: Any) -> type[Exception] | None:
    """The error for this value; None if it is fine or its kind is not checked."""
    kind, metadata = _split(annotation)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in inner:
            return None
        found = [_mistake(option, value) for option in inner if option is not types.NoneType]
        return None if None in found else found[0]
    if origin is Literal:
        return None if value in inner else UserError
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real):
            return TypeError
        number = float(value)
        whole = kind is float or isinstance(value, Integral)
        fine = whole and math.isfinite(number) and all(_within(number, b) for b in metadata)
        return None if fine else UserError
    if origin in (tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return TypeError
        least, most = _sizes(metadata) if origin is Sequence or ... in inner else (len(inner),) * 2
        if not least <= len(value) <= most:
            return UserError
        return next(filter(None, (_mistake(inner[0], entry) for entry in value)), None)
    return None


def _within(number: float, bound: object) -> bool:
    match bound:
        case Gt(low):
            return number > low  # type: ignore[operator]
        case Ge(low):
            return number >= low  # type: ignore[operator]
        case Lt(high):
            return number < high  # type: ignore[operator]
        case Le(high):
            return number <= high  # type: ignore[operator]
    return True


def _sizes(metadata: Sequence[Any]) -> tuple[int, float]:
    least = max((one.min_length for one in metadata if isinstance(one, MinLen)), default=0)
    most = min((one.max_length for one in metadata if isinstance(one, MaxLen)), default=math.inf)
    return least, most


def _words(annotation: Any) -> str:
    kind, metadata = _split(annotation)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        options = [_words(option) for option in inner if option is not types.NoneType]
        return " or ".join(options) + (", or None" if types.NoneType in inner else "")
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if kind in (int, float):
        number = f"a finite number {bounds_in_words(metadata)}".strip()
        return number if kind is float else f"{number}, a whole one"
    if origin in (tuple, Sequence):
        least, most = _sizes(metadata) if origin is Sequence or ... in inner else (len(inner),) * 2
        few = f" of {least}" if least == most else f" of at least {least}" if least else ""
        return f"a tuple{few}, each entry {_words(inner[0])}"
    return "text"


def _split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type and its metadata."""
    if typing.get_origin(annotation) is Annotated:
        kind, *metadata = typing.get_args(annotation)
        return kind, tuple(metadata)
    return annotation, ()


def _meanings(doc: str) -> Mapping[str, str]:
    """The entries of an `Args:` list, by name."""
    entries = re.findall(r"^( *)(\w+): (.*(?:\n\1 +\S.*)*)", doc.partition("Args:\n")[2], re.M)
    return {name: " ".join(text.split()) for _, name, text in entries}
