"""What distillation gains over the same student alone, and whether the seeds show it.

Flow: `gains` pairs every run with the student alone of the same seed; `paired` makes a `Gain` of
these differences over the seeds, `unpaired` of runs that share none. The tables of sweeps and of
`fastkd report` and the leaderboard take their numbers and their sentence from here.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.evaluation.headline import headline
from fastkd.recipe.schema import BaselineConfig, Recipe
from fastkd.report.labels import ALONE, Choice

__all__ = [
    "Gain",
    "alone_of",
    "gains",
    "paired",
    "reached_alone",
    "standard_error",
    "unpaired",
    "verdict_lines",
]

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1; beyond the last one that is
# used, which is slightly strict.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Gain:
    """A mean difference of two groups of runs, as shares of 1."""

    mean: float
    error: float
    """Standard error of the mean."""
    runs: int
    """Pairs; or runs of the first group, where nothing is paired."""
    freedom: float
    """Degrees of freedom of the error."""
    others: int | None = None
    """Runs of the second group; None: paired."""

    @property
    def shown(self) -> bool:
        """Whether 0 lies outside of the 95 % confidence interval (Student's t)."""
        quantile = _T95[min(max(int(self.freedom), 1), len(_T95)) - 1]
        return abs(self.mean) > quantile * self.error

    def __str__(self) -> str:
        """`gain +1.20 points (standard error 0.30, n = 5)`, or that none is shown."""
        count = f"n = {self.runs}"
        if self.others is not None:
            count += f" and {self.others}, not paired"
        measured = f"{100 * self.mean:+.2f} points (standard error {100 * self.error:.2f}, {count})"
        if not self.shown:
            return f"no gain shown: {measured}"
        return f"gain {measured}" if self.mean > 0 else f"no gain but a loss: {measured}"


def paired(differences: Sequence[float]) -> Gain | None:
    """The gain of runs that differ from their own baseline by these; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    error = standard_error(differences)
    return Gain(statistics.mean(differences), error, count, freedom=count - 1)


def unpaired(ours: Sequence[float], others: Sequence[float]) -> Gain | None:
    """The gain of one group over another, by Welch; None where a group has fewer than two."""
    if min(len(ours), len(others)) < 2:
        return None
    parts = [statistics.variance(group) / len(group) for group in (ours, others)]
    both = sum(parts)
    within = sum(
        part**2 / (len(group) - 1) for part, group in zip(parts, (ours, others), strict=True)
    )
    freedom = both**2 / within if within else len(ours) + len(others) - 2
    mean = statistics.mean(ours) - statistics.mean(others)
    return Gain(mean, math.sqrt(both), len(ours), freedom=freedom, others=len(others))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def verdict_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`NAME: gain ..` for every row of means that has a `Gain` under `gained`."""
    return [f"{row['run']}: {row['gained']}" for row in rows if row.get("gained") is not None]


def alone_of(recipe: Recipe, rate: float | None = None) -> Recipe:
    """The same student without teacher, at this learning rate or the recipe's own."""
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


def reached_alone(
    recipe: Recipe,
    recipes: Mapping[Choice, Recipe],
    found: Mapping[Choice, Mapping[str, Any]],
) -> list[float]:
    """What the student of a recipe reaches alone in the last epoch, whatever the seed.

    At the rate of the largest mean. found: summaries.
    """
    wanted = _pair(_of_any_seed(recipe))
    by_rate: dict[float, list[float]] = {}
    for choice, one in recipes.items():
        last = f"{headline(found[choice])}_last"
        if last in found[choice] and _is_alone(one) and _pair(_of_any_seed(one)) == wanted:
            by_rate.setdefault(one.optim.lr, []).append(found[choice][last])
    return max(by_rate.values(), key=statistics.mean, default=[])


def _of_any_seed(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"seed": 0})


def _is_alone(recipe: Recipe) -> bool:
    alone = alone_of(recipe)
    return recipe.teacher is None and recipe.replace(name=alone.name).digest() == alone.digest()


def _pair(recipe: Recipe) -> str:
    """Equal for a run and its baselines, at any rate."""
    return alone_of(recipe.model_copy(update={"baseline": BaselineConfig()}), 1.0).digest()
