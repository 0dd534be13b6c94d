"""The clock around one call: warm up until steady, then time calls.

Part of the script for other devices, like `host.py`, `runtime.py`, `lines.py` and `alone.py`
(`script.py` joins them), so it imports the standard library only.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["QUICK", "RULE", "Rule", "Timing", "clock_name", "percentiles", "time_calls"]

Clock = Callable[[], float]
"""Seconds, rising."""

MOST_SAMPLES = 1_000_000
"""Of one window, for a clock that stands still."""


@dataclass(frozen=True)
class Rule:
    """When a network is warm and how many calls are then timed.

    A window is `window_calls` calls that take `window_s` seconds at least. The network is steady
    once the medians of two windows in a row differ by at most `tolerance`; after `warm_up_s`
    seconds the timing begins in any case, and the result says that it was not steady.
    """

    window_calls: int = 5
    window_s: float = 0.25
    tolerance: float = 0.02
    warm_up_s: float = 15.0
    calls: int = 50
    """Calls that are timed, at least,"""
    seconds: float = 1.0
    """and what they take together, at least."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


RULE = Rule()
"""For a network."""

QUICK = Rule(window_calls=5, window_s=0.02, warm_up_s=2.0, calls=20, seconds=0.1)
"""For one of thousands of layers."""


@dataclass(frozen=True)
class Timing:
    """What the clock said."""

    seconds: list[float]
    """Of each timed call, in the order of the calls."""
    warm_up_calls: int
    warm_up_s: float
    steady: bool

    def plain(self) -> dict[str, Any]:
        """Percentiles and counts, for JSON."""
        p10, p50, p90 = percentiles(self.seconds)
        return {
            "p10_ms": 1e3 * p10,
            "p50_ms": 1e3 * p50,
            "p90_ms": 1e3 * p90,
            "calls": len(self.seconds),
            "warm_up_calls": self.warm_up_calls,
            "warm_up_s": self.warm_up_s,
            "steady": self.steady,
        }


def time_calls(
    call: Callable[[], Any], rule: Rule = RULE, clock: Clock = time.perf_counter
) -> Timing:
    """Warm up and time a call. Python's garbage collector rests meanwhile.

    call: returns when its answer is there, so that of a GPU must wait for it.
    """
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls, spent, steady, before = 0, 0.0, False, None
        while not steady and spent < rule.warm_up_s:
            window = _sample(call, rule.window_calls, rule.window_s, clock)
            now = statistics.median(window)
            steady = before is not None and abs(now - before) <= rule.tolerance * before
            calls, spent, before = calls + len(window), spent + sum(window), now
        return Timing(_sample(call, rule.calls, rule.seconds, clock), calls, spent, steady)
    finally:
        if collects:
            gc.enable()


def _sample(call: Callable[[], Any], calls: int, seconds: float, clock: Clock) -> list[float]:
    """Seconds of each call: so many calls, and more until they take so long."""
    found: list[float] = []
    spent = 0.0
    while len(found) < calls or (spent < seconds and len(found) < MOST_SAMPLES):
        start = clock()
        call()
        took = clock() - start
        found.append(took)
        spent += took
    return found


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """10th, 50th and 90th percentile, between two samples in proportion."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return cuts[0], cuts[4], cuts[8]


def clock_name() -> str:
    """Which clock the times come from."""
    facts = time.get_clock_info("perf_counter")
    return f"time.perf_counter, {facts.implementation}, resolution {facts.resolution:.0e} s"
