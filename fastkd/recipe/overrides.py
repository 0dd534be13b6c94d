"""Dotted keys: `optim.lr=0.1` from text to a value at its place in nested keys, and back.

What the text after `=` means depends on the type of its key, which the schema knows:

    text (a path, a name)     the characters as they stand; only `null` or nothing is null
    a number, true or false   one word of YAML
    a list                    words joined by commas, or a list of YAML in brackets
    a mapping, a section      a mapping of YAML in braces
"""

import re
import typing
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any

from fastkd.config.mistakes import entries_of, holds_texts, is_text, section_of
from fastkd.config.plain_yaml import NotPlain, is_utf8, plain_scalar, read_yaml
from fastkd.errors import UserError
from fastkd.losses.base.registry import config_class, term_names
from fastkd.printable import shown
from fastkd.recipe.schema import Recipe

__all__ = ["nested", "parse_override", "set_key", "type_of"]

MAX_KEY = 300
"""Characters of a dotted key."""
MAX_DEPTH = 12
"""Parts of a dotted key; a recipe needs five."""
MAX_VALUE = 100_000
"""Characters of a value: a list of 20,000 numbers fits."""
MAX_YAML = 20_000
"""Characters of a value in brackets or braces, which take longer to read."""


def parse_override(text: str) -> tuple[str, Any]:
    """`optim.milestones=150,180` -> ("optim.milestones", [150, 180]); a comma makes a list."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise UserError(
            f"expected key=value, got {text!r}: recipes come first, then overrides such as "
            f"optim.lr=0.1 (fastkd recipes lists the recipes)"
        )
    if not is_utf8(text):
        raise UserError(f"{shown(text)} holds bytes that are not UTF-8; rename what it names")
    if len(key) > MAX_KEY or key.count(".") >= MAX_DEPTH:
        raise UserError(f"unknown key {shown(key)}: no key is that long")
    kind = type_of(key)
    if is_text(kind):
        return key, _text(key, raw)
    limit = MAX_YAML if raw.lstrip()[:1] in ("[", "{") else MAX_VALUE
    if len(raw) > limit:
        raise UserError(
            f"{shown(key)}: a value of {len(raw):,} characters, above {limit:,}: write it in a "
            f"file and give that with --config"
        )
    try:
        return key, _value(key, raw.strip(), texts=holds_texts(kind))
    except NotPlain as error:
        star = re.search(r"[{,]\s*\*", raw)
        hint = "; a name that begins with a star needs quotes" if star else ""
        raise UserError(f"{shown(text)}: the value is not valid YAML ({error}){hint}") from None


def type_of(key: str) -> Any:
    """The type that the schema gives a dotted key; None for a key that it does not have."""
    kind: Any = Recipe
    parts = _parts(key)
    for number, part in enumerate(parts):
        if parts[:number] == ["losses"]:
            kind = config_class(part) if part in term_names() else None
        else:
            kind = _inner(kind, part)
    return kind


def _parts(key: str) -> list[str]:
    """The parts of a dotted key; below a mapping of plain values all the rest is one.

    `student.blocks.layer3.0` is the entry `layer3.0` of `student.blocks`.
    """
    kind: Any = Recipe
    parts = key.split(".")
    for number, part in enumerate(parts):
        if _is_plain_mapping(kind):
            return [*parts[:number], ".".join(parts[number:])]
        if parts[:number] == ["losses"]:
            kind = config_class(part) if part in term_names() else None
        else:
            kind = _inner(kind, part)
    return parts


def _is_plain_mapping(kind: Any) -> bool:
    """Whether an annotation is, or may be, a mapping of texts or numbers."""
    options = (kind,) if typing.get_origin(kind) is dict else typing.get_args(kind)
    for option in options:
        if typing.get_origin(option) is dict:
            value = typing.get_args(option)[1]
            annotated = typing.get_origin(value) is Annotated
            return (typing.get_args(value)[0] if annotated else value) in (str, int, float)
    return False


def _inner(kind: Any, part: str) -> Any:
    """The type of one key of a section, or of one entry of a list or mapping."""
    if section := section_of(kind):
        field = section.model_fields.get(part)
        return field.annotation if field else None
    if entries := entries_of(kind):
        return entries
    for option in (kind, *typing.get_args(kind)):
        if typing.get_origin(option) in (tuple, dict):
            return [one for one in typing.get_args(option) if one is not Ellipsis][-1]
    return None


def _text(key: str, raw: str) -> str | None:
    for one in raw:
        if unicodedata.category(one) == "Cc":
            script = ", which Windows puts at the end of a line" if one == "\r" else ""
            raise UserError(
                f"{shown(key)}={shown(raw)}: {one!r} cannot be part of a value{script}; if a file "
                f"name has it, rename the file"
            )
    return None if raw in ("", "null") else raw


def _value(key: str, raw: str, texts: bool) -> Any:
    if raw[:1] in ("[", "{"):
        return read_yaml(raw, texts=texts)

    def word(text: str) -> Any:
        return _text(key, text) if texts else plain_scalar(text)

    return [word(item.strip()) for item in raw.split(",")] if "," in raw else word(raw)


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 0.1} -> {"optim": {"lr": 0.1}}."""
    values: dict[str, Any] = {}
    for key, value in keys.items():
        set_key(values, key, value)
    return values


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested values; a number between names is an entry of a list."""
    *sections, last = _parts(key)
    node: Any = values
    for depth, section in enumerate(sections):
        new: Any = [] if any(map(_is_index, sections[depth + 1 : depth + 2])) else {}
        node = _step_into(node, section, new, key, ".".join(sections[:depth]))
    if isinstance(node, list):
        _check_number(node, last, key, ".".join(sections))
        node[int(last) : int(last) + 1] = [value]
    else:
        node[last] = value


def _check_number(node: list[Any], number: str, key: str, at: str) -> None:
    """UserError unless it is the index of an entry of the list, or of the next one."""
    if not _is_index(number) or int(number) > len(node):
        entries = ", ".join(f"{at}.{index}" for index in range(min(len(node), 20))) or "nothing"
        raise UserError(
            f"unknown key {shown(key)}: {at} is a list that holds {entries}; {at}.{len(node)} "
            f"would add to it"
        )


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10


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
        raise UserError(f"unknown key {shown(key)}: {at} is a value and has no keys of its own")
    return found
