"""The students alone that the runs of a comparison are measured by, each with the seed of its run.

A run and its baseline differ only in teacher and losses: what is the same without them is trained
once for all runs that need it.
"""

from collections.abc import Mapping

from fastkd.recipe.schema import BaselineConfig, Recipe
from fastkd.report.gains import alone_of
from fastkd.report.labels import Choice

__all__ = ["with_baselines"]


def with_baselines(
    recipes: Mapping[Choice, Recipe], *, as_named: bool
) -> tuple[dict[Choice, Recipe], int]:
    """The runs after their baselines, and how many baselines there are.

    as_named: only at the rates of `baseline.lrs`; else also at the run's own where it names none.
    """
    sharing: dict[str, list[Choice]] = {}
    alone: dict[str, Recipe] = {}
    for choice, recipe in recipes.items():
        rates = recipe.baseline.lrs or (() if as_named else (recipe.optim.lr,))
        for rate in rates if recipe.teacher else ():
            one = alone_of(recipe, rate)
            alone[one.digest()] = one
            sharing.setdefault(one.digest(), []).append(choice)
    found: dict[Choice, Recipe] = {}
    rates = {one.optim.lr for one in alone.values()}
    for digest, one in alone.items():
        # The keys in which the runs that share it agree.
        first, *others = sharing[digest]
        keys = [key for key in first if all(key in other for other in others)]
        keys = [key for key in keys if not key.startswith("recipe=")]
        if len(rates) > 1 and not any(key.startswith("optim.lr=") for key in keys):
            keys.append(f"optim.lr={one.optim.lr:g}")
        found[(f"recipe={one.name}", *keys)] = one
    bare = BaselineConfig()
    runs = {c: recipe.model_copy(update={"baseline": bare}) for c, recipe in recipes.items()}
    return found | runs, len(found)
