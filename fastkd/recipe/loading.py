"""Recipe from a name, a YAML file and key=value overrides, in this order of precedence.

Every mistake becomes one sentence that names the nearest valid key or value.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fastkd.errors import UserError
from fastkd.recipe.schema import Recipe

__all__ = ["load_recipe", "parse_override", "recipe_to_yaml", "valid_keys"]


def load_recipe(
    name: str | None,
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: dict[str, Any] | None = None,
) -> Recipe:
    """Resolve a recipe; UserError on any mistake, before anything is built.

    values: keys to start from where there is neither a name nor a file.
    """
    from fastkd.recipes import find_recipe

    values = dict(values or {})
    file_values = _read_yaml(Path(config)) if config is not None else {}
    if name is not None:
        values = _dump(find_recipe(name))
    elif file_values and "data" not in file_values:
        base = file_values.get("name")
        if not isinstance(base, str):
            raise UserError(
                f"{config} holds only part of a recipe and names no base: give one on the "
                f"command line (fastkd train RECIPE --config {config}) or in it (name: RECIPE)"
            )
        values = _dump(find_recipe(base))
    if "losses" in file_values:
        values["losses"] = {}
    _merge(values, file_values)
    for text in overrides:
        key, value = parse_override(text)
        _set(values, key, value)
    return _validate(values)


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
        raise UserError(f"{text!r}: the value is not readable as YAML ({error})") from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `--config` takes back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def valid_keys(losses: Iterable[str] = ()) -> list[str]:
    """All dotted keys, with those of the given losses."""
    from fastkd.losses.registry import config_class

    keys = [key for key in _section_keys(Recipe, "") if key != "losses"]
    for loss in losses:
        keys += [f"losses.{loss}.{field}" for field in config_class(loss).model_fields]
    return keys


def _section_keys(section: type[BaseModel], prefix: str) -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        keys += _section_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class behind `Section` or `Section | None`."""
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (types.UnionType, typing.Union)
        else (annotation,)
    )
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _dump(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the recipe file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold recipe keys (a YAML mapping), got {type(values)}")
    return values


def _merge(values: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Deep merge; a section that was null is replaced."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    node = values
    for depth, section in enumerate(sections):
        if node.get(section) is None:
            node[section] = {}
        if not isinstance(node[section], dict):
            at = ".".join(sections[: depth + 1])
            raise UserError(f"{at} is a value, not a section: {key} does not exist")
        node = node[section]
    node[last] = value


def _validate(values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(dict.fromkeys(_explain(e, values) for e in error.errors()))
        ) from None


def _explain(error: Any, values: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        losses = values.get("losses")
        known = valid_keys([])
        if isinstance(losses, dict):
            known += [f"losses.{name}" for name in losses]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        section = key.rpartition(".")[0]
        siblings = [k for k in known if k.rpartition(".")[0] == section] or known
        return f"unknown key {key}{hint} Keys here: {', '.join(siblings)}"
    if error["type"] == "missing":
        return f"{key} is missing and has no default: set {key}=..."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}"
