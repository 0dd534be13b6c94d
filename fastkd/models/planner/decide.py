"""The rule of the planner: a block is fused only where the clock is sure of the gain."""

import math
import statistics
from collections.abc import Mapping, Sequence

from fastkd.models.planner.spec import Kind

__all__ = ["LEAST_GAIN", "beats", "sure_winner"]

LEAST_GAIN = 0.02
"""Gain below which a change is not worth it, as a share."""

_SURE = 2.0
"""Standard errors by which the gain must exceed it."""

# Of normal samples: standard deviation over median absolute deviation, and standard error of a
# median over that of a mean. Both withstand the outliers of a busy machine.
_SD_OF_MAD = 1.4826
_MEDIAN_OVER_MEAN = 1.2533


def sure_winner(seconds: Mapping[Kind, Sequence[float]]) -> Kind:
    """The kind to use, from samples of both that were taken in turns; plain where it is open."""
    return "fused" if beats(seconds["fused"], seconds["plain"]) else "plain"


def beats(new: Sequence[float], old: Sequence[float]) -> bool:
    """Whether `new` is faster than `old` by more than `LEAST_GAIN` and the noise of the ratios.

    The samples of one turn are paired, so that a slow moment of the machine hits both.
    """
    ratios = [math.log(b / a) for a, b in zip(new, old, strict=True)]
    gain = statistics.median(ratios)
    deviation = _SD_OF_MAD * statistics.median(abs(ratio - gain) for ratio in ratios)
    error = _MEDIAN_OVER_MEAN * deviation / math.sqrt(len(ratios))
    return gain > math.log1p(LEAST_GAIN) + _SURE * error
