"""`fastkd cache`: keep a teacher's answers for the runs that will read them."""

import argparse

from fastkd.cli.running import recipe_of, session_of, settled
from fastkd.runs.fill_cache import fill_cache

__all__ = ["cache"]


def cache(options: argparse.Namespace) -> None:
    """Fill the cache that the command or the recipe names, or one below runs/teachers."""
    place = [] if options.out is None else [f"teacher.cache={options.out}"]
    recipe = recipe_of(options.words, config=options.config, more=place)
    if recipe.teacher is not None and recipe.teacher.cache is None:
        recipe = recipe_of(options.words, config=options.config, more=["teacher.cache=auto"])
    with session_of([recipe]) as session:
        fill_cache(settled(recipe, session.world.device), session, options.epochs)
