"""What a named recipe needs but this version of fastkd does not have.

Found by asking the schema of a recipe, the loss terms and the networks, never written down per
recipe: a recipe becomes runnable when its last part is added.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from fastkd.losses.base.registry import config_class, term_names
from fastkd.models.config import NETWORK_OPTIONS
from fastkd.models.registry import model_options
from fastkd.recipe.overrides import nested
from fastkd.recipe.schema import Recipe
from fastkd.recipes.entry import Entry

__all__ = ["missing", "missing_networks"]


def missing(entry: Entry) -> tuple[str, ...]:
    """Keys, values and networks that do not exist, as in `augment.pick` or `losses.crd`.

    A mistake of another kind (a value out of its range) is pydantic's ValidationError.
    """
    losses: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {"name": entry.name, "losses.ce.weight": 1.0}
    for key, value in entry.keys.items():
        if key.startswith("losses."):
            _, loss, option = key.split(".")
            losses.setdefault(loss, {})[option] = value
        else:
            others[key] = value
    found = _unknown(Recipe, nested(others))
    for loss, options in losses.items():
        if loss not in term_names():
            found.append(f"losses.{loss}")
        else:
            found += [f"losses.{loss}.{key}" for key in _unknown(config_class(loss), options)]
    return tuple(dict.fromkeys([*found, *missing_networks(entry)]))


def missing_networks(entry: Entry) -> tuple[str, ...]:
    """The networks and network options among them, which the schema does not know."""
    found: list[str] = []
    for role in ("student", "teacher"):
        if f"{role}.name" in entry.keys:
            found += _unknown_network(role, entry.keys)
    for number, keys in enumerate(entry.keys.get("teacher.ensemble", ())):
        role = f"teacher.ensemble.{number}"
        found += _unknown_network(role, {f"{role}.{key}": value for key, value in keys.items()})
    return tuple(found)


def _unknown(section: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Dotted keys that the section does not have, and key=value that it does not allow.

    Whether the parts fit together is left to `loading.build`; a placeholder replaces the losses.
    """
    try:
        section.model_validate(values)
    except ValidationError as error:
        found = []
        for mistake in error.errors():
            key = ".".join(map(str, mistake["loc"]))
            if mistake["type"] == "extra_forbidden":
                found.append(key)
            elif mistake["type"] == "literal_error":
                found.append(f"{key}={mistake['input']}")
            elif mistake["loc"]:
                raise
        return found
    return []


def _unknown_network(role: str, keys: Mapping[str, Any]) -> list[str]:
    name = keys[f"{role}.name"]
    known = model_options(name)
    if known is None:
        return [f"{role}.name={name}"]
    wanted = [option for option in NETWORK_OPTIONS if f"{role}.{option}" in keys]
    return [f"{role}.{option} of {name}" for option in wanted if option not in known]
