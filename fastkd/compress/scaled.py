"""The honest baselines: the original made shallower, or narrower, to the same measured cost.

Both are trained exactly like the chosen student. Of each kind the one is taken whose cost, in what
the target names, is nearest at or below the chosen student's: what a user could have without any
search.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastkd.compress.search import Prices
from fastkd.compress.space import Pick, Space
from fastkd.compress.student import Student, narrower

__all__ = ["depth_scaled", "depths", "width_scaled"]

_MOST = 5000
"""Combinations of depths that are looked at; beyond, all stages are shortened in proportion."""
_TRIES = 8
_NEAR = 0.05
"""Below the limit, within this share of it, an even depth counts more than a nearer one."""

Measure = Callable[[Student], float]


def depths(space: Space) -> list[Pick]:
    """Every depth of a network with its own blocks, but its own."""
    ranges = [range(stage.least, len(stage.parts) + 1) for stage in space.stages]
    combinations: Sequence[tuple[int, ...]]
    if math.prod(map(len, ranges)) <= _MOST:
        combinations = list(itertools.product(*ranges))
    else:
        shares = [step / 100 for step in range(100)]
        combinations = list(
            dict.fromkeys(
                tuple(max(r.start, round(share * (r.stop - 1))) for r in ranges) for share in shares
            )
        )
    whole = tuple(len(stage.parts) for stage in space.stages)
    return [_cut(space.original, one) for one in combinations if one != whole]


def _cut(pick: Pick, numbers: Sequence[int]) -> Pick:
    return tuple(kept[:number] for kept, number in zip(pick, numbers, strict=True))


def _unevenness(space: Space, pick: Pick) -> float:
    shares = [len(k) / len(s.parts) for s, k in zip(space.stages, pick, strict=True) if s.name]
    return statistics.pvariance(shares) if shares else 0.0


def depth_scaled(prices: Prices, limit: float, measure: Measure) -> Student | None:
    """The network with fewer residual blocks whose cost is nearest at or below the limit.

    Of several that are about as near the one that shortens its stages most evenly. Whatever the
    prices say too much or too little, each measurement corrects them, until the nearest one is
    measured. None if all cost more.
    """
    space = prices.space
    every, measured = depths(space), dict[Pick, float]()

    def cost(pick: Pick) -> float:
        return measured.get(pick) or prices.estimate(pick)

    for _ in range(_TRIES):
        below = [pick for pick in every if cost(pick) <= limit]
        if not below:
            break
        nearest = max(map(cost, below))
        near = [pick for pick in below if cost(pick) >= nearest - _NEAR * limit]
        pick = min(near, key=lambda one: (_unevenness(space, one), -cost(one)))
        if pick in measured:
            return _shortened(space, pick)
        measured[pick] = measure(_shortened(space, pick))
        prices = prices.fitted(measured)
    fitting = [pick for pick, found in measured.items() if found <= limit]
    return _shortened(space, max(fitting, key=cost)) if fitting else None


def _shortened(space: Space, pick: Pick) -> Student:
    return Student(space.name, space.options_of(pick), space.label(pick).split(",")[0])


def width_scaled(
    name: str, options: Mapping[str, Any], limit: float, measure: Measure
) -> Student | None:
    """The widest of the narrower networks whose cost is at most the limit; None: there is none.

    By bisection, as a narrower network does not cost more, except by noise.
    """
    every = narrower(name, options)
    low, high = 0, len(every)  # the first that is fast enough is in every[low:high], if any
    while low < high:
        middle = (low + high) // 2
        if measure(every[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return every[low] if low < len(every) else None
