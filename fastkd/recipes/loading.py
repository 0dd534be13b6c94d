"""Recipe from a name, a YAML file and key=value overrides, in this order of precedence.

Every mistake becomes one sentence that names the nearest valid key or value (`config.mistakes`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import ValidationError

from fastkd.config.mistakes import explain
from fastkd.config.plain_yaml import MAX_LENGTH, NotPlain, read_yaml
from fastkd.config.values import dotted
from fastkd.errors import UserError
from fastkd.losses.base.registry import term_names
from fastkd.output.call_record import how_to_resume, is_call
from fastkd.printable import shown
from fastkd.recipe.overrides import nested, parse_override, set_key
from fastkd.recipe.printing import valid_keys
from fastkd.recipe.schema import Recipe
from fastkd.recipes.brought import check_brought
from fastkd.recipes.catalogue import find_entry
from fastkd.recipes.entry import Entry
from fastkd.recipes.missing import missing, missing_networks

__all__ = ["build", "find_recipe", "load_recipe"]


def find_recipe(name: str) -> Recipe:
    """Build a recipe by name; UserError names the nearest, or what it needs but does not exist."""
    entry = find_entry(name)
    lacks = missing_networks(entry)
    try:
        recipe = build(entry)
    except ValidationError:
        lacks = missing(entry)
        if not lacks:
            raise
    if lacks:
        raise UserError(
            f"the recipe {name} needs something that this version of fastkd does not have: "
            f"{', '.join(lacks)}. `fastkd recipes show {name}` prints all of its keys"
        )
    return recipe


def build(entry: Entry) -> Recipe:
    """The validated recipe; pydantic's ValidationError where a key does not exist (yet)."""
    return Recipe.model_validate(
        nested({"name": entry.name, "description": entry.description, **entry.keys})
    )


def load_recipe(
    name: str | None,
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: dict[str, Any] | None = None,
) -> Recipe:
    """Resolve a recipe; UserError on any mistake, before anything is built.

    values: keys to start from if there is neither a name nor a file.
    """
    values = dict(values or {})
    file_values = _read_yaml(Path(config)) if config is not None else {}
    overrides = list(overrides)
    base = None
    if name is not None:
        base = find_recipe(name)
        if not file_values and not overrides:
            return base
    elif file_values and not _is_whole(file_values):
        base = _base_of(file_values, config)
    if base is not None:
        values = _dump(base)
    if "losses" in file_values:
        values["losses"] = {}
    _merge(values, file_values)
    given = set(dotted(file_values))
    for text in overrides:
        key, value = parse_override(text)
        set_key(values, key, value)
        given.add(key)
    _check_teacher(values, name or str(config or "the recipe"))
    if base is None:
        return _validate(values)
    _follow(find_entry(base.name), values, frozenset(given))
    recipe = _validate(values)
    check_brought(recipe, base, frozenset(given))
    return recipe


def _base_of(file_values: Mapping[str, Any], config: str | Path | None) -> Recipe:
    """The recipe that a file varies."""
    base = file_values.get("name")
    if not isinstance(base, str):
        raise UserError(
            f"{config} holds only part of a recipe and names no base: give one on the command "
            f"line (fastkd train RECIPE --config {quote(str(config))}) or in it (name: RECIPE)"
        )
    try:
        return find_recipe(base)
    except UserError as error:
        raise UserError(
            f"{config} says only in part what to train (that takes data.name, student and "
            f"losses), so its name must be that of a recipe to start from. {error}"
        ) from None


def _check_teacher(values: Mapping[str, Any], where: str) -> None:
    teacher = values.get("teacher")
    if isinstance(teacher, Mapping) and teacher and "name" not in teacher:
        given = ", ".join(f"teacher.{shown(str(key))}" for key in teacher)
        raise UserError(
            f"{given}: {where} has no teacher; leave it out, or name one "
            f"with teacher.name and add a loss that uses it, such as losses.kd.weight"
        )


def _follow(entry: Entry, values: dict[str, Any], given: frozenset[str]) -> None:
    """Set the keys of the recipe that follow from others and that nobody has set."""
    if entry.follow is None:
        return
    for key, value in entry.follow(values, given).items():
        parts = key.split(".")
        starts = {".".join(parts[:number]) for number in range(1, len(parts) + 1)}
        if not starts & given:
            set_key(values, key, value)


def _is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a file alone says what to train on which data; else it varies a named recipe."""
    data = values.get("data")
    has_data = isinstance(data, Mapping) and "name" in data
    return has_data and "student" in values and "losses" in values


def _dump(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    name = shown(str(path), 200)
    try:
        # One character more than a recipe may have, of a file or a device of any length.
        with path.open(encoding="utf-8-sig") as file:
            values = read_yaml(file.read(MAX_LENGTH + 1))
    except OSError as error:
        raise UserError(f"cannot read the recipe file {name}: {error.strerror}") from None
    except (NotPlain, UnicodeDecodeError) as error:
        raise UserError(f"the recipe file {name} is not valid YAML ({error})") from None
    except ValueError:  # a NUL character in its name
        raise UserError(f"cannot read the recipe file {name}: no file has this name") from None
    if is_call(values):
        raise UserError(
            f"{name} describes a run of fastkd.distill, whose networks and loaders no recipe has: "
            f"{how_to_resume(path.parent)}"
        )
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(
            f"the recipe file {name} must hold keys such as `epochs: 30`, one a line; it holds "
            f"{found}"
        )
    return values


def _merge(values: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Deep merge; a section that was null is replaced."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _validate(values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        losses = values.get("losses")
        used = [name for name in term_names() if isinstance(losses, dict) and name in losses]
        mistakes = explain(error, Recipe, values, valid_keys(used))
        raise UserError(*mistakes) from None
