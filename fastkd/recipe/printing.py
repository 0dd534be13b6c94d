"""A recipe as text: the YAML file that `--config` takes back, and one with every key explained."""

from collections.abc import Iterable

from pydantic import BaseModel

from fastkd.config.docstrings import docstring_of
from fastkd.config.mistakes import entries_of, section_of
from fastkd.config.plain_yaml import write_yaml
from fastkd.losses.base.registry import config_class
from fastkd.recipe.schema import Recipe

__all__ = ["annotated_yaml", "recipe_to_yaml", "valid_keys"]


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `--config` takes back."""
    return write_yaml(recipe.model_dump(mode="json"))


def annotated_yaml(recipe: Recipe) -> str:
    """The same file with the meaning of every key after its value, for reading."""
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
    """All dotted keys, including the keys of the given losses."""
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
            what = " ".join((field.description or docstring_of(inner)).split())
            found[f"{prefix}{name}"] = f"{what} Keys: {', '.join(inner.model_fields)}."
        elif inner:
            found |= _optional_sections(inner, f"{prefix}{name}.")
    return found
