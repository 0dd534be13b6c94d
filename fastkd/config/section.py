"""The base of every part of a recipe: frozen, typed, and closed to unknown keys."""

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationInfo, field_validator

__all__ = ["Channels", "Deviations", "Normalization", "Section", "yaml_switch"]

Channels = tuple[float, float, float]
"""Of the three channels, in 0..1."""

Normalization = tuple[Channels, Channels]
"""Channel means and channel standard deviations."""

Deviations = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
"""Standard deviations of the three channels, in 0..1."""


def yaml_switch(value: object) -> object:
    """YAML 1.1 reads a bare on / off as a boolean; the key wants the word."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


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
        lists = [annotation, *typing.get_args(annotation)]
        is_list = any(Ellipsis in typing.get_args(kind) for kind in lists)
        return (value,) if is_list and isinstance(value, str | int | float) else value
