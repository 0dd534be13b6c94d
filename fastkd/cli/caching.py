"""`fastkd cache`: keep a teacher's answers for the runs that will read them."""

import argparse

from fastkd.cli.running import recipe_of, session_of, settled
from fastkd.runs.fill_cache import fill_cache

__all__ = ["cache"]


def cache(options: argparse.Namespace) -> None:
    """Fill the cache that the command or the recipe names, or one below runs/teachers."""
    recipe = recipe_of(options.words, config=options.config)
    if recipe.teacher is not None:
        place = options.out or recipe.teacher.cache or "auto"
        teacher = recipe.teacher.model_copy(update={"cache": place})
        recipe = recipe.replace(teacher=teacher)
    with session_of([recipe]) as session:
        fill_cache(settled(recipe, session.world.device), session, options.epochs)
