"""The base of every part of a recipe: frozen, typed, and closed to unknown keys."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """One group of recipe keys. Attribute docstrings become the help text of a key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )
