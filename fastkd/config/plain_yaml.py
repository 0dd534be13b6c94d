"""YAML as plain values: text, numbers, true and false, null, lists, mappings; and nothing else.

PyYAML splits the text into events; what a word means is decided here, by the rules of YAML 1.2:
`no`, `0123`, `12:30` and `2024-05-01` are text. A recipe may come from a stranger, so tags, cycles
and absurd sizes are refused, each in one sentence.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from fastkd.config.values import is_list, is_mapping
from fastkd.printable import shown

__all__ = ["NotPlain", "is_utf8", "plain_scalar", "read_yaml", "write_yaml"]

MAX_LENGTH = 1_000_000
"""Characters of a file."""
MAX_DEPTH = 16
"""Lists and mappings inside each other; a recipe needs five."""
MAX_VALUES = 200_000
"""Values, an alias counting as all that it stands for."""
MAX_DIGITS = 300
"""Characters of a number; a longer one stays text, which no number accepts."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_parse: Callable[[str, Any], Iterator[Any]] = yaml.parse  # type: ignore[reportUnknownMemberType]
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)
# 007 is a name more often than a number; a key for numbers reads it all the same.
_PADDED = re.compile(r"[-+]?0[0-9]+")


class NotPlain(ValueError):
    """The text is not such YAML; says where and why."""


def plain_scalar(text: str) -> Any:
    """What an unquoted word means: null, true or false, a number, or itself."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_DIGITS or _PADDED.fullmatch(text):
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if special := _NOT_FINITE.fullmatch(text):
        return float(special[1] + special[2])
    return text


def is_utf8(text: str) -> bool:
    """Whether a file can hold the text: it has no half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_yaml(text: str, *, texts: bool = False) -> Any:
    """The value of a YAML document. texts: every word stays text, as a mapping's keys always do."""
    if len(text) > MAX_LENGTH:
        raise NotPlain(f"{len(text):,} characters, more than {MAX_LENGTH:,}")
    if not is_utf8(text):
        raise NotPlain("bytes that are not UTF-8")
    try:
        return _Reading(text, texts).document()
    except yaml.MarkedYAMLError as error:
        raise _problem(error.problem or "", error.problem_mark) from None
    except yaml.YAMLError as error:
        raise NotPlain(" ".join(str(error).split())) from None


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `read_yaml` would take for something else."""


def _text(dumper: _Dumper, text: str) -> Any:
    # PyYAML quotes what YAML 1.1 would not read as text; `plain_scalar` differs in a few words.
    style = None if plain_scalar(text) == text else "'"
    # Without double quotes YAML writes a line break as an empty line.
    style = '"' if "\n" in text else style
    represented: Any = dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)  # type: ignore[reportUnknownMemberType]
    return represented


_Dumper.add_representer(str, _text)


def write_yaml(values: Any) -> str:
    """The text from which `read_yaml` makes the same values, each on the line of its key."""
    written: Any = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=sys.maxsize)  # type: ignore[reportUnknownMemberType]
    return written


class _Reading:
    """One pass over the events of a document."""

    def __init__(self, text: str, texts: bool) -> None:
        self._events: Iterator[Any] = _parse(text, _LOADER)
        self._texts = texts
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._values = 0

    def document(self) -> Any:
        """The only document of the text; None if there is none."""
        value, documents = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _problem("a second document begins here", event.start_mark)
                value = self._value(next(self._events), 1)
        return value

    def _value(self, event: Any, depth: int) -> Any:
        before = self._values
        self._count(1, event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if event.tag is not None:
            raise _problem(f"the tag {shown(event.tag)} is not allowed", event.start_mark)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif depth > MAX_DEPTH:
            raise _problem(f"more than {MAX_DEPTH} lists and mappings deep", event.start_mark)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(depth)
        else:
            value = self._mapping(depth)
        if event.anchor:
            self._anchors[event.anchor] = (value, self._values - before)
        return value

    def _alias(self, event: Any) -> Any:
        # An anchor is noted behind its value, so none can stand inside it.
        if event.anchor not in self._anchors:
            raise _problem(f"*{shown(event.anchor)} stands for nothing before it", event.start_mark)
        value, values = self._anchors[event.anchor]
        self._count(values, event)
        return copy.deepcopy(value)

    def _scalar(self, event: Any) -> Any:
        if "\0" in event.value or not is_utf8(event.value):
            raise _problem("a character that no text may have", event.start_mark)
        is_plain = event.implicit[0] and not self._texts
        return plain_scalar(event.value) if is_plain else event.value

    def _sequence(self, depth: int) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, depth + 1))
        return values

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise _problem("a key must be a word", event.start_mark)
            key = event.value
            if key in values:
                raise _problem(f"the key {shown(key)} appears twice", event.start_mark)
            value = self._value(next(self._events), depth + 1)
            if key == "<<" and event.implicit[0]:
                merged |= self._merged(value, event)
            else:
                values[key] = value
        return merged | values

    def _merged(self, value: Any, event: Any) -> dict[str, Any]:
        """What `<<: *base` or `<<: [*one, *other]` brings in; the first of a list wins."""
        found: dict[str, Any] = {}
        for one in value if is_list(value) else [value]:
            if not is_mapping(one):
                raise _problem("<< takes in a mapping, such as *name", event.start_mark)
            found = {**one, **found}
        return found

    def _count(self, values: int, event: Any) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _problem(f"more than {MAX_VALUES:,} values", event.start_mark)


def _problem(what: str, mark: Any) -> NotPlain:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return NotPlain(f"{where}{what}")
