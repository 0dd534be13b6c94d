"""The honest baselines: the original made shallower, or narrower, to the same measured latency.

Both are trained exactly like the chosen student. Of each kind the one is taken whose measured
latency is nearest below the chosen student's: what a user could have without any search.
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
"""Below the latency, within this share of it, an even depth counts more than a nearer one."""

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


def depth_scaled(prices: Prices, limit_ms: float, measure: Measure) -> Student | None:
    """The network with fewer residual blocks whose latency is nearest at or below the limit.

    prices: in milliseconds. Of several that are about as near the one that shortens its stages most
    evenly. None if all are slower.
    """
    space = prices.space
    bound = limit_ms
    for _ in range(_TRIES):
        below = [pick for pick in depths(space) if prices.estimate(pick) <= bound]
        if not below:
            return None
        nearest = max(map(prices.estimate, below))
        near = [pick for pick in below if prices.estimate(pick) >= nearest - _NEAR * limit_ms]
        pick = min(near, key=lambda one: (_unevenness(space, one), -prices.estimate(one)))
        student = Student(space.name, space.options_of(pick), space.label(pick).split(",")[0])
        found = measure(student)
        if found <= limit_ms:
            return student
        # The estimate was too low by so much: ask for less.
        bound = min(prices.estimate(pick) * 0.999, bound * limit_ms / found)
    return None


def width_scaled(
    name: str, options: Mapping[str, Any], limit_ms: float, measure: Measure
) -> Student | None:
    """The widest of the narrower networks whose latency is at most the limit; None: there is none.

    By bisection, as a narrower network is not slower, except by noise.
    """
    every = narrower(name, options)
    low, high = 0, len(every)  # the first that is fast enough is in every[low:high], if any
    while low < high:
        middle = (low + high) // 2
        if measure(every[middle]) <= limit_ms:
            high = middle
        else:
            low = middle + 1
    return every[low] if low < len(every) else None
