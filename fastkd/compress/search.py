"""Students under a limit, by what their parts cost: the largest by a knapsack, and random ones.

The cost of a student is estimated as that of the original, less what its parts save:

    whole + scale * (sum of the parts that it keeps - sum of the original's parts)

`scale` corrects what a part costs alone to what it costs within a network: it is fitted to
students that were measured whole. Parameters and MACs add up exactly, with scale 1.

Everything here follows from the costs and the seed.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastkd.compress.space import Part, Pick, Slot, Space

__all__ = ["BINS", "Prices", "best", "draws", "smallest", "uniform"]

BINS = 4000
"""Steps into which the knapsack divides the limit; costs are rounded up."""


@dataclass(frozen=True)
class Prices:
    """What every choice costs: milliseconds, MACs or parameters."""

    space: Space
    of: Mapping[str, float]
    """By `Subgraph.key`."""
    whole: float
    """Of the original."""
    scale: float = 1.0
    only: str | None = None
    """The one block that is allowed, where a slot can have it."""

    def cost(self, slot: Slot, number: int) -> float:
        """Of a block in a slot."""
        return self.of[slot.choices[number].graph.key]

    def allowed(self, slot: Slot) -> list[int]:
        """The choices that cost less than the network's own, and this one."""
        own = self.cost(slot, 0)
        found = [n for n in range(len(slot.choices)) if not n or self.cost(slot, n) < own]
        if self.only is None:
            return found
        return [n for n in found if slot.choices[n].block == self.only] or [0]

    def base(self, part: Part) -> float:
        """What a part costs beside its slots."""
        if part.whole is None:
            return 0.0
        # A sum of parts may measure larger than the whole.
        own = sum(self.cost(slot, 0) for slot in part.slots)
        return max(0.0, self.of[part.whole.key] - own)

    def part(self, part: Part, numbers: Sequence[int]) -> float:
        """Of a part with these choices."""
        slots = zip(part.slots, numbers, strict=True)
        return self.base(part) + sum(self.cost(slot, number) for slot, number in slots)

    def parts(self, pick: Pick) -> float:
        """Sum of the parts of a student."""
        return sum(
            self.part(part, numbers)
            for stage, kept in zip(self.space.stages, pick, strict=True)
            for part, numbers in zip(stage.parts, kept, strict=False)
        )

    def saved(self, pick: Pick) -> float:
        """What the parts cost less than the original's, before `scale`."""
        return self.parts(self.space.original) - self.parts(pick)

    def estimate(self, pick: Pick) -> float:
        """Of a whole student."""
        return self.whole - self.scale * self.saved(pick)

    def room(self, limit: float) -> float:
        """What the sum of the parts may be, so that the estimate is at most the limit."""
        return self.parts(self.space.original) - (self.whole - limit) / self.scale

    def fitted(self, measured: Mapping[Pick, float]) -> "Prices":
        """With the scale by least squares from students measured whole; unchanged without sense."""
        pairs = [(self.saved(pick), self.whole - found) for pick, found in measured.items()]
        above = sum(saved * real for saved, real in pairs)
        below = sum(saved * saved for saved, _ in pairs)
        scale = above / below if below > 0 else 1.0
        return replace(self, scale=scale) if 0.2 <= scale <= 5 else self


def capacity(slot: Slot, number: int, exponent: float) -> float:
    """How much of a slot's ability a block keeps: its share of the MACs, to a power below 1.

    The power makes a little of everything worth more than all of one.
    """
    own, now = slot.choices[0].graph.count.macs, slot.choices[number].graph.count.macs
    return min(1.0, now / own) ** exponent if own else 1.0


def best(prices: Prices, limit: float, exponent: float = 0.5, bins: int = BINS) -> Pick | None:
    """The student with the largest sum of capacities under the limit; None if there is none.

    A knapsack with one choice for each slot, exact up to costs being rounded up to a step. A
    residual block without slots is worth 1.
    """
    room = prices.room(limit)
    if room < 0:
        return None
    unit = room / bins if room else 1.0

    def steps(cost: float) -> int:
        return min(bins + 1, math.ceil(cost / unit - 1e-9))

    value = np.zeros(bins + 1)  # most capacity of what came so far, for at most so many steps
    trail: list[tuple[np.ndarray, list[list[np.ndarray]]]] = []
    for stage in prices.space.stages:
        snapshots, chosen = [value], []
        now = value
        for part in stage.parts:
            now = _shifted(now, steps(prices.base(part))) + (0.0 if part.slots else 1.0)
            numbers = []
            for slot in part.slots:
                ways = np.stack(
                    [
                        _shifted(now, steps(prices.cost(slot, n))) + capacity(slot, n, exponent)
                        for n in prices.allowed(slot)
                    ]
                )
                numbers.append(ways.argmax(0))
                now = ways.max(0)
            snapshots.append(now)
            chosen.append(numbers)
        depths = np.stack(snapshots[stage.least :])
        trail.append((stage.least + depths.argmax(0), chosen))
        value = depths.max(0)
    if value[bins] == -np.inf:
        return None
    left, pick = bins, list[tuple[tuple[int, ...], ...]]()
    for stage, (depth, chosen) in zip(reversed(prices.space.stages), reversed(trail), strict=True):
        kept: list[tuple[int, ...]] = []
        for part, numbers in reversed(list(zip(stage.parts, chosen, strict=True))[: depth[left]]):
            inside: list[int] = []
            for slot, choice in reversed(list(zip(part.slots, numbers, strict=True))):
                number = prices.allowed(slot)[choice[left]]
                inside.insert(0, number)
                left -= steps(prices.cost(slot, number))
            left -= steps(prices.base(part))
            kept.insert(0, tuple(inside))
        pick.insert(0, tuple(kept))
    return tuple(pick)


def _shifted(value: np.ndarray, steps: int) -> np.ndarray:
    found = np.full_like(value, -np.inf)
    if steps < len(value):
        found[steps:] = value[: len(value) - steps]
    return found


def smallest(prices: Prices) -> Pick:
    """The cheapest student of the space."""
    return tuple(
        tuple(_cheapest(prices, part) for part in stage.parts[: stage.least])
        for stage in prices.space.stages
    )


def _cheapest(prices: Prices, part: Part) -> tuple[int, ...]:
    return tuple(
        min(prices.allowed(slot), key=lambda n, slot=slot: prices.cost(slot, n))
        for slot in part.slots
    )


def uniform(prices: Prices, limit: float) -> list[Pick]:
    """One block everywhere, as Moonshine's students, as deep as the limit allows."""
    found: dict[Pick, None] = {}
    for block in dict.fromkeys(one.block for slot in prices.space.slots() for one in slot.choices):
        if (pick := best(replace(prices, only=block), limit)) is not None:
            found[pick] = None
    return list(found)


def draws(prices: Prices, limit: float, number: int, seed: int) -> Iterator[Pick]:
    """Distinct random students under the limit, as BlockSwap draws them; fewer if there are few.

    Where BlockSwap draws until one happens to cost about its limit, each draw here is made cheaper
    at random until it fits, then dearer at random until nothing more fits.
    """
    rng = random.Random(seed)
    seen: set[Pick] = set()
    room = prices.room(limit)
    for _ in range(20 * number):
        if len(seen) == number:
            return
        pick = tuple(
            tuple(
                tuple(rng.choice(prices.allowed(slot)) for slot in part.slots)
                for part in stage.parts[: rng.randint(stage.least, len(stage.parts))]
            )
            for stage in prices.space.stages
        )
        cost = prices.parts(pick)
        while cost > room:
            cheaper = [(one, more) for one, more in _moves(prices, pick) if more < 0]
            if not cheaper:
                return
            pick, more = rng.choice(cheaper)
            cost += more
        while fitting := [(p, m) for p, m in _moves(prices, pick) if 0 < m <= room - cost]:
            pick, more = rng.choice(fitting)
            cost += more
        if pick not in seen:
            seen.add(pick)
            yield pick


def _moves(prices: Prices, pick: Pick) -> Iterator[tuple[Pick, float]]:
    """Students that differ in one slot or by one part, and what they cost more."""
    for s, (stage, kept) in enumerate(zip(prices.space.stages, pick, strict=True)):
        if len(kept) > stage.least:
            last = prices.part(stage.parts[len(kept) - 1], kept[-1])
            yield _with(pick, s, kept[:-1]), -last
        if len(kept) < len(stage.parts):
            added = stage.parts[len(kept)]
            numbers = _cheapest(prices, added)
            yield _with(pick, s, (*kept, numbers)), prices.part(added, numbers)
        for p, numbers in enumerate(kept):
            for k, number in enumerate(numbers):
                slot = stage.parts[p].slots[k]
                for other in prices.allowed(slot):
                    if other != number:
                        changed = (*numbers[:k], other, *numbers[k + 1 :])
                        more = prices.cost(slot, other) - prices.cost(slot, number)
                        yield _with(pick, s, (*kept[:p], changed, *kept[p + 1 :])), more


def _with(pick: Pick, stage: int, kept: tuple[tuple[int, ...], ...]) -> Pick:
    return (*pick[:stage], kept, *pick[stage + 1 :])
