"""Kinds of plain values, as YAML, JSON and pickles give them.

After a bare `isinstance` the contents are unknown to a type checker; here they may be anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

__all__ = ["dotted", "is_list", "is_mapping"]


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether the value holds others by key."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether the value holds others by position; a string does not."""
    return isinstance(value, list | tuple)


def dotted(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Every value in nested mappings by its dotted key; an empty mapping is a value too."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= dotted(value, f"{path}.") if is_mapping(value) and value else {path: value}
    return found
