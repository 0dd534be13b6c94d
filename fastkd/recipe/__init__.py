"""The recipe: typed schema of a run, and how it is read from a name, a file and overrides."""

from fastkd.recipe.loading import load_recipe, recipe_to_yaml
from fastkd.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "recipe_to_yaml"]
