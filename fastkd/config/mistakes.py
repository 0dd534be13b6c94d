"""What is wrong with recipe keys, one sentence for each mistake.

Used by `recipes.loading` for a recipe and by `losses.base.registry` for the keys of one loss. The
allowed values come from the schema itself, so a message cannot disagree with it.
"""

import difflib
import itertools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fastkd.config.values import dotted, is_list, is_mapping
from fastkd.errors import FastKDError
from fastkd.printable import shown

__all__ = [
    "allowed",
    "bounds_in_words",
    "entries_of",
    "explain",
    "holds_texts",
    "is_text",
    "nearest_keys",
    "section_of",
]

_BOUNDS = (
    (Gt, "gt", "above"),
    (Ge, "ge", "of at least"),
    (Lt, "lt", "below"),
    (Le, "le", "at most"),
)

_SIZES = ((MinLen, "min_length", "at least"), (MaxLen, "max_length", "at most"))

MAX_MISTAKES = 20
"""How many mistakes are explained; a file with more is another kind of file."""

_ENTRY = r"(?<=\.)\d+(?=\.)"


def explain(
    error: ValidationError,
    section: type[BaseModel],
    values: Mapping[str, Any],
    known: Sequence[str],
    *,
    prefix: str = "",
) -> list[str]:
    """One sentence per mistake, without repetition.

    values: what was validated. known: all valid dotted keys, from which the nearest is named.
    prefix: what precedes every key of `section`, such as `losses.kd.`.
    """
    found: dict[str, None] = {}
    mistakes = error.errors()
    for mistake in mistakes[:MAX_MISTAKES]:
        path, field = _locate(section, mistake["loc"])
        key = prefix + ".".join(path)
        if mistake["type"] == "extra_forbidden":
            for unknown in itertools.islice(dotted({key: mistake["input"]}), MAX_MISTAKES):
                found[_unknown(unknown, known)] = None
        elif mistake["type"] == "value_error":
            found |= dict.fromkeys(_sentences(mistake))
        elif mistake["type"] == "missing" and field is not None and path == _texts(mistake["loc"]):
            found[f"{key} is missing and has no default: set it, {allowed(field)}"] = None
        else:
            wanted = "text" if field is None else allowed(field)
            if mistake["type"] == "finite_number":
                wanted = wanted.replace("a number", "a finite number")
            if mistake["type"] == "too_large":
                wanted = f"{wanted}, below 2^63"
            value = _at(values, path)
            hint = _near(value, field) or _quotes(value, field)
            found[f"{shown(key)}={_shown(value)}: expected {wanted}{hint}"] = None
    more = len(mistakes) - MAX_MISTAKES
    return [*found, *([f"and {more} more mistakes"] if more > 0 else [])]


def _sentences(mistake: ErrorDetails) -> tuple[str, ...]:
    error = mistake.get("ctx", {}).get("error")
    return error.args if isinstance(error, FastKDError) else (str(error),)


def allowed(field: FieldInfo) -> str:
    """The values that a key accepts, in words: `a whole number above 0, or null`."""
    return _words(field.annotation, field.metadata)


def bounds_in_words(metadata: Sequence[Any]) -> str:
    """The bounds of a number among the metadata of its annotation: `above 0 and at most 1`."""
    return " and ".join(
        f"{word} {getattr(limit, name):g}"
        for kind, name, word in _BOUNDS
        for limit in metadata
        if isinstance(limit, kind)
    )


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class behind `Section` or `Section | None`."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def entries_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of the entries of a `tuple[Section, ...]`."""
    inner = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    return section_of(inner[0]) if inner and inner[-1] is Ellipsis else None


def is_text(annotation: Any) -> bool:
    """Whether a key takes text, or one of some words, or null; and nothing else."""
    kinds = [kind for kind in _options(annotation) if kind is not types.NoneType]
    return bool(kinds) and all(map(_is_word, kinds))


def holds_texts(annotation: Any) -> bool:
    """Whether a key takes a list or a mapping in which every value is text."""
    for kind in _options(annotation):
        inner = [one for one in typing.get_args(kind) if one is not Ellipsis]
        if typing.get_origin(kind) in (tuple, dict) and all(map(is_text, inner)):
            return True
    return False


def _is_word(kind: Any) -> bool:
    if typing.get_origin(kind) is Annotated:
        return is_text(typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        return all(isinstance(word, str) for word in typing.get_args(kind))
    return kind is str


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    if typing.get_origin(annotation) is Annotated:
        annotation, *more = typing.get_args(annotation)
        return _words(annotation, [*more, *metadata])
    options = _options(annotation)
    if len(options) > 1:
        kinds = [_words(option, metadata) for option in options if option is not types.NoneType]
        return " or ".join(kinds) + (", or null" if types.NoneType in options else "")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"keys of its own ({', '.join(annotation.model_fields)}), not a value"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"{len(inner)} values joined by commas, each {_words(inner[0])}"
    if entries := entries_of(annotation):
        first, *_ = keys = list(entries.model_fields)
        return f"a list such as [{{{first}: ..}}], the keys of each {', '.join(keys)}"
    sizes = [
        f"{word} {getattr(limit, name)}"
        for kind, name, word in _SIZES
        for limit in metadata
        if isinstance(limit, kind)
    ]
    few = f" with {' and '.join(sizes)} entries" if sizes else ""
    if origin is tuple:
        # An empty list is most often the word for none.
        most = "" if any(isinstance(limit, MinLen) for limit in metadata) else few
        return f"a list{most} joined by commas, each {_words(inner[0])}"
    if origin is dict or origin is Mapping:
        return f"a mapping such as {{name: value}}{few}"
    plain: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
    }
    return f"{plain.get(annotation, 'another value')} {bounds_in_words(metadata)}".strip()


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def _locate(
    section: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[str], FieldInfo | None]:
    """The key that an error belongs to, without positions inside its value, and its field.

    The index into a list of sections is part of the key.
    """
    path: list[str] = []
    field = None
    inner: type[BaseModel] | None = section
    for part in _texts(loc):
        if inner is None:
            # The index of an entry in a list of sections.
            inner = entries_of(field.annotation) if field else None
            if inner is None:
                break
            path.append(part)
            continue
        path.append(part)
        field = inner.model_fields.get(part)
        inner = section_of(field.annotation) if field else None
    # An entry that is not a mapping is a mistake in the whole list.
    if field and entries_of(field.annotation) and path[-1].isdecimal():
        path.pop()
    return path, field


def _texts(loc: tuple[int | str, ...]) -> list[str]:
    return [str(part) for part in loc]


def nearest_keys(key: str, known: Sequence[str]) -> list[str]:
    """The known keys that end in the same word, the most similar first.

    `lr=0.1` means optim.lr: the right word in the wrong place beats a similar word.
    """
    near = [one for one in known if one.rpartition(".")[2] == key.rpartition(".")[2]]
    return sorted(near, key=lambda one: -difflib.SequenceMatcher(None, one, key).ratio())


def _unknown(key: str, known: Sequence[str]) -> str:
    section, _, last = key.rpartition(".")
    # All entries of a list of sections have the keys of the first.
    known = [re.sub(_ENTRY, _number(key), one) for one in known]
    near = nearest_keys(key, known)
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    if not near and section and beside:
        near = [beside[one] for one in difflib.get_close_matches(last, beside, n=1, cutoff=0.5)]
    elif not near:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key {shown(key)}, did you mean {' or '.join(near[:2])}?"
    # List the keys of the innermost section that exists.
    while section and not any(one.startswith(f"{section}.") for one in known):
        section = section.rpartition(".")[0]
    start = f"{section}." if section else ""
    siblings = dict.fromkeys(
        one.removeprefix(start).partition(".")[0] for one in known if one.startswith(start)
    )
    where = f"the keys of {section}" if section else "the keys"
    return f"unknown key {shown(key)}; {where} are {', '.join(siblings)}"


def _number(key: str) -> str:
    """Index of the entry that a key belongs to, in a list of sections; 0 if there is none."""
    found = re.search(_ENTRY, key)
    return found[0] if found else "0"


def _at(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    node: Any = values
    for part in path:
        if is_list(node):
            node = node[int(part)]
        else:
            node = node.get(part) if is_mapping(node) else getattr(node, part, None)
    return node


def _shown(value: Any) -> str:
    """As on a command line, cut."""
    if isinstance(value, str):
        return shown(value)
    if is_list(value):
        return shown(",".join(map(_shown, value[:50])))
    if is_mapping(value):
        # A long one is cut anyway, so most of it need not be written out first.
        value = dict(itertools.islice(value.items(), 20))
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n")
    return shown(text.strip(), 80)


def _near(value: Any, field: FieldInfo | None) -> str:
    """A hint if one of a few words was misspelled."""
    if field is None or not isinstance(value, str):
        return ""
    words = [
        str(choice)
        for option in _options(field.annotation)
        if typing.get_origin(option) is Literal
        for choice in typing.get_args(option)
    ]
    near = difflib.get_close_matches(value, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _quotes(value: Any, field: FieldInfo | None) -> str:
    """A hint if YAML read something else where a file means text."""
    kind = field.annotation if field else None
    if is_text(kind) and not isinstance(value, str | None):
        return "; in YAML put it in quotes"
    if not holds_texts(kind):
        return ""
    entries = value.values() if is_mapping(value) else value if is_list(value) else ()
    others = [one for one in entries if not isinstance(one, str)]
    return f"; in YAML put {_shown(others[0])} in quotes" if others else ""
