"""Recipe from a name, a YAML file and key=value overrides, in this order of precedence.

Every mistake becomes one sentence that names the nearest valid key or value (`config.mistakes`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastkd.config.mistakes import explain
from fastkd.errors import UserError
from fastkd.losses.base.registry import term_names
from fastkd.output.call_record import how_to_resume, is_call
from fastkd.recipe.overrides import nested, parse_override, set_key, yaml_problem
from fastkd.recipe.printing import valid_keys
from fastkd.recipe.schema import Recipe
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
    if name is not None:
        base = find_recipe(name)
        if not file_values and not overrides:
            return base
        values = _dump(base)
    elif file_values and not _is_whole(file_values):
        base = file_values.get("name")
        if not isinstance(base, str):
            raise UserError(
                f"{config} holds only part of a recipe and names no base: give one on the "
                f"command line (fastkd train RECIPE --config {config}) or in it (name: RECIPE)"
            )
        try:
            values = _dump(find_recipe(base))
        except UserError as error:
            raise UserError(
                f"{config} says only in part what to train (that takes data.name, student and "
                f"losses), so its name must be that of a recipe to start from. {error}"
            ) from None
    if "losses" in file_values:
        values["losses"] = {}
    _merge(values, file_values)
    for text in overrides:
        key, value = parse_override(text)
        set_key(values, key, value)
    teacher = values.get("teacher")
    if isinstance(teacher, Mapping) and teacher and "name" not in teacher:
        given = ", ".join(f"teacher.{key}" for key in teacher)
        raise UserError(
            f"{given}: {name or config or 'the recipe'} has no teacher; leave it out, or name one "
            f"with teacher.name and add a loss that uses it, such as losses.kd.weight"
        )
    return _validate(values)


def _is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a file alone says what to train on which data; else it varies a named recipe."""
    data = values.get("data")
    has_data = isinstance(data, Mapping) and "name" in data
    return has_data and "student" in values and "losses" in values


def _dump(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


class _EachKeyOnce(yaml.SafeLoader):
    """YAML requires unique keys; PyYAML silently takes the last of several."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; an error at the second of two equal keys."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} appears twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except OSError as error:
        raise UserError(f"cannot read the recipe file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"the recipe file {path} is not valid YAML ({yaml_problem(error)})"
        ) from None
    if is_call(values):
        raise UserError(
            f"{path} describes a run of fastkd.distill, whose networks and loaders no recipe has: "
            f"{how_to_resume(path.parent)}"
        )
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(
            f"the recipe file {path} must hold keys such as `epochs: 30`, one a line; it holds "
            f"{found if not isinstance(values, dict) else 'keys that are not text'}"
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
        raise UserError("\n".join(mistakes)) from None
