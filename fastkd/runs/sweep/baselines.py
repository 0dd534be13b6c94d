"""The students alone that the runs of a comparison are measured by, each with the seed of its run.

A run and its baseline differ only in teacher and losses: what is the same without them is trained
once for all runs that need it.
"""

from collections.abc import Mapping
from typing import Any

from fastkd.evaluation.headline import headline
from fastkd.recipe.schema import BaselineConfig, Recipe
from fastkd.runs.sweep.grid import Choice

__all__ = ["ALONE", "gains", "with_baselines"]

ALONE = "alone"
"""Their folder below runs/."""


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
            one = _alone(recipe, rate)
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


def _alone(recipe: Recipe, rate: float | None = None) -> Recipe:
    return recipe.without_teacher(f"{ALONE}/{recipe.data.name}/{recipe.student.name}", rate)


def gains(
    recipes: Mapping[Choice, Recipe], found: Mapping[Choice, Mapping[str, Any]]
) -> dict[Choice, float]:
    """What each run gains in its last epoch over the same student alone with the same seed.

    Alone at the best of its rates; without a baseline there is no gain. found: summaries.
    """
    reached: dict[str, float] = {}
    for choice, recipe in recipes.items():
        last = f"{headline(found[choice])}_last"
        if last in found[choice] and _is_alone(recipe):
            key = _pair(recipe)
            reached[key] = max(reached.get(key, -1.0), found[choice][last])
    gained: dict[Choice, float] = {}
    for choice, recipe in recipes.items():
        summary = found[choice]
        last = f"{headline(summary)}_last"
        own = (summary.get("alone") or {}).get(last)
        base = reached.get(_pair(recipe)) if own is None else own
        if recipe.teacher and last in summary and base is not None:
            gained[choice] = summary[last] - base
    return gained


def _is_alone(recipe: Recipe) -> bool:
    alone = _alone(recipe)
    return recipe.teacher is None and recipe.replace(name=alone.name).digest() == alone.digest()


def _pair(recipe: Recipe) -> str:
    """Equal for a run and its baselines, at any rate."""
    return _alone(recipe.model_copy(update={"baseline": BaselineConfig()}), 1.0).digest()
