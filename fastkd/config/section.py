"""The base of every part of a recipe: frozen, typed, and closed to unknown keys.

Finished runs are found again by their recipe's digest. It must not change when a later
version of fastkd adds a key. Each key therefore declares on its field how it enters the digest:

    lr: PositiveFloat = 0.05                              always
    cache: Annotated[bool, Since("0.2")] = False          only where it is not at its default
    workers: Annotated[int, NoEffect] = 2                 never: it cannot change the outcome

Keys of 0.1.0 have no mark, every later one has one. A mark applies wherever the section is used:
in another section, in a list of sections, or among the losses.
"""

import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import AllowInfNan, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from fastkd.config.values import is_list, is_mapping

__all__ = [
    "Channels",
    "Deviations",
    "NoEffect",
    "Normalization",
    "Section",
    "Since",
    "yaml_switch",
]

_Mean = Annotated[float, Ge(-1e4), Le(1e4), AllowInfNan(False)]
_Deviation = Annotated[float, Ge(1e-4), Le(1e4), AllowInfNan(False)]

Channels = tuple[_Mean, _Mean, _Mean]
"""Means of the three channels, in 0..1."""

Deviations = tuple[_Deviation, _Deviation, _Deviation]
"""Standard deviations of the three channels, in 0..1."""

Normalization = tuple[Channels, Deviations]
"""Channel means and channel standard deviations; in recipes, weight files and facts.json."""


@dataclass(frozen=True)
class Since:
    """Marks a key newer than 0.1.0: at its default it leaves the digest unchanged."""

    version: str
    """First version of fastkd that has the key."""


class NoEffect:
    """Marks a key that cannot change the outcome of a run: it never enters the digest."""


def yaml_switch(value: object) -> object:
    """true and false mean on and off."""
    words = {"true": "on", "false": "off"}
    return words.get(str(value).lower(), value) if isinstance(value, bool | str) else value


class Section(BaseModel):
    """One group of recipe keys. Attribute docstrings become the help text of a key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_list(cls, value: Any, info: ValidationInfo) -> Any:
        """Take `baseline.lrs=0.1` as a list of one and `baseline.lrs=` as an empty one."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if typing.get_origin(annotation) is tuple and value is None:
            return ()
        # Also where the key may be null: class_map is `tuple[int, ...] | None`.
        is_tuple = typing.get_origin(annotation) is tuple
        kinds = [annotation, *(() if is_tuple else typing.get_args(annotation))]
        is_list = any(Ellipsis in typing.get_args(kind) for kind in kinds)
        # In place of a list some keys take a word.
        words = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
        is_word = any(value in options for options in words)
        is_entry = isinstance(value, str | int | float) and not is_word
        return (value,) if is_list and is_entry else value

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `epochs=true`, which pydantic takes for 1."""
        kinds = _leaves(cls.model_fields[str(info.field_name)].annotation)
        numbers = (int in kinds or float in kinds) and bool not in kinds
        entries = value if is_list(value) else (value,)
        if numbers and any(isinstance(one, bool) for one in entries):
            raise PydanticCustomError("no_number", "a switch is not a number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _is_a_size(cls, value: Any) -> Any:
        """Refuse whole numbers that no counter, seed or file holds."""
        entries: Iterable[object] = value if is_list(value) else (value,)
        if any(isinstance(one, int) and abs(one) >= 1 << 63 for one in entries):
            raise PydanticCustomError("too_large", "beyond 64 bits")
        return value

    def outcome(self) -> dict[str, Any]:
        """The keys that decide the outcome, as plain values; the digest is computed from them."""
        return _outcome(self, self.model_dump(mode="json"))


def _leaves(annotation: Any) -> list[Any]:
    """The plain types that an annotation is made of."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal or not inner:
        return [annotation]
    return [leaf for one in inner for leaf in _leaves(one)]


def _outcome(value: Any, plain: Any) -> Any:
    """The part of `plain`, which is `value` as JSON, that enters the digest."""
    if isinstance(value, Section):
        return {
            name: _outcome(getattr(value, name), plain[name])
            for name, field in type(value).model_fields.items()
            if _counts(field, getattr(value, name))
        }
    if is_mapping(value):
        inner = zip(value.values(), plain.items(), strict=True)
        return {key: _outcome(one, as_json) for one, (key, as_json) in inner}
    if is_list(value):
        return [_outcome(one, as_json) for one, as_json in zip(value, plain, strict=True)]
    return plain


def _counts(field: FieldInfo, value: Any) -> bool:
    if NoEffect in field.metadata:
        return False
    newer = any(isinstance(mark, Since) for mark in field.metadata)
    return not newer or value != field.get_default(call_default_factory=True)
