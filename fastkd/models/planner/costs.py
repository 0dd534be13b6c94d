"""The committed times of blocks, for when nothing may be measured.

There are none yet, so that every block then stays plain. costs.json gets rows from
`benchmarks/bench_grouped_pointwise.py --save-results`, which replaces those of its own device
class. A case gets the kind that was fastest in the row most like it, if one is
near enough.
"""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastkd.models.planner.spec import Case, Choice, Kind, Shape
from fastkd.models.planner.store import device_class

__all__ = ["FILE", "Cost", "choose_from", "committed", "cost_of", "nearest", "replace_costs"]

FILE = Path(__file__).with_name("costs.json")

LEAST_GAIN = 0.10
"""Gain in the row below which a case stays plain: it is another case than the one measured."""

_FARTHEST = 2.0
"""Distance of the nearest row beyond which nothing is known."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a case on a class of devices."""

    device: str
    dtype: str
    training: bool
    batch_statistics: bool
    channels_last: bool
    stride: int
    group: int
    """Channels a group."""
    channels: int
    pixels: int
    """Of the input, all images together."""
    ms: dict[Kind, float]


def cost_of(case: Case, ms: dict[Kind, float]) -> Cost:
    """The row of a case."""
    spec = case.spec
    return Cost(
        device=device_class(case.device),
        dtype=str(case.dtype).removeprefix("torch."),
        training=case.training,
        batch_statistics=case.batch_statistics,
        channels_last=case.channels_last,
        stride=spec.stride,
        group=spec.channels // spec.groups,
        channels=spec.channels,
        pixels=_pixels(case.shape),
        ms=ms,
    )


@functools.cache
def committed() -> tuple[Cost, ...]:
    """The rows of costs.json."""
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Cost(**row) for row in rows)


def choose_from(costs: Sequence[Cost], case: Case) -> Choice:
    """By the nearest row; plain where none is near."""
    asked = cost_of(case, {})
    near = [(_distance(asked, row), number) for number, row in enumerate(costs)]
    distance, number = min(near, default=(math.inf, 0))
    if distance > _FARTHEST:
        return Choice("plain")
    ms = costs[number].ms
    gain = ms["plain"] / ms["fused"] - 1
    return Choice("fused" if gain >= LEAST_GAIN else "plain", source="table")


def _distance(asked: Cost, row: Cost) -> float:
    """Doublings by which sizes differ, those of a group counted twice; inf: not comparable."""
    same = ("device", "dtype", "training", "batch_statistics", "channels_last", "stride")
    if any(getattr(asked, name) != getattr(row, name) for name in same):
        return math.inf
    return (
        2 * abs(math.log2(asked.group / row.group))
        + abs(math.log2(asked.channels / row.channels))
        + _distance_of_pixels(asked.pixels, row.pixels)
    )


def _distance_of_pixels(one: int, other: int) -> float:
    return abs(math.log2(one / other)) / 2


def nearest(asked: Shape, known: Iterable[Shape]) -> Shape:
    """The size most like one that is asked for, of the same block."""
    return min(known, key=lambda one: _distance_of_pixels(_pixels(asked), _pixels(one)))


def _pixels(shape: Shape) -> int:
    num, _, height, width = shape
    return num * height * width


def replace_costs(new: Iterable[Cost], file: Path = FILE) -> None:
    """Write rows to costs.json in the place of those for the same cases."""

    def place(row: dict[str, Any]) -> str:
        return json.dumps({name: value for name, value in row.items() if name != "ms"})

    rows = {place(row): row for row in json.loads(file.read_text(encoding="utf-8"))}
    for cost in new:
        row = asdict(cost) | {"ms": {kind: round(ms, 4) for kind, ms in cost.ms.items()}}
        rows[place(row)] = row
    lines = [json.dumps(rows[name]) for name in sorted(rows)]
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
