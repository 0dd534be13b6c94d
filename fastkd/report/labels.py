"""Short names for runs: what varies among them, as short as it stays unique.

`differences` finds what tells finished runs apart; a sweep knows it from its own words. The tables
show these names; a sweep's CSV file has every key and value in full.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.config.plain_yaml import NotPlain, read_yaml
from fastkd.config.values import dotted
from fastkd.recipe.schema import Recipe

__all__ = ["ALONE", "Choice", "differences", "labels"]

Choice = tuple[str, ...]
"""The overrides of one run: ("optim.lr=0.1", "seed=0")."""

ALONE = "alone"
"""Folder below runs/ of the students alone, and the first part of their recipes' names."""

LONG = 32
"""Names are shortened if one is longer than this."""

Pair = tuple[str, str]


def labels(choices: Sequence[Choice]) -> dict[Choice, str]:
    """A name for every choice."""
    split = {choice: [_pair(override) for override in choice] for choice in choices}
    ways: list[Callable[[dict[Choice, list[Pair]]], dict[Choice, list[Pair]]]] = [
        _as_they_are,
        _without_what_all_share,
        _shorter_values,
        _shorter_keys,
    ]
    names: dict[Choice, str] = {}
    for way in ways:
        split = way(split)
        shorter = {choice: _joined(pairs) for choice, pairs in split.items()}
        if len(set(shorter.values())) < len(choices):
            break
        names = shorter
        if max(map(len, names.values()), default=0) <= LONG:
            break
    return names or {choice: " ".join(choice) for choice in choices}


def _joined(pairs: Iterable[Pair]) -> str:
    # What has lost its key says by itself what it is.
    return " ".join(f"{key}={value}" if key else value for key, value in pairs)


def _pair(override: str) -> Pair:
    key, _, value = override.partition("=")
    return key, value


def _as_they_are(split: dict[Choice, list[Pair]]) -> dict[Choice, list[Pair]]:
    return split


def _without_what_all_share(split: dict[Choice, list[Pair]]) -> dict[Choice, list[Pair]]:
    shared = set.intersection(*(set(pairs) for pairs in split.values())) if split else set()
    return {choice: [p for p in pairs if p not in shared] for choice, pairs in split.items()}


def _shorter_values(split: dict[Choice, list[Pair]]) -> dict[Choice, list[Pair]]:
    values: dict[str, list[str]] = {}
    for pairs in split.values():
        for key, value in pairs:
            values.setdefault(key, []).append(value)
    short = {key: _short_values(key, list(dict.fromkeys(own))) for key, own in values.items()}
    return {c: [short[key][value] for key, value in pairs] for c, pairs in split.items()}


def _short_values(key: str, values: Sequence[str]) -> dict[str, Pair]:
    if key == "recipe":
        alone = [value for value in values if value.startswith(f"{ALONE}/")]
        methods = _unlike_parts([value for value in values if value not in alone])
        students = _unlike_parts(alone)
        short = methods | {
            value: ALONE if len(alone) == 1 else f"{ALONE} {students[value]}" for value in alone
        }
        return {value: ("", short[value]) for value in values}
    short = _short_mappings(values)
    if all("/" in value for value in values):
        short = _unlike_parts(values)
    if len(set(short.values())) < len(values):
        return {value: (key, value) for value in values}
    # The losses of a run are its method: they need no key.
    named = key == "losses" and all(value != short[value] for value in values)
    return {value: ("" if named else key, short[value]) for value in values}


def _short_mappings(values: Sequence[str]) -> dict[str, str]:
    """`{kd: {weight: 1}, at: {weight: 9}}` -> `kd+at`, `{stage1: stage2}` -> `stage1:stage2`.

    Those that still read the same get the entries in which they differ: `kd weight=1`.
    """
    found = {value: _mapping(value) for value in values}
    if not all(found.values()):
        return {value: value for value in values}
    short = {
        value: ",".join(f"{k}:{v}" for k, v in one.items())
        if not any(isinstance(item, Mapping) for item in one.values())
        else "+".join(map(str, one))
        for value, one in found.items()
    }
    leaves = {value: dotted(one) for value, one in found.items()}
    named: dict[str, str] = {}
    for value, name in short.items():
        own, alike = leaves[value], [leaves[other] for other in values if short[other] == name]
        unlike = [k for k in own if own[k] != {} and any(other.get(k) != own[k] for other in alike)]
        named[value] = " ".join([name, *(f"{k.rpartition('.')[2]}={own[k]}" for k in unlike)])
    return named


def _mapping(value: str) -> dict[Any, Any]:
    try:
        found: Any = read_yaml(value) if value.startswith("{") else None
    except NotPlain:
        return {}
    return dict(found) if isinstance(found, Mapping) else {}


def _unlike_parts(values: Sequence[str]) -> dict[str, str]:
    """Names without the parts, between slashes, that they begin or end with in common."""
    parts = {value: value.split("/") for value in values}
    shortest = min(map(len, parts.values()), default=1)
    start = end = 0
    while start < shortest - 1 and len({tuple(p[: start + 1]) for p in parts.values()}) == 1:
        start += 1
    while end < shortest - 1 - start and len({tuple(p[-end - 1 :]) for p in parts.values()}) == 1:
        end += 1
    return {value: "/".join(own[start : len(own) - end]) for value, own in parts.items()}


def _shorter_keys(split: dict[Choice, list[Pair]]) -> dict[Choice, list[Pair]]:
    keys = list(dict.fromkeys(key for pairs in split.values() for key, _ in pairs if key))
    last = [key.rpartition(".")[2] for key in keys]
    short = {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }
    return {c: [(short.get(key, key), value) for key, value in pairs] for c, pairs in split.items()}


def differences(recipes: Mapping[Path, Recipe]) -> dict[Path, Choice]:
    """The overrides that tell the recipes apart: their names, then keys that say something new.

    Runs of the same recipe are told apart by their folders.
    """
    dotted = {folder: recipe.dotted() for folder, recipe in recipes.items()}
    every = list(dotted.values())
    keys = ["name", *(key for values in every for key in values)]
    told = list[str]()
    for key in dict.fromkeys(keys):
        varies = len({repr(values.get(key)) for values in every}) > 1
        # Over the seed there are means, so it is named in any case, and after the rest.
        if key in ("seed", "description") or not varies:
            continue
        known = [*told, "seed"] if key.endswith(".seed") else told
        if not _follows(key, known, every):
            told.append(key)
    if len({values["seed"] for values in every}) > 1:
        told.append("seed")
    choices = {
        folder: tuple(
            f"{'recipe' if key == 'name' else key}={_text(values.get(key))}" for key in told
        )
        for folder, values in dotted.items()
    }
    shared = list(choices.values())
    return {
        folder: choice if shared.count(choice) == 1 else (f"run={folder}", *choice)
        for folder, choice in choices.items()
    }


def _follows(key: str, known: Sequence[str], every: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the keys known so far decide this one."""
    pairs = {(repr([one.get(k) for k in known]), repr(one.get(key))) for one in every}
    return len({known for known, _ in pairs}) == len(pairs)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ",".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
