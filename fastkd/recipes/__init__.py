"""The named recipes, one module per paper or data set; a recipe is a function returning Recipe.

A module lists its recipes in `RECIPES: dict[name, function]`. Names read
dataset/TEACHER--STUDENT/method with zoo names.
"""

import difflib
from collections.abc import Callable
from importlib import import_module

from fastkd.errors import UserError
from fastkd.recipe.schema import Recipe

__all__ = ["all_recipes", "find_recipe"]

_MODULES = ("quickstart", "cifar")


def all_recipes() -> dict[str, Callable[[], Recipe]]:
    """Every named recipe, unbuilt, in the order of the modules."""
    recipes: dict[str, Callable[[], Recipe]] = {}
    for module in _MODULES:
        recipes |= import_module(f"fastkd.recipes.{module}").RECIPES
    return recipes


def find_recipe(name: str) -> Recipe:
    """Build a recipe by name; UserError names the nearest."""
    recipes = all_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.4)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise UserError(f"there is no recipe {name!r}.{hint} `fastkd recipes` lists all of them.")
    return recipes[name]()
