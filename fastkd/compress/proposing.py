"""From costs to a few students under the target: the search, Fisher potential, whole measurements.

Nothing is trained here. A student is only passed on if it was measured (or counted) whole and costs
at most the target; a target below the smallest student is met by the next narrower network of the
family, if there is one, and else refused with the nearest that can be reached.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkd.compress.fisher import fisher_potential, sites_of
from fastkd.compress.search import Prices, best, draws, smallest, uniform
from fastkd.compress.space import Pick, Space, Subgraph, space_of
from fastkd.compress.student import Student, narrower
from fastkd.compress.table import Meter, Table, Times
from fastkd.compress.target import Target
from fastkd.errors import UserError
from fastkd.models.counting.count import count

__all__ = ["Bench", "Search", "propose"]

MARGIN = 0.97
"""Students are looked for below this share of a latency, which the last measurement has to meet."""
_CALIBRATING = 3
_ROUNDS = 3
_NEAR = 0.9
"""Students that cost at least this share of the limit are kept before others."""
_EXPONENTS = (0.5, 0.25, 1.0)


@dataclass
class Bench:
    """Measures layers and whole students, each once; the rest comes from the table."""

    meter: Meter
    table: Table
    num_classes: int
    shape: tuple[int, ...]
    say: Callable[[str], None]

    def layer(self, graph: Subgraph, block: str) -> Times:
        """Of a part of a network."""
        found = self.table.get(graph.key)
        if found is None:
            found = self.meter.layer(graph.module, graph.shape)
            self.table.put(graph.key, found, label=graph.label, block=block)
        return found

    def whole(self, student: Student) -> float:
        """Median milliseconds of a call."""
        key = f"network {student.digest}"
        found = self.table.get(key)
        if found is None:
            found = self.meter.whole(student.build(self.num_classes).eval(), self.shape)
            self.table.put(key, found, label=student.title)
        return found.p50_ms

    def prices(self, space: Space, *, quiet: bool = False) -> Prices:
        """Milliseconds of every choice in a space; says them, shape by shape."""
        graphs = list(space.graphs())
        labels = list(dict.fromkeys(graph.label for graph, _ in graphs))
        of: dict[str, float] = {}
        for number, label in enumerate(labels, 1):
            row = [(graph, block) for graph, block in graphs if graph.label == label]
            of |= {graph.key: self.layer(graph, block).p50_ms for graph, block in row}
            own = next((of[graph.key] for graph, block in row if block == "S"), None)
            cells = [_cell(of[graph.key], block, own) for graph, block in row]
            if quiet:
                continue
            self.say(f"  {number}/{len(labels)}  {label}: {'  '.join(cells)}")
        return Prices(space, of, self.whole(_student(space, space.original)))


def _cell(ms: float, block: str, own: float | None) -> str:
    slower = own is not None and block != "S" and ms >= own
    return f"{block} {ms:.3g}{' (slower, dropped)' if slower else ''}"


def _student(space: Space, pick: Pick) -> Student:
    return Student(space.name, space.options_of(pick), space.label(pick))


@dataclass
class Search:
    """What is asked for."""

    target: Target
    original: Student
    keep: int
    draws: int
    seed: int
    batches: Callable[[], list[tuple[Tensor, Tensor]]]
    """Some training images with their classes, for the Fisher potential."""
    device: torch.device
    bench: Bench
    _potentials: dict[str, float] = field(default_factory=dict)

    def prices(self, space: Space, *, quiet: bool = False) -> Prices:
        """In the unit of the target."""
        if self.target.quantity == "latency":
            return self.bench.prices(space, quiet=quiet)
        name = self.target.quantity
        of = {graph.key: float(getattr(graph.count, name)) for graph, _ in space.graphs()}
        return Prices(space, of, self.cost(_student(space, space.original)))

    def cost(self, student: Student) -> float:
        """Of a whole student, as measured or counted."""
        if self.target.quantity == "latency":
            return self.bench.whole(student)
        with torch.random.fork_rng(devices=[]):
            model = student.build(self.bench.num_classes)
        return float(getattr(count(model, self.bench.shape), self.target.quantity))

    def potential(self, space: Space, pick: Pick) -> float:
        """Fisher potential of a student, untrained, with the weights of the search's seed."""
        student = _student(space, pick)
        if student.digest not in self._potentials:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model = student.build(self.bench.num_classes).to(self.device)
                sites = sites_of(space, pick, model)
                value = fisher_potential(model, sites, self.batches())
            self._potentials[student.digest] = value
        return self._potentials[student.digest]


def propose(search: Search, say: Callable[[str], None]) -> dict[str, Any]:
    """The best students under the target, as plain values.

    UserError if the target cannot be met, with the nearest that can, or needs no compression.
    """
    original = search.cost(search.original)
    limit = search.target.limit(original)
    words = search.target.words
    say(f"original: {words(original)}; target: {search.target}, at most {words(limit)}")
    if original <= limit:
        raise UserError(
            f"--target {search.target}: the original costs {words(original)} already, at most "
            f"{words(limit)} is asked for; ask for less"
        )
    nearest: tuple[float, Student] | None = None
    bases = [search.original, *_thinned(narrower(search.original.name, search.original.options))]
    for number, base in enumerate(bases):
        if number:
            say(f"no student of {bases[number - 1].name} is small enough: {base.title} is next")
        bench = search.bench
        space = space_of(base.name, bench.num_classes, bench.shape, base.options, base.label)
        if search.target.quantity == "latency":
            say(f"milliseconds of each block in {base.title}, by the shape that it sees")
        prices = search.prices(space)
        least = _student(space, smallest(prices))
        cost = search.cost(least)
        if nearest is None or cost < nearest[0]:
            nearest = cost, least
        if cost > limit:
            continue
        found = _within(search, prices, limit, say)
        if found["students"]:
            return found | {"original": original, "limit": limit, "base": base.plain()}
    assert nearest is not None
    raise UserError(
        f"--target {search.target} cannot be met: at most {words(limit)} is asked for, and the "
        f"nearest that {search.original.name} can reach is {words(nearest[0])} "
        f"({nearest[0] / original:.2f}x), by {nearest[1].title}"
    )


def _thinned(students: list[Student]) -> list[Student]:
    """At most four of them, evenly: each is searched as a whole."""
    return students if len(students) <= 4 else students[3::4]


def _within(
    search: Search, prices: Prices, limit: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Students of one network that cost at most the limit; its smallest is known to."""
    space, measured, aim = prices.space, dict[Pick, float](), limit
    by_clock = search.target.quantity == "latency"
    if by_clock:
        aim = MARGIN * limit
        prices, measured = _calibrated(search, prices, aim, say)
    rows: dict[Pick, dict[str, Any]] = {}

    def look_at(pick: Pick, most: float) -> None:
        """Cost a whole student."""
        student = _student(space, pick)
        measured[pick] = cost = search.cost(student)
        rows[pick] = student.plain() | {
            "estimate": prices.estimate(pick),
            "cost": cost,
            "fits": cost <= most,
            "potential": search.potential(space, pick),
        }

    most = aim
    for _ in range(_ROUNDS if by_clock else 1):
        new = [one for one in _in_order(search, prices, aim, say) if one not in rows]
        for pick in new[: search.keep]:
            look_at(pick, most)
        near = [row for row in rows.values() if row["fits"] and row["cost"] >= _NEAR * most]
        if len(near) >= search.keep or not new:
            break
        # Where the parts cost other than they said, the next ones are nearer the limit.
        prices = prices.fitted(measured)
        over = [prices.estimate(pick) / measured[pick] for pick in rows if measured[pick] > most]
        aim = most * min([1.0, *over])
    if not any(row["fits"] for row in rows.values()):
        look_at(smallest(prices), limit)
    fit = [row for row in rows.values() if row["fits"]]
    # A student far below the limit gives away what it could have.
    fit.sort(key=lambda row: (row["cost"] < _NEAR * most, -row["potential"]))
    return {"students": fit[: search.keep], "tried": list(rows.values()), "scale": prices.scale}


def _in_order(search: Search, prices: Prices, aim: float, say: Callable[[str], None]) -> list[Pick]:
    """Proposals: the largest by capacity, then the others by Fisher potential."""
    proposals = list(dict.fromkeys(_proposals(search, prices, aim)))
    potentials: dict[Pick, float] = {}
    for number, pick in enumerate(proposals, 1):
        potentials[pick] = search.potential(prices.space, pick)
        if number % 20 == 0 or number == len(proposals):
            under = search.target.words(aim)
            say(f"  Fisher potential of {number}/{len(proposals)} students under {under}")
    return [*proposals[:1], *sorted(proposals[1:], key=lambda one: -potentials[one])]


def _proposals(search: Search, prices: Prices, limit: float) -> Iterator[Pick]:
    for exponent in _EXPONENTS:
        if (pick := best(prices, limit, exponent)) is not None:
            yield pick
    yield from uniform(prices, limit)
    yield from draws(prices, limit, search.draws, search.seed)


def _calibrated(
    search: Search, prices: Prices, limit: float, say: Callable[[str], None]
) -> tuple[Prices, dict[Pick, float]]:
    """Prices whose sum agrees with students that are measured whole."""
    measured: dict[Pick, float] = {}
    for number in range(_CALIBRATING):
        # Between the target and the original, the target first.
        wanted = limit + (prices.whole - limit) * number / _CALIBRATING
        pick = best(prices, wanted) or smallest(prices)
        if pick in measured:
            continue
        measured[pick] = search.cost(_student(prices.space, pick))
        prices = prices.fitted(measured)
    for pick, found in measured.items():
        say(
            f"  {prices.space.label(pick)}: {found:.4g} ms measured, "
            f"{prices.estimate(pick):.4g} ms by the sum of its parts"
        )
    say(f"  the parts count {prices.scale:.2f} of what they cost alone")
    return prices, measured
