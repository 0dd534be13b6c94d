"""Dotted keys: `optim.lr=0.1` from text to a value at its place in nested keys, and back.

Nothing here knows which keys exist; the schema does.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from fastkd.errors import UserError

__all__ = ["nested", "parse_override", "set_key", "yaml_problem"]


def parse_override(text: str) -> tuple[str, Any]:
    """`optim.milestones=150,180` -> ("optim.milestones", [150, 180]); a comma makes a list."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise UserError(
            f"expected key=value, got {text!r}: recipes come first, then overrides such as "
            f"optim.lr=0.1 (fastkd recipes lists the recipes)"
        )
    try:
        if "," in raw and raw[0] not in "[{":
            return key, [yaml.safe_load(item) for item in raw.split(",")]
        return key, yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise UserError(f"{text}: the value is not valid YAML ({yaml_problem(error)})") from None


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 0.1} -> {"optim": {"lr": 0.1}}."""
    values: dict[str, Any] = {}
    for key, value in keys.items():
        set_key(values, key, value)
    return values


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested values; a number between names is an entry of a list."""
    *sections, last = key.split(".")
    node: Any = values
    for depth, section in enumerate(sections):
        new: Any = [] if any(part.isdigit() for part in sections[depth + 1 : depth + 2]) else {}
        node = _step_into(node, section, new, key, ".".join(sections[:depth]))
    if isinstance(node, list):
        _check_number(node, last, key, ".".join(sections))
        node[int(last) : int(last) + 1] = [value]
    else:
        node[last] = value


def _check_number(node: list[Any], number: str, key: str, at: str) -> None:
    """UserError unless it is the index of an entry of the list, or of the next one."""
    if not number.isdigit() or int(number) > len(node):
        entries = ", ".join(f"{at}.{index}" for index in range(len(node))) or "nothing"
        raise UserError(
            f"unknown key {key}: {at} is a list that holds {entries}; {at}.{len(node)} would add "
            f"to it"
        )


def _step_into(node: Any, section: str, new: Any, key: str, at: str) -> Any:
    """What `section` names in a mapping or a list, `new` if there is nothing yet."""
    if isinstance(node, list):
        _check_number(node, section, key, at)
        node += [new] * (int(section) == len(node))
        found = node[int(section)]
    else:
        if node.get(section) is None:
            node[section] = new
        found = node[section]
    if not isinstance(found, dict | list):
        at = f"{at}.{section}" if at else section
        raise UserError(f"unknown key {key}: {at} is a value and has no keys of its own")
    return found


def yaml_problem(error: Exception) -> str:
    """The YAML reader's error in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
