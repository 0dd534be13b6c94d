"""Recipe from a name, a YAML file and key=value overrides, in this order of precedence.

Every mistake becomes one sentence that names the nearest valid key or value (`mistakes`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fastkd.config.mistakes import entries_of, explain, section_of
from fastkd.errors import UserError
from fastkd.recipe.schema import Recipe

__all__ = [
    "annotated_yaml",
    "load_recipe",
    "nested",
    "parse_override",
    "recipe_to_yaml",
    "valid_keys",
]


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
        _set(values, key, value)
    teacher = values.get("teacher")
    if isinstance(teacher, Mapping) and teacher and "name" not in teacher:
        given = ", ".join(f"teacher.{key}" for key in teacher)
        raise UserError(
            f"{given}: {name or config or 'the recipe'} has no teacher; leave it away, or name one "
            f"by teacher.name and give it something to teach by, such as losses.kd.weight"
        )
    return _validate(values)


def _is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a file says by itself what to train on what; else it varies a named recipe."""
    data = values.get("data")
    has_data = isinstance(data, Mapping) and "name" in data
    return has_data and "student" in values and "losses" in values


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
        raise UserError(f"{text}: the value is not valid YAML ({_problem(error)})") from None


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 0.1} -> {"optim": {"lr": 0.1}}."""
    values: dict[str, Any] = {}
    for key, value in keys.items():
        _set(values, key, value)
    return values


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `--config` takes back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def annotated_yaml(recipe: Recipe) -> str:
    """The same file with the meaning of every key behind its value, for reading."""
    keys = _documented(Recipe, "")
    for name, config in recipe.losses.items():
        keys |= _documented(type(config), f"losses.{name}.")
    absent = _optional_sections(Recipe, "")
    lines: list[str] = []
    path: list[str] = []
    for line in recipe_to_yaml(recipe).splitlines():
        name, colon, _ = line.strip().partition(":")
        if colon and not line.lstrip().startswith("- "):
            path[(len(line) - len(line.lstrip())) // 2 :] = [name]
            key = ".".join(path)
            meaning = (
                absent.get(key) if line.endswith(": null") and key in absent else keys.get(key)
            )
            line = f"{line:<34}  # {meaning}" if meaning else line
        lines.append(line)
    return "\n".join(lines) + "\n"


def valid_keys(losses: Iterable[str] = ()) -> list[str]:
    """All dotted keys, with those of the given losses."""
    from fastkd.losses.base.registry import config_class

    keys = [key for key in _documented(Recipe, "") if key != "losses"]
    for loss in losses:
        keys += _documented(config_class(loss), f"losses.{loss}.")
    return keys


def _documented(section: type[BaseModel], prefix: str) -> dict[str, str]:
    """Dotted key -> meaning."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner, entries = section_of(field.annotation), entries_of(field.annotation)
        if inner:
            keys |= _documented(inner, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = " ".join((field.description or "").split())
        if entries:
            keys |= _documented(entries, f"{prefix}{name}.0.")
    return keys


def _optional_sections(section: type[BaseModel], prefix: str) -> dict[str, str]:
    """Dotted key of each section that may be null -> meaning and the keys it would have."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner and field.default is None:
            what = " ".join((field.description or inner.__doc__ or "").split())
            found[f"{prefix}{name}"] = f"{what} Keys: {', '.join(inner.model_fields)}."
        elif inner:
            found |= _optional_sections(inner, f"{prefix}{name}.")
    return found


def _dump(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


class _EachKeyOnce(yaml.SafeLoader):
    """YAML asks for it, PyYAML takes the last of several without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; an error at the second of two equal keys."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except OSError as error:
        raise UserError(f"cannot read the recipe file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe file {path} is not valid YAML ({_problem(error)})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(
            f"the recipe file {path} must hold keys such as `epochs: 30`, one a line; it holds "
            f"{found if not isinstance(values, dict) else 'keys that are no text'}"
        )
    return values


def _problem(error: Exception) -> str:
    """What the YAML reader stumbled over, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _merge(values: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Deep merge; a section that was null is replaced."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    node: Any = values
    for depth, section in enumerate(sections):
        # `ensemble.0.name`: a number between names is that of an entry of a list.
        new: Any = [] if any(part.isdigit() for part in sections[depth + 1 : depth + 2]) else {}
        node = _step_into(node, section, new, key, ".".join(sections[:depth]))
    if isinstance(node, list):
        _check_number(node, last, key, ".".join(sections))
        node[int(last) : int(last) + 1] = [value]
    else:
        node[last] = value


def _check_number(node: list[Any], number: str, key: str, at: str) -> None:
    """UserError unless it is that of an entry of the list, or of the next one."""
    if not number.isdigit() or int(number) > len(node):
        entries = ", ".join(f"{at}.{index}" for index in range(len(node))) or "nothing"
        raise UserError(
            f"unknown key {key}: {at} is a list that holds {entries}; {at}.{len(node)} would add "
            f"to it"
        )


def _step_into(node: Any, section: str, new: Any, key: str, at: str) -> Any:
    """What `section` names in a mapping or a list, `new` where there is nothing yet."""
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


def _validate(values: dict[str, Any]) -> Recipe:
    from fastkd.losses.base.registry import term_names

    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        losses = values.get("losses")
        used = [name for name in term_names() if isinstance(losses, dict) and name in losses]
        mistakes = explain(error, Recipe, values, valid_keys(used))
        raise UserError("\n".join(mistakes)) from None
