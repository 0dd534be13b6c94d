"""Clocks for a noisy machine: the sides take turns, and a ratio pairs the samples of one turn."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "WARM_UP",
    "Spread",
    "forward_backward",
    "interleave",
    "speedup",
    "spread",
    "turns",
]

WARM_UP = 3
"""Turns that are not timed: compilation, caches, allocations."""


class Spread(NamedTuple):
    """Median and spread of some samples."""

    median: float
    p10: float
    p90: float


def spread(samples: Iterable[float]) -> Spread:
    """Median, 10th and 90th percentile."""
    ordered = sorted(samples)
    tenth = len(ordered) // 10
    return Spread(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def turns(sides: Iterable[str], number: int) -> Iterator[str]:
    """Every side once a turn, in alternating order: the second one benefits from warm caches."""
    names = list(sides)
    for turn in range(number):
        yield from names if turn % 2 == 0 else reversed(names)


def interleave(sides: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Wall seconds of each side in turns, so that a slow moment of the machine hits all of them."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for name in turns(sides, WARM_UP):
        sides[name]()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name in turns(sides, pairs):
        sync()
        start = time.perf_counter()
        sides[name]()
        sync()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup(seconds: Mapping[str, Sequence[float]], over: str, of: str) -> Spread:
    """Spread of the paired ratios time(over) / time(of): above 1, `of` is faster."""
    return spread(a / b for a, b in zip(seconds[over], seconds[of], strict=True))


def forward_backward(
    loss: Callable[..., Tensor], student: Tensor, *rest: Tensor
) -> Callable[[], None]:
    """A call computes `loss(student, *rest)` and its gradient at the student, and drops both."""
    leaf = student.detach().requires_grad_()

    def run() -> None:
        loss(leaf, *rest).backward()
        leaf.grad = None

    return run
