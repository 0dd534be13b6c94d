"""config.yaml in the folder of a `fastkd.distill`: what the call decided.

Flow: `fastkd.api` writes it. Whoever reads a config.yaml asks here first, because this one is no
recipe: networks and loaders are in the caller's script. It shows what a run was, and which argument
differs where a resumed call is another one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.config.plain_yaml import MAX_LENGTH, NotPlain, read_yaml, write_yaml

__all__ = ["differences", "how_to_resume", "is_call", "read_call", "record"]

_MARK = ("made_by", "fastkd.distill")


def record(facts: Mapping[str, Any]) -> str:
    """The text of config.yaml; facts: plain values by name."""
    head = "# What a call of fastkd.distill decided. Not a recipe: networks and loaders are in\n"
    head += "# the script that made the call; to resume, run it again with resume=True.\n"
    return head + write_yaml(dict([_MARK]) | _plain(facts))


def is_call(values: object) -> bool:
    """Whether the contents of a config.yaml are those of a call, and not of a recipe."""
    return isinstance(values, Mapping) and values.get(_MARK[0]) == _MARK[1]


def read_call(folder: Path) -> dict[str, Any] | None:
    """The facts of the call that made a folder; None for any other folder."""
    try:
        with (folder / "config.yaml").open(encoding="utf-8-sig") as file:
            values = read_yaml(file.read(MAX_LENGTH + 1))
    except (OSError, NotPlain, UnicodeDecodeError):
        return None
    return dict(values) if is_call(values) else None


def how_to_resume(folder: Path) -> str:
    """The advice for an unfinished run."""
    return f"run the script that made it again, with distill(.., out={str(folder)!r}, resume=True)"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """`epochs: 3 there, 2 here` for every fact that is not the same."""
    return [
        line
        for key in {**there, **here}
        if key not in ("digest", _MARK[0])
        for line in _unlike(key, _plain(there.get(key)), _plain(here.get(key)))
    ]


def _unlike(key: str, one: Any, other: Any) -> list[str]:
    """Part by part, but what only one side has as a whole: `losses.at: there, not here`."""
    one, other = _by_number(one), _by_number(other)
    if one == other:
        return []
    if isinstance(one, Mapping) and other in (None, []):
        return [f"{key}: there, not here"]
    if isinstance(other, Mapping) and one in (None, []):
        return [f"{key}: here, not there"]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        parts = {**one, **other}
        return [
            line
            for part in parts
            for line in _unlike(f"{key}.{part}", one.get(part), other.get(part))
        ]
    return [f"{key}: {one} there, {other} here"]


def _plain(value: Any) -> Any:
    """As YAML gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _by_number(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return dict(enumerate(value))  # the teachers
    return value
